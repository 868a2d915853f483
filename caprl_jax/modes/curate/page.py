"""A curation's funnel and questions -> a page to browse."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from caprl_jax.atomic_files import write_text
from caprl_jax.data.rows import image_bytes
from caprl_jax.pages.cards import image_card, question, question_list
from caprl_jax.pages.markup import card, embedded, page, percent, table, text

PAGE_IMAGES = 24


def write_page(
  path: pathlib.Path, name: str, figures: dict[str, Any], selected: Sequence[Any], seed: int
) -> None:
  """Writes the page. `selected`: as `run.Selected`, of which `PAGE_IMAGES` at random are
  shown.
  """
  images, questions = figures["images"], figures["questions"]
  share = percent(questions["kept"] / questions["parsed"]) if questions["parsed"] else "–"
  cards = [
    card(
      "images", f"{images['with questions kept']:,}", f"of {images['found']:,} have questions left"
    ),
    card("questions", f"{questions['kept']:,}", f"{share} of {questions['parsed']:,}"),
    card(
      "a kept image",
      f"{questions['kept'] / max(images['with questions kept'], 1):.1f}",
      "questions",
    ),
  ]
  steps = [
    ("images found", images["found"]),
    *((f"− {why}", n) for why, n in images["left out"].items()),
    ("images kept", images["kept"]),
    ("with a reply", images["with a reply"]),
  ]
  asked = [
    ("questions parsed", questions["parsed"]),
    *((f"− {why}", n) for why, n in questions["dropped"].items()),
    ("questions kept", questions["kept"]),
  ]
  failed = [[text(why), f"{n:,}"] for why, n in questions["not parsed"].items()]
  order = np.random.default_rng(seed).permutation(len(selected))[:PAGE_IMAGES]
  write_text(
    path,
    page(
      f"Curation of {name}",
      [
        f"<div class=cards>{''.join(cards)}</div>",
        f"<h2>Funnel</h2><div class=cards><div class='ladder wide'>{_bars(steps)}</div>"
        f"<div class='ladder wide'>{_bars(asked)}</div></div>",
        _grid(figures["visual/blind"]),
        "<h2>What could not be read as a question</h2>"
        + table(["reason", "pieces of text"], failed)
        if failed
        else "",
        f"<h2>{len(order)} images at random</h2><p class=soft>An outlined option is the right one. "
        "The figures are the shares of orders answered right with the image and without "
        f"it.</p><div class=samples>{''.join(_sample(selected[i]) for i in sorted(order))}</div>",
      ],
    ),
  )


def _bars(steps: Iterable[tuple[str, int]]) -> str:
  steps = list(steps)
  most = max((n for _, n in steps), default=1) or 1
  return (
    "<ul>"
    + "".join(
      f"<li><span>{text(name)}</span><span class=track><i "
      f"style='width:{100 * n / most:.1f}%'></i></span>"
      f"<b>{n:,}</b></li>"
      for name, n in steps
    )
    + "</ul>"
  )


def _grid(counts: dict[str, int]) -> str:
  """Questions by their share of right answers with the image (rows) and without it (columns)."""
  if not counts:
    return ""
  pairs = {tuple(key.split("/")): n for key, n in counts.items()}
  visual, blind = (sorted({pair[axis] for pair in pairs}) for axis in (0, 1))
  rows = [
    [f"with the image {text(v)}", *(f"{pairs.get((v, b), 0):,}" for b in blind)]
    for v in reversed(visual)
  ]
  return (
    "<h2>Answers</h2><p class=soft>Questions by the share of orders in which they were "
    "answered right, with the image and "
    "without.</p>" + table(["", *(f"without {text(b)}" for b in blind)], rows)
  )


def _sample(selected: Any) -> str:
  row = selected.row
  kept = question_list([_question(item, verdict, "") for item, verdict in selected.kept])
  dropped = question_list([_question(*item) for item in selected.dropped])
  if dropped:
    dropped = f"<p class=soft>Left out</p>{dropped}"
  content = kept + dropped or "<p class=soft>no question</p>"
  return image_card(embedded(image_bytes(row), row.name), row.name, content)


def _question(item: Any, verdict: Any, reason: str) -> str:
  why = f'<span class="answer wrong">{text(reason)}</span> ' if reason else ""
  shares = ""
  if verdict and not verdict.error:
    shares = f"<small>{verdict.visual:.2f} with, {verdict.blind:.2f} without</small> "
  return question(item.stem, item.options, item.gold, after=why + shares)
