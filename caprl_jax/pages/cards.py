"""Cards of a page: an image with its questions, its captions and what the judge answered.

All results are markup; arguments are plain text, unless they say otherwise.
"""

from collections.abc import Sequence
from typing import Literal

from caprl_jax.pages.markup import text

Verdict = Literal["right", "wrong", "none"]

_SYMBOLS: dict[Verdict, str] = {"right": "✓", "wrong": "✗", "none": "–"}

FAILED = '<span class="answer wrong"><b>✗</b> failed</span>'
CUT = '<span class="answer wrong">cut</span>'


def image_card(picture: str, name: str, content: str) -> str:
  """An image on the left, under it its name, and `content` (markup, as `picture` is) on the
  right."""
  return (
    f"<article class=sample><div class=picture>{picture}"
    f'<div class="soft file">{text(name)}</div></div><div class=words>{content}</div></article>'
  )


def question_list(questions: Sequence[str]) -> str:
  """Questions, as `question` writes them, with their numbers; "" for none."""
  return f"<ol class=questions>{''.join(questions)}</ol>" if questions else ""


def question(
  stem: str, options: Sequence[str], gold: int, *, kind: str = "", after: str = ""
) -> str:
  """One item of `question_list`: the right option is outlined. after: markup below the options."""
  listed = " ".join(
    f'<span class="option{" gold" if i == gold else ""}">{text(option)}</span>'
    for i, option in enumerate(options)
  )
  about = f" <small>{text(kind)}</small>" if kind else ""
  return f"<li><span class=stem>{text(stem)}</span>{about}<div>{listed}</div>{after}</li>"


def answer(verdict: Verdict, word: str, number: int | None = None) -> str:
  """What was answered and how it counts; number: of the question in its list."""
  place, title = "", ""
  if number is not None:
    place, title = f"<small>{number}</small> ", f' title="question {number}: {verdict}"'
  return (
    f'<span class="answer {verdict}"{title}>{place}<b>{_SYMBOLS[verdict]}</b> {text(word)}</span> '
  )


def caption_text(caption: str) -> str:
  """A caption's words, or a note that there are none."""
  return text(caption) if caption.strip() else "<i class=soft>(empty)</i>"
