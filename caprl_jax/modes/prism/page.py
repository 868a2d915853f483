"""Prism's figures and answers -> a page: dots with intervals, facts against falsehood, tables,
examples with images.
"""

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from caprl_jax.atomic_files import write_text
from caprl_jax.data.readers.benchmarks.prompts import user_text
from caprl_jax.data.rows import image_bytes
from caprl_jax.modes.prism.evaluation import BLIND, Evaluation
from caprl_jax.modes.prism.page_figures import STYLE, dots, plots, tables
from caprl_jax.pages import cards
from caprl_jax.pages.cards import Verdict
from caprl_jax.pages.markup import card, embedded, page, percent, text


def write_page(
  path: pathlib.Path,
  figures: Mapping[str, Any],
  evaluation: Evaluation,
  *,
  examples: int,
  seed: int,
  gallery: str | None = None,
) -> None:
  """Writes the page. figures: as `figures.summarise` returns them. Examples are at random, half of
  them questions on which captioners differ, where they do. gallery: the file of a second page.
  """
  picked = _picked(evaluation, examples, seed)
  shown = "".join(_example(evaluation, benchmark, i) for benchmark, i in picked)
  beside = (
    f'<p><a href="{text(gallery)}">What the captioners wrote, side by side</a></p>'
    if gallery
    else ""
  )
  write_text(
    path,
    page(
      "Prism",
      [
        STYLE + _headline(figures) + beside,
        "<h2>Accuracy from captions</h2><p class=soft>Mean over questions and captions with its "
        f"{100 * figures['level']:.0f}% bootstrap interval over images; "
        "the short line is what is answered without a caption.</p>" + dots(figures),
        plots(figures),
        *tables(figures),
        f"<h2>{len(picked)} questions</h2><div class=samples>{shown}</div>",
      ],
    ),
  )


def _headline(figures: Mapping[str, Any]) -> str:
  numbers = [
    card(
      text(who),
      percent(one["mean"]),
      f"best of {figures['captions']}: {percent(one['best'])}; "
      f"{one['length_words']:.0f} words, {one['length_tokens']:.0f} tokens per caption",
    )
    for who, one in figures["average"].items()
  ]
  return f"<div class=cards>{''.join(numbers)}</div>"


def _picked(evaluation: Evaluation, examples: int, seed: int) -> list[tuple[str, int]]:
  scored, rows_of = evaluation.scored, evaluation.rows
  rng = np.random.default_rng(seed)
  every = [(name, i) for name, rows in rows_of.items() for i in range(len(rows))]
  differing = []
  for name in rows_of:
    means = [scores["ours"].mean(1) for who, scores in scored[name].items() if who != BLIND]
    differing += [(name, int(i)) for i in np.flatnonzero(np.ptp(np.array(means), axis=0) >= 0.5)]
  take = lambda pool, count: [pool[i] for i in rng.permutation(len(pool))[:count]]
  chosen = take(differing, examples // 2)
  return chosen + take([item for item in every if item not in set(chosen)], examples - len(chosen))


def _example(evaluation: Evaluation, benchmark: str, i: int) -> str:
  row, said = evaluation.rows[benchmark][i], []
  for who in evaluation.answered[benchmark]:
    for (caption, answer, verdict), times in _said(evaluation, benchmark, who, i).items():
      several = f" <span class=soft>×{times}</span>" if times > 1 else ""
      said.append(
        "<li style='grid-template-columns:minmax(58px,auto) 1fr'><span "
        f"class=who>{text(who)}{several}</span><div><p class=text>{text(caption)}</p><p "
        f"class=marks>{cards.answer(verdict, answer[-300:])}</p></div></li>"
      )
  gold = row.gold if isinstance(row.gold, str) else " or ".join(row.gold)
  image = evaluation.images[evaluation.shown[benchmark][i]]
  return cards.image_card(
    embedded(image_bytes(image), row.name),
    f"{benchmark}: {row.name}",
    f"<p class=stem style='white-space:pre-wrap'>{text(user_text(row))}</p><p "
    f"class=soft>right: {text(gold)}</p><ul class=captions>{''.join(said)}</ul>",
  )


def _said(
  evaluation: Evaluation, benchmark: str, who: str, i: int
) -> Mapping[tuple[str, str, Verdict], int]:
  """The captions of a question's image with what was answered from them and how it counts, each
  once with its number."""
  row, scored = evaluation.rows[benchmark][i], evaluation.scored[benchmark][who]
  found: collections.Counter[tuple[str, str, Verdict]] = collections.Counter()
  for n, answer in enumerate(evaluation.answered[benchmark][who][i]):
    verdict: Verdict = "wrong"
    if scored["abstained"][i, n]:
      verdict = "none"
    elif scored["ours"][i, n] >= 0.5:
      verdict = "right"
    shown = (
      answer if isinstance(answer, str) else row.options[answer] if answer >= 0 else "no answer"
    )
    caption = "no caption" if who == BLIND else evaluation.caption(benchmark, who, i, n)
    found[caption, shown, verdict] += 1
  return found
