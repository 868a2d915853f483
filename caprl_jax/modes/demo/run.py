"""Mode `demo`: a local page: an image is captioned, and the judge answers questions from the words
that stand there.

All shapes are fixed sizes, so that after the first caption and the first question of a size nothing
is compiled.
"""

import dataclasses
import functools
import itertools
import logging
import pathlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.config import schema as configuration
from caprl_jax.data.judge_questions import QuestionShape, pad_questions
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import CaptionRow, QARow, Question, check_question, read_image
from caprl_jax.harness.process.first import one_process_only
from caprl_jax.harness.sections import PolicySection
from caprl_jax.hub.load import Loaded
from caprl_jax.image_files import openable_suffixes
from caprl_jax.inference.captioner import Captioner, CaptionerConfig, open_captioner
from caprl_jax.inference.judge import JudgeSection, question_tokenizer
from caprl_jax.modes.demo.section import (
  PASSWORD,
  USER,
  DemoConfig,
  check_port,
  import_gradio,
  password_for,
)
from caprl_jax.pages.markup import text
from caprl_jax.rl.judge import Judge, JudgeIds, answer_questions
from caprl_jax.rl.judge_protocol import answer_by_margin, best_and_lead

log = logging.getLogger("caprl_jax.modes.demo.run")

# What a question may have, and what it is padded to: the first of these that holds it.
OPTIONS, STEM_TOKENS, OPTION_TOKENS = (4, 8), (32, 128), (1, 4, 16)
FIRST_CAPTION_TOKENS = 32  # captions are padded to this, doubled until it holds them
REMEMBERED = 10_000  # answers
WARM_UP = Question("What color is the shape?", ("red", "green", "blue"), 0)


def read_question(stem: str, lines: str) -> tuple[Question, int | None]:
  """What was typed -> a question, and which option is marked as right: the one that begins with a
  star, if any.

  Raises ValueError for what cannot be asked.
  """
  options = [line.strip() for line in lines.splitlines() if line.strip()]
  marked = [i for i, option in enumerate(options) if option.startswith("*") and option.strip("* ")]
  if len(marked) > 1:
    raise ValueError("two options are marked as right; leave the star at one of them")
  options = [option.lstrip("* ") if i in marked else option for i, option in enumerate(options)]
  question = Question(stem.strip(), tuple(options), marked[0] if marked else 0)
  check_question(question, "this question")
  return question, marked[0] if marked else None


@dataclasses.dataclass(frozen=True)
class JudgedQuestion:
  """choice: the option answered, -1 for none. shares: of each option, 1 in sum with `abstain`, that
  of "can not answer" (None where it is no option). scores: what was compared; None where the judge
  writes its answer."""

  choice: int
  shares: tuple[float, ...]
  scores: tuple[float, ...] | None
  abstain: float | None = None


class TextJudge:
  """A judge asked in words, one caption and question at a time; it remembers its answers."""

  def __init__(
    self, judge: Loaded, cfg: JudgeSection, mesh: jax.sharding.Mesh, caption_tokens: int, seed: int
  ):
    self.cfg = cfg.each_once()
    self.tokenize = question_tokenizer(judge, cfg, [""])
    doubled = itertools.takewhile(
      lambda n: n < caption_tokens, (FIRST_CAPTION_TOKENS << i for i in itertools.count())
    )
    self.caption_sizes = (*doubled, caption_tokens)
    self.key = jax.random.key(seed)
    self._model, self._params, self._mesh = judge.model, judge.params, mesh
    self._written = judge.model.cfg.vocab_size if cfg.reading == "generate" else None
    self._known: dict[tuple, tuple[np.ndarray, int]] = {}
    self.answer = jax.jit(functools.partial(answer_questions, cfg=self.cfg))

  def __call__(self, caption: str, question: Question) -> JudgedQuestion:
    """Raises ValueError for a caption or question that is too long."""
    scores, choice = self._ask(caption, question)
    count = len(question.options)
    if self.cfg.reading == "option_pmi":
      scores = scores[:count] - self._ask(self.tokenize.template.baseline, question)[0][:count]
      choice = int(answer_by_margin(*best_and_lead(scores), self.cfg.margin))
    if self.cfg.reading == "generate":
      return JudgedQuestion(choice, tuple(float(i == choice) for i in range(count)), None)
    present = (
      np.concatenate([scores[:count], scores[-1:]])
      if self.cfg.abstain != "none"
      else scores[:count]
    )
    shares = np.exp(present - present.max())
    shares = (shares / shares.sum()).tolist()
    abstain = shares.pop() if self.cfg.abstain != "none" else None
    return JudgedQuestion(choice, tuple(shares), tuple(scores[:count].tolist()), abstain)

  def _ask(self, caption: str, question: Question) -> tuple[np.ndarray, int]:
    """Scores without prior, of options in the dataset's order, and the choice."""
    known = (caption, question.stem, question.options)
    if known not in self._known:
      if len(self._known) >= REMEMBERED:
        self._known.clear()
      self._known[known] = self._run(caption, question)
    return self._known[known]

  def _run(self, caption: str, question: Question) -> tuple[np.ndarray, int]:
    tokenized = self.tokenize(question)
    ids = self.tokenize.caption_ids(caption)
    T = _size(self.caption_sizes, len(ids), "the caption has {} tokens")
    shape = QuestionShape(
      _size(OPTIONS, len(tokenized.options), "the question has {} options"),
      _size(STEM_TOKENS, len(tokenized.stem), "the question has {} tokens"),
      _size(OPTION_TOKENS, max(map(len, tokenized.options)), "an option has {} tokens"),
    )
    caption_1T = np.zeros((1, 1, T), np.int32)
    caption_1T[0, 0, : len(ids)] = ids
    questions = jax.tree.map(lambda x: jnp.asarray(x)[None], pad_questions([tokenized], 1, shape))
    prompt = self.tokenize.prompt(
      shape.options if self.cfg.reading != "option_pmi" else 2, self._written
    )
    with jax.set_mesh(self._mesh):
      keep = jnp.arange(T)[None, None] < len(ids)
      out = jax.device_get(
        self.answer(
          Judge(self._model, self._params, prompt),
          JudgeIds(jnp.asarray(caption_1T), keep),
          questions,
          key=self.key,
        )
      )
    if not out.valid_BGK.all():
      raise ValueError(
        "the judge gave numbers that are not finite; check judge.source and its dtype"
      )
    return out.score_BGKA[0, 0, 0].astype(np.float64), int(out.choice_BGK[0, 0, 0])


def _size(sizes: Sequence[int], need: int, what: str) -> int:
  if need > sizes[-1]:
    raise ValueError(f"{what.format(need)}, and at most {sizes[-1]} are read here")
  return next(size for size in sizes if size >= need)


class Demo:
  """What the page calls: words and markup in and out."""

  def __init__(self, captioner: Captioner, judge: TextJudge, max_tokens: int):
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

  def caption(self, path: str | None) -> tuple[str, str]:
    """An image file -> its caption, and a line about it."""
    if not path:
      return "", ""
    number = next(self._numbers)
    begin = time.monotonic()
    row = CaptionRow(pathlib.Path(path), "", pathlib.Path(path).name)
    with self._device, jax.set_mesh(self.captioner.mesh):
      if self._closed:
        return "", ""
      (output,) = [one for found in self.captioner([(number, row)]) for one in found]
    secs = time.monotonic() - begin
    if output.error is not None:
      return "", f"<p class=judge-error>{text(str(output.error))}</p>"
    (caption,) = output.captions
    cut = (
      f"<b>cut</b> at the limit of {self.max_tokens} tokens"
      if caption.finish == "length"
      else "ended by itself"
    )
    length = f"{len(caption.text.split())} words, {len(caption.tokens)} tokens"
    about = f"As the captioner wrote it: {length}, {secs:.2f} s, {cut}."
    return caption.text, f"<p class=judge-note>{about}</p>"

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


_CSS = """
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


def make_examples(
  source: str, count: int, folder: pathlib.Path, seed: int
) -> list[tuple[str, str, str]]:
  """Some rows as `build` wants them: each with one of its questions of most options. Their images
  are written to `folder`, which is what the page may show of this machine's files."""
  rows = read_qa_rows(source, seed)
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  examples = []
  for number, i in enumerate(rng.permutation(len(rows))[:count].tolist()):
    row: QARow = rows[i]
    most = max(len(q.options) for q in row.questions)
    question = row.questions[
      rng.choice([k for k, q in enumerate(row.questions) if len(q.options) == most])
    ]
    path = folder / f"{number}.png"
    read_image(row).save(path)
    lines = [
      ("* " if k == question.gold else "") + " ".join(option.split())
      for k, option in enumerate(question.options)
    ]
    examples.append((str(path), question.stem, "\n".join(lines)))
  return examples


def run(config, workdir: pathlib.Path) -> None:
  """Serves the page until it is interrupted."""
  cfg = configuration.load_section(config, "demo", DemoConfig)
  policy_section = configuration.load_section(config, "policy", PolicySection)
  section = configuration.load_section(config, "judge", JudgeSection)
  seed = config.get("seed", 0)
  one_process_only("demo")
  password = password_for(cfg)
  gr = import_gradio()
  check_port(cfg)  # before the models, which take their time
  examples = (
    make_examples(cfg.examples, cfg.max_examples, workdir / "examples", seed)
    if cfg.examples
    else []
  )
  # One image at a time: several devices are of use only to a model that is split over them.
  mesh = (
    sharding.make_mesh(configuration.load_section(config, "mesh", sharding.MeshConfig))
    if config.get("mesh")
    else sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])
  )
  sharding.check_batch_size(1, mesh, "the demo's batch")
  captioner_cfg = CaptionerConfig(
    policy_section.instruction, max_tokens=cfg.max_tokens, temperature=cfg.temperature, batch_size=1
  )
  with jax.set_mesh(mesh):
    judge = TextJudge(section.load(mesh), section, mesh, cfg.caption_tokens, seed)
  with open_captioner(policy_section.load, captioner_cfg, mesh=mesh, seed=seed) as captioner:
    demo = Demo(captioner, judge, cfg.max_tokens)
    log.info("compiling ...")
    judge("A shape.", WARM_UP)
    if examples:
      demo.caption(examples[0][0])
    page = build(demo, examples)
    fonts = [
      gr.themes.Font(name)
      for name in ("Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
    ]
    page.launch(
      server_name=cfg.host,
      server_port=cfg.port,
      share=cfg.share,
      auth=(USER, password) if password else None,
      quiet=True,
      prevent_thread_lock=True,
      show_error=True,
      inbrowser=False,
      ssr_mode=False,
      mcp_server=False,
      enable_monitoring=False,
      footer_links=[],
      max_file_size="64mb",
      allowed_paths=[str(workdir / "examples")] if examples else [],
      css=_CSS,
      theme=gr.themes.Default(font=fonts, font_mono=[gr.themes.Font("monospace")]),
    )
    login = f" as {USER!r}, with the password of {PASSWORD}" if password else ""
    log.info("open http://%s:%d%s   (Ctrl-C ends it)", cfg.host, cfg.port, login)
    page.block_thread()
    demo.close()
