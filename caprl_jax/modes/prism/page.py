"""Prism's figures and answers -> a page: dots with intervals, the table, examples with images."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from caprl_jax.atomic_files import write_text
from caprl_jax.data.readers.benchmarks.prompts import user_text
from caprl_jax.data.rows import image_bytes
from caprl_jax.modes.prism.figures import (
  BLIND,
  Evaluation,
  difference_text,
  left_out_text,
  official_text,
)
from caprl_jax.pages import cards
from caprl_jax.pages.cards import Verdict
from caprl_jax.pages.markup import card, embedded, page, percent, table, text

_PLOT = 620  # pixels of the axis from 0 to 100


def write_page(
  path: pathlib.Path,
  figures: Mapping[str, Any],
  evaluation: Evaluation,
  *,
  examples: int,
  seed: int,
) -> None:
  """Writes the page. figures: as `figures.summarise` returns them. Examples are at random, half of
  them questions on which captioners differ, where they do.
  """
  picked = _picked(evaluation, examples, seed)
  shown = "".join(_example(evaluation, benchmark, i) for benchmark, i in picked)
  write_text(
    path,
    page(
      "Prism",
      [
        _headline(figures),
        "<h2>Accuracy from captions</h2><p class=soft>Mean over questions and captions with its "
        f"{100 * figures['level']:.0f}% bootstrap interval over images; "
        "the short line is what is answered without a caption.</p>" + _dots(figures),
        _table(figures),
        _by_kind(figures),
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
      f"{one['length_tokens']:.0f} tokens per caption",
    )
    for who, one in figures["average"].items()
  ]
  return f"<div class=cards>{''.join(numbers)}</div>"


def _table(figures: Mapping[str, Any]) -> str:
  heads = [
    "benchmark",
    "captioner",
    "mean",
    "interval",
    f"best of {figures['captions']}",
    "official / best",
    "blind",
    "abstained",
    "misled",
    "CaptionQA",
    "tokens",
    "cut",
    "against the first",
  ]
  rows = []
  for name, entry in figures["benchmarks"].items():
    for who, one in entry["captioners"].items():
      versus = one.get("difference")
      rows.append(
        [
          text(name),
          text(who),
          percent(one["mean"]),
          " – ".join(map(percent, one["interval"])),
          percent(one["best"]),
          official_text(one, lambda x: "–" if x is None else percent(x)),
          percent(entry[BLIND]["ours"]) if BLIND in entry else "–",
          percent(one["abstained"]),
          percent(one["misled"]),
          percent(one["captionqa"]) if "captionqa" in one else "–",
          f"{one['length_tokens']:.1f}",
          percent(one["cut"]),
          text(difference_text(versus)) if versus else "",
        ]
      )
  left_out = [left_out_text(name, entry) for name, entry in figures["benchmarks"].items()]
  return (
    "<h2>Figures</h2><div style='overflow-x:auto;white-space:nowrap'>"
    + table(heads, rows)
    + "</div>"
    + "".join(f"<p class=soft>{text(line)}</p>" for line in left_out if line)
  )


def _by_kind(figures: Mapping[str, Any]) -> str:
  kinds = [
    [text(f"{name}, {kind}")]
    + [percent(one["kinds"][kind]) for one in entry["captioners"].values()]
    for name, entry in figures["benchmarks"].items()
    for kind in next(iter(entry["captioners"].values())).get("kinds", {})
  ]
  if not kinds:
    return ""
  return "<h2>By kind of question</h2>" + table(["", *map(text, figures["average"])], kinds)


def _dots(figures: Mapping[str, Any]) -> str:
  """A row a benchmark and captioner: interval as a bar, mean as a dot, blind accuracy as a tick."""
  lines, y = [], 22
  for name, entry in figures["benchmarks"].items():
    lines.append(f'<text x="0" y="{y}" font-weight="600">{text(name)}</text>')
    for i, (who, one) in enumerate(entry["captioners"].items()):
      y += 22
      at = lambda share: 180 + _PLOT * share
      low, high = one["interval"]
      lines.append(
        f'<text x="12" y="{y}" font-size="13">{text(who[:24])}</text>'
        f'<line x1="{at(0)}" x2="{at(1)}" y1="{y - 4}" y2="{y - 4}" stroke="var(--line)"/>'
        f'<line x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{y - 4}" y2="{y - 4}" '
        f'stroke="var(--series-{i % 3})" stroke-width="5" stroke-linecap="round" opacity=".45"/>'
        f'<circle cx="{at(one["mean"]):.1f}" cy="{y - 4}" r="5" fill="var(--series-{i % 3})"/>'
        f'<text x="{at(1) + 10}" y="{y}" font-size="13">{percent(one["mean"])}</text>'
      )
      if BLIND in entry:
        blind = at(entry[BLIND]["ours"])
        lines.append(
          f'<line x1="{blind:.1f}" x2="{blind:.1f}" y1="{y - 11}" y2="{y + 3}" '
          'stroke="var(--soft)" stroke-width="2"/>'
        )
    y += 32
  return (
    f'<svg viewBox="0 0 {180 + _PLOT + 70} {y}" style="width:100%;max-width:880px" role="img" '
    f'aria-label="accuracy by benchmark and captioner" fill="var(--ink)" '
    f'font-family="system-ui,sans-serif">'
    f"{''.join(lines)}</svg>"
  )


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
  row, scored, said = evaluation.rows[benchmark][i], evaluation.scored[benchmark], []
  for who, found in evaluation.answered[benchmark].items():
    for n, answer in enumerate(found[i]):
      verdict: Verdict = "wrong"
      if scored[who]["abstained"][i, n]:
        verdict = "none"
      elif scored[who]["ours"][i, n] >= 0.5:
        verdict = "right"
      shown = (
        answer if isinstance(answer, str) else row.options[answer] if answer >= 0 else "no answer"
      )
      caption = "no caption" if who == BLIND else evaluation.caption(benchmark, who, i, n)
      said.append(
        "<li style='grid-template-columns:minmax(58px,auto) 1fr'><span "
        f"class=who>{text(who)}</span><div><p class=text>{text(caption)}</p><p "
        f"class=marks>{cards.answer(verdict, shown[-300:])}</p></div></li>"
      )
  gold = row.gold if isinstance(row.gold, str) else " or ".join(row.gold)
  image = evaluation.images[evaluation.shown[benchmark][i]]
  return cards.image_card(
    embedded(image_bytes(image), row.name),
    f"{benchmark}: {row.name}",
    f"<p class=stem style='white-space:pre-wrap'>{text(user_text(row))}</p><p "
    f"class=soft>right: {text(gold)}</p><ul class=captions>{''.join(said)}</ul>",
  )
