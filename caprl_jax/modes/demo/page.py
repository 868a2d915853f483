"""A captioner, a judge -> the page, and what it calls."""

import itertools
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from caprl_jax.data.rows import CaptionRow, Question
from caprl_jax.image_files import openable_suffixes
from caprl_jax.inference.captioner import Captioner, CaptionerOutput, WrittenCaption
from caprl_jax.modes.demo.section import (
  import_gradio,
)
from caprl_jax.modes.demo.text_judge import (
  JudgedQuestion,
  ServedJudge,
  TextJudge,
  read_question,
)
from caprl_jax.pages.markup import text


class Demo:
  """What the page calls: words and markup in and out."""

  def __init__(self, captioner: Captioner, judge: TextJudge | ServedJudge, max_tokens: int):
    self.captioner, self.judge, self.max_tokens = captioner, judge, max_tokens
    self._numbers = itertools.count()  # so that each caption that is sampled is drawn apart
    self._device, self._closed = threading.Lock(), False

  def close(self) -> None:
    """Waits for what runs and lets nothing more begin: a thread that computes must not meet the
    interpreter's end.
    """
    self._closed = True
    with self._device:
      pass

  def caption(self, path: str | None) -> Iterator[tuple[str, str]]:
    """An image file -> its caption as it is written, and a line about it at the end."""
    if not path:
      yield "", ""
      return
    row = CaptionRow(pathlib.Path(path), "", pathlib.Path(path).name)
    begin = time.monotonic()
    outputs = self.captioner.stream((next(self._numbers), row))
    while (output := self._next(outputs)) is not None:
      if output.error is not None:
        yield "", f"<p class=judge-error>{text(str(output.error))}</p>"
        continue
      (caption,) = output.captions
      yield caption.text, self._written(caption, time.monotonic() - begin)

  def _next(self, outputs: Iterator[CaptionerOutput]) -> CaptionerOutput | None:
    """More of a caption; None at its end, and once the page is closed. The device is free between
    two of these: a caption that nobody waits for any more holds up nothing."""
    with self._device, jax.set_mesh(self.captioner.mesh):
      return None if self._closed else next(outputs, None)

  def _written(self, caption: WrittenCaption, secs: float) -> str:
    length = f"{len(caption.text.split())} words, {len(caption.tokens)} tokens"
    how = {
      "": "it goes on ...",
      "length": f"<b>cut</b> at the limit of {self.max_tokens} tokens.",
      "end": "ended by itself.",
    }[caption.finish]
    about = f"As the captioner wrote it: {length}, {secs:.2f} s, {how}"
    return f"<p class=judge-note>{about}</p>"

  def ask(self, caption: str | None, stem: str | None, lines: str | None) -> str:
    """The judge's answers to what was typed, from this caption and from none, as markup."""
    caption, stem, lines = (value or "" for value in (caption, stem, lines))
    if not stem.strip() or not lines.strip():
      return (
        "<p class=judge-note>Type a question and its options: "
        "the judge answers from the caption.</p>"
      )
    try:
      question, gold = read_question(stem, lines)
      with self._device:
        if self._closed:
          return ""
        given, blind = self.judge(caption.strip(), question), self.judge("", question)
    except ValueError as error:
      return f"<p class=judge-error>{text(error)}</p>"
    return (
      f'<div class=judge data-caption="{text(caption)}">'
      + _panel("From this caption", "given", question, given, gold)
      + _panel("With no caption: a guess", "blind", question, blind, gold)
      + f"</div><p class=judge-note>{self._about()}</p>"
    )

  def _about(self) -> str:
    return {
      "option_pmi": "Scores: how much likelier an option's words become, in nats per token, than "
      "after a caption that says nothing. Bars: the same as shares.",
      "generate": "The judge wrote its answer.",
    }.get(self.judge.cfg.reading, "Bars: probability of each option's letter, of those shown.")


def _panel(
  title: str, name: str, question: Question, verdict: JudgedQuestion, gold: int | None
) -> str:
  if verdict.choice < 0:
    kind, says = "none", "– no answer"
  else:
    kind = "none" if gold is None else "right" if verdict.choice == gold else "wrong"
    sign = {"right": "✓ ", "wrong": "✗ ", "none": ""}[kind]
    says = sign + text(question.options[verdict.choice])
  rows = [
    (option, share, verdict.scores[i] if verdict.scores else None, i == verdict.choice, i == gold)
    for i, (option, share) in enumerate(zip(question.options, verdict.shares))
  ]
  if verdict.abstain is not None:
    rows.append(("can not answer", verdict.abstain, None, verdict.choice < 0, False))
  bars = "".join(
    f"<li{' class=chosen' if chosen else ''}>"
    f"<span class=name>{text(option)}{' <small>right</small>' if is_gold else ''}</span>"
    f'<span class=track aria-hidden=true><i style="width:{100 * share:.1f}%"></i></span>'
    f"<b>{100 * share:.0f}%</b>"
    f"<small>{'' if score is None else f'{score:+.2f}'}</small></li>"
    for option, share, score, chosen, is_gold in rows
  )
  return (
    f"<section class=judge-{name}><h3>{title}</h3><p><span class='says "
    f"{kind}'>{says}</span></p><ul>{bars}</ul></section>"
  )


CSS = """
.judge{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(260px,100%),1fr));gap:14px}
.judge section{border:1px solid var(--border-color-primary);border-radius:8px;padding:12px 14px;\
min-width:0}
.judge h3{margin:0 0 6px;font-size:14px;font-weight:400}.judge p{margin:0 0 8px}
.judge ul{list-style:none;margin:0;padding:0}
.judge .says{display:inline-block;border-radius:6px;padding:2px 10px;font-size:18px;font-weight:600;
overflow-wrap:anywhere}
.judge li{display:grid;grid-template-columns:minmax(60px,38%) 1fr 42px 44px;gap:8px;\
align-items:center;margin:5px 0;font-variant-numeric:tabular-nums}
.judge li .name{overflow-wrap:anywhere}.judge li b,.judge li>small{text-align:right;font-weight:400}
.judge li.chosen .name,.judge li.chosen b{font-weight:700}
.judge .track{height:14px;border-radius:4px;overflow:hidden;\
background:var(--background-fill-secondary);
border:1px solid var(--border-color-primary)}
.judge .track i{display:block;height:100%;background:#8a8f9c}\
.judge .chosen .track i{background:#0a8f69}
.judge small,.judge-note{font-size:13px;opacity:.75}.judge-note{margin:8px 0 0}\
.judge-error{color:#b3261e}
.judge .says.none{background:var(--background-fill-secondary)}
.judge .says.right{color:#0b6b3a;background:#dff3e6}\
.judge .says.wrong{color:#a3242c;background:#fbe4e3}
.dark .judge .says.right{color:#7fe0a8;background:#12382a}\
.dark .judge .says.wrong{color:#ff9d9a;background:#45191c}.dark .judge-error{color:#ff9d9a}
"""


def build(demo: Demo, examples: Sequence[tuple[str, str, str]]) -> Any:
  """The page. Long because it is all of it. examples: (image file, question, options by line)."""
  gr = import_gradio()
  openable_suffixes()  # gradio opens what is uploaded, too: with Pillow's plug-ins
  with gr.Blocks(title="caprl_jax", analytics_enabled=False) as page:
    gr.Markdown(
      "# What can be known from a caption\nThe captioner sees the image. The judge does "
      "not: it answers from the words below alone. Change them and watch its answer."
    )
    with gr.Row():
      with gr.Column(scale=2, min_width=280):
        # image_mode None leaves the file as it is: transparency and EXIF are for `read_image`.
        image = gr.Image(
          type="filepath",
          image_mode=None,
          sources=["upload", "clipboard"],
          label="Image",
          height=300,
          elem_id="image",
        )
        again = gr.Button("Caption it again", elem_id="again")
      with gr.Column(scale=3, min_width=280):
        caption = gr.Textbox(label="Caption (edit it)", lines=4, max_lines=12, elem_id="caption")
        about = gr.HTML(elem_id="about", padding=False)
        question = gr.Textbox(
          label="Question", lines=1, elem_id="question", placeholder="What color is the shape?"
        )
        options = gr.Textbox(
          label="Options, one per line",
          info="A star before one marks it as right.",
          lines=4,
          max_lines=8,
          elem_id="options",
          placeholder="* red\ngreen\nblue",
        )
    answer = gr.HTML(demo.ask("", "", ""), elem_id="answer", padding=False)
    if examples:
      gr.Examples(
        [list(example) for example in examples],
        [image, question, options],
        label="Examples",
        visible_columns=[0, 1],
      )
    hidden = dict(api_visibility="private", concurrency_id="device", concurrency_limit=1)
    gr.on(
      [image.change, again.click],
      demo.caption,
      image,
      [caption, about],
      show_progress="minimal",
      **hidden,
    )
    # Typing is faster than judging: of what came meanwhile only the last is asked.
    gr.on(
      [caption.change, question.change, options.change],
      demo.ask,
      [caption, question, options],
      answer,
      trigger_mode="always_last",
      show_progress="hidden",
      **hidden,
    )
  return page
