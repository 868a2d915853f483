"""Prism's figures -> the plots and tables of its page."""

from collections.abc import Mapping
from typing import Any

from caprl_jax.modes.prism.evaluation import BLIND
from caprl_jax.modes.prism.table import difference_text, left_out_text, official_text, per_100_words
from caprl_jax.pages.markup import percent, show, table, text
from caprl_jax.pages.scatter import Series, Spot, scatter

STYLE = """<style>
.figures{overflow-x:auto}.figures :is(th,td){white-space:nowrap}
</style>"""
_PLOT = 620  # pixels of the axis from 0 to 100
_SAID = {
  "judged": (
    "Right and wrong answers",
    "questions answered wrong",
    "questions answered right",
    "Where the judge gave no answer, a question counts for neither.",
  ),
  "facts": (
    "Facts and false statements",
    "captions with a false statement",
    "known facts told",
    "By the words of the captions, as far as the data know what is true of an image.",
  ),
}


def dots(figures: Mapping[str, Any]) -> str:
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
        f'stroke="var(--series-{i % 6})" stroke-width="5" stroke-linecap="round" opacity=".45"/>'
        f'<circle cx="{at(one["mean"]):.1f}" cy="{y - 4}" r="5" fill="var(--series-{i % 6})"/>'
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


def plots(figures: Mapping[str, Any]) -> str:
  """What captions tell against what they say falsely: captioners, and captions of like length."""
  drawn = []
  for name, entry in figures["benchmarks"].items():
    for key, (title, x_label, y_label, about) in _SAID.items():
      series = [
        Series(
          who,
          Spot(one[key]["false"], one[key]["told"]),
          tuple(one[key]["false_interval"]),
          tuple(one[key]["told_interval"]),
          tuple(
            Spot(part["false"], part["told"], f"{part['words']:.0f}")
            for part in one[key]["by_length"]
          ),
        )
        for who, one in entry["captioners"].items()
        if key in one
      ]
      if series:
        drawn.append(
          f"<section><h3>{text(name)}: {title}</h3><p class=soft>{about}</p>"
          f"{scatter(series, x_label, y_label)}</section>"
        )
  return (
    "<h2>What is told, and what is said falsely</h2><p class=soft>Better is further up and further "
    "left. Fewer false statements with fewer facts are no gain. The thin line joins captions of "
    "like length, short to long; the numbers are their words.</p>"
    "<div style='display:grid;gap:24px;"
    "grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr))'>"
    + "".join(drawn)
    + "</div>"
  )


def tables(figures: Mapping[str, Any]) -> list[str]:
  """Accuracy; what captions tell and how long they are; kinds of questions."""
  left_out = [left_out_text(name, entry) for name, entry in figures["benchmarks"].items()]
  notes = "".join(f"<p class=soft>{text(line)}</p>" for line in left_out if line)
  told = (
    "Gain: right answers beyond those without a caption, in points per 100 words of caption, with "
    "its interval. Facts told and false captions: by the data's known facts."
  )
  return [
    "<h2>Figures</h2>" + _scrolling(_accuracy(figures), "accuracy") + notes,
    f"<h2>Silence, falsehood and length</h2><p class=soft>{told}</p>"
    + _scrolling(_lengths(figures), "silence, falsehood and length"),
    _differences(figures),
    _by_kind(figures, "kinds", "By kind of question"),
    _by_kind(figures, "captionqa_kinds", "CaptionQA's score by category"),
  ]


def _scrolling(markup: str, label: str) -> str:
  """A table whose numbers stay whole: on a narrow screen it scrolls."""
  return f'<div class=figures role=region tabindex=0 aria-label="table: {label}">{markup}</div>'


def _interval(values) -> str:
  return " – ".join(map(percent, values))


def _accuracy(figures: Mapping[str, Any]) -> str:
  heads = ["benchmark", "captioner", "mean", "interval", f"best of {figures['captions']}"]
  heads += ["official / best", "blind", "CaptionQA", "against the first"]
  share = lambda value: "–" if value is None else percent(value)
  return table(
    heads,
    [
      [
        text(name),
        text(who),
        percent(one["mean"]),
        _interval(one["interval"]),
        percent(one["best"]),
        official_text(one, share),
        share(entry.get(BLIND, {}).get("ours")),
        share(one.get("captionqa")),
        text(difference_text(one["difference"])) if "difference" in one else "",
      ]
      for name, entry in figures["benchmarks"].items()
      for who, one in entry["captioners"].items()
    ],
  )


def _lengths(figures: Mapping[str, Any]) -> str:
  heads = ["benchmark", "captioner", "abstained", "misled", "facts told", "false captions"]
  heads += ["words", "tokens", "cut", "gain", "interval"]
  points = lambda value: "–" if value is None else f"{100 * value:+.1f}"
  rows = []
  for name, entry in figures["benchmarks"].items():
    for who, one in entry["captioners"].items():
      facts, gain = one.get("facts", {}), per_100_words(one)
      rows.append(
        [
          text(name),
          text(who),
          percent(one["abstained"]),
          percent(one["misled"]),
          show(facts.get("told"), "percent"),
          show(facts.get("false"), "percent"),
          f"{one['length_words']:.1f}",
          f"{one['length_tokens']:.1f}",
          percent(one["cut"]),
          points(gain.get("value")),
          " – ".join(map(points, gain.get("interval", []))),
        ]
      )
  return table(heads, rows)


_NAMED = {
  "abstained": "abstained",
  "misled": "misled",
  "captionqa": "CaptionQA",
  "official": "official",
  "facts_told": "facts told",
  "facts_false": "false captions",
}


def _differences(figures: Mapping[str, Any]) -> str:
  """Every other figure against the first captioner, paired over images."""
  rows = [
    [text(f"{name}: {who}"), _NAMED[key], text(difference_text(versus))]
    for name, entry in figures["benchmarks"].items()
    for who, one in entry["captioners"].items()
    for key, versus in one.get("differences", {}).items()
    if key in _NAMED
  ]
  if not rows:
    return ""
  return (
    "<h2>Against the first captioner</h2><p class=soft>Differences in points with their intervals, "
    "paired over images, and how likely chance makes one as large.</p>"
    + _scrolling(table(["", "figure", "difference"], rows), "differences")
  )


def _by_kind(figures: Mapping[str, Any], key: str, title: str) -> str:
  kinds = [
    [text(f"{name}, {kind}")] + [percent(one[key][kind]) for one in entry["captioners"].values()]
    for name, entry in figures["benchmarks"].items()
    for kind in next(iter(entry["captioners"].values())).get(key, {})
  ]
  if not kinds:
    return ""
  heads = ["", *map(text, figures["average"])]
  return f"<h2>{title}</h2>" + _scrolling(table(heads, kinds), title)
