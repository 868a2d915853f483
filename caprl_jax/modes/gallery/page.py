"""A gallery's figures and captions -> its page: tables in numbers, one card per image with the
captions side by side.
"""

import dataclasses
import io
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from caprl_jax.atomic_files import write_bytes
from caprl_jax.data.rows import QARow, Question
from caprl_jax.pages import cards, markup

NOBODY = "no caption"  # the row of the table that says what the judge guesses
_SMALL_PIXELS = 192  # a side; larger pictures are embedded as JPEG
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_STYLE = """<style>
.gallery{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(250px,100%),1fr));gap:12px}
.gallery>section{border-top:3px solid var(--line);padding-top:6px;min-width:0}\
.gallery h3{margin:0 0 4px}
.only{background:rgba(230,165,0,.2);color:inherit;border-radius:3px;
box-shadow:0 1.5px 0 rgba(190,130,0,.75)}
.scroll{overflow-x:auto}.scroll :is(th,td){white-space:nowrap}.sample .questions{margin-top:0}
@media(max-width:760px){.sample .picture img{max-width:192px}}
</style>"""


@dataclasses.dataclass(frozen=True)
class GivenCaption:
  """What one captioner has for one image. caption: None where it failed, and `error` says why;
  tokens, cut: None where the file does not say."""

  caption: str | None
  error: str = ""
  tokens: int | None = None
  cut: bool | None = None

  @property
  def words(self) -> list[str]:
    return _WORD.findall(self.caption or "")


@dataclasses.dataclass(frozen=True)
class ComparedImage:
  """An image that all captioners have. row: its questions; choices: of each captioner, the option
  that the judge chose for each (-1: none; None: it was not asked)."""

  name: str
  said: dict[str, GivenCaption]
  row: QARow | None = None
  choices: dict[str, list[int | None]] = dataclasses.field(default_factory=dict)

  @property
  def questions(self) -> tuple[Question, ...]:
    return self.row.questions if self.row else ()

  def right(self, who: str) -> list[bool]:
    return [choice == q.gold for choice, q in zip(self.choices[who], self.questions, strict=True)]


def write_page(
  path: pathlib.Path,
  figures: dict[str, Any],
  drawn: Sequence[ComparedImage],
  most: Sequence[ComparedImage],
  picture: Callable[[ComparedImage], Image.Image | None],
  short: Callable[[ComparedImage], str],
) -> None:
  """Writes the page. It needs no network and runs no script.

  Args:
    figures: as `gallery.figures` returns them.
    drawn, most: the cards' images, drawn at random and those where the captioners differ most.
    picture: of an image; None where there is none. Called once per card, in their order.
    short: the name of an image on the page.
  """
  names = list((drawn or most)[0].said)
  asked = bool(figures.get("questions"))
  marked = (
    'A <mark class="only">marked</mark> word is in that caption alone. ' if len(names) > 1 else ""
  )
  judged = f"The judge sees only the caption. {markup.LEGEND}" if asked else ""
  about = f"<p class=soft>{marked}{judged}</p>"
  sections = [_STYLE, _summary(figures)]
  for title, shown in (("Drawn at random", drawn), ("Where the captioners differ most", most)):
    if shown:
      listed = "".join(_card(shared, picture(shared), short(shared)) for shared in shown)
      sections.append(
        f"<section><h2>{title}</h2>{about}<div class=samples>{listed}</div></section>"
      )
  page = markup.page(" · ".join(names), sections)
  # a caption may hold what UTF-8 cannot
  write_bytes(path, page.encode("utf-8", "xmlcharrefreplace"))


def _summary(f: dict[str, Any]) -> str:
  head = ["captioner", "images", "failed", "words", "tokens", "cut"]
  rows = []
  for who, row in f["captioners"].items():
    if who != NOBODY:
      rows.append(
        [
          markup.text(who),
          markup.show(row["images"]),
          markup.show(row["failed"]),
          markup.show(row["words"], "tenths"),
          markup.show(row["tokens"], "tenths"),
          markup.show(row["cut_share"], "percent"),
        ]
      )
  parts = [
    f"<p class=soft>{f['images']:,} images have a row in every file. Words and tokens: mean "
    "of a caption; cut: share of captions that end at the token "
    f"limit.</p>{_scrolling(markup.table(head, rows), 'captions')}"
  ]
  if f.get("questions"):
    names = list(f["questions_by_kind"])
    if names == [""]:  # where no question has a kind, their column would repeat "right"
      names = []
    kinds = [markup.text(kind or "no kind") for kind in names]
    head = ["judge's answers", "right", "wrong", *kinds]
    rows = [
      [
        markup.text(who),
        markup.show(row["accuracy"], "percent"),
        markup.show(row["misled"], "percent"),
        *(markup.show(row["accuracy_by_kind"][kind], "percent") for kind in names),
      ]
      for who, row in f["captioners"].items()
    ]
    counts = [f"{f['questions_by_kind'][kind]:,}" for kind in names]
    rows.append(["questions", f"{f['questions']:,}", "", *counts])
    parts.append(
      f"<p class=soft style='margin-top:20px'>Questions about {f['judged_images']:,} of "
      "these images, drawn at random, put to the judge with each caption, and with "
      "none, where it can but guess. By kind: the share answered "
      f"right.</p>{_scrolling(markup.table(head, rows), 'accuracy')}"
    )
  return f"<section><h2 style='margin-top:0'>In numbers</h2>{''.join(parts)}</section>"


def _scrolling(table: str, label: str) -> str:
  return f'<div class=scroll role=region tabindex=0 aria-label="table: {label}">{table}</div>'


def _card(shared: ComparedImage, picture: Image.Image | None, name: str) -> str:
  listed = cards.question_list(
    [cards.question(q.stem, q.options, q.gold, kind=q.kind) for q in shared.questions]
  )
  counts: dict[str, int] = {}
  for said in shared.said.values():
    for word in {word.casefold() for word in said.words}:
      counts[word] = counts.get(word, 0) + 1
  several = sum(said.caption is not None for said in shared.said.values()) > 1
  alone = {word for word, n in counts.items() if n == 1} if several else set()
  columns = "".join(_column(who, said, shared, alone) for who, said in shared.said.items())
  return cards.image_card(
    _element(picture, name), name, f"{listed}<div class=gallery>{columns}</div>"
  )


def _element(picture: Image.Image | None, name: str) -> str:
  """The picture as markup; words in its place where there is none."""
  if picture is None:
    return '<div class="absent soft">no picture found</div>'
  picture.thumbnail((markup.MAX_IMAGE_PIXELS, markup.MAX_IMAGE_PIXELS))
  buffer = io.BytesIO()
  picture.save(buffer, "PNG" if max(picture.size) <= _SMALL_PIXELS else "JPEG", quality=85)
  return markup.embedded(buffer.getvalue(), name)


def _column(who: str, said: GivenCaption, shared: ComparedImage, alone: set[str]) -> str:
  head = f"<h3>{markup.text(who)}</h3>"
  if said.caption is None:
    return (
      f"<section>{head}<p class=marks>{cards.FAILED}</p><p>{markup.text(said.error)}</p></section>"
    )
  words = said.caption
  caption = _highlighted(words, alone) if words.strip() else cards.caption_text(words)
  answers = "".join(
    _answer(n, question, choice)
    for n, (question, choice) in enumerate(zip(shared.questions, shared.choices.get(who, ())), 1)
  )
  length = f"{len(said.words)} words" + (
    f", {said.tokens} tokens" if said.tokens is not None else ""
  )
  cut = f" {cards.CUT}" if said.cut else ""
  return (
    f"<section>{head}<p class=text>{caption}</p><p class=marks>{answers}<span "
    f"class=soft>{length}</span>{cut}</p></section>"
  )


def _highlighted(caption: str, alone: set[str]) -> str:
  out, end = [], 0
  for match in _WORD.finditer(caption):
    if match[0].casefold() in alone:
      out += [
        markup.text(caption[end : match.start()]),
        f'<mark class="only">{markup.text(match[0])}</mark>',
      ]
      end = match.end()
  return "".join([*out, markup.text(caption[end:])])


def _answer(number: int, question: Question, choice: int | None) -> str:
  if choice is None or choice < 0:
    return cards.answer("none", "no answer", number)
  verdict = "right" if choice == question.gold else "wrong"
  return cards.answer(verdict, question.options[choice], number)
