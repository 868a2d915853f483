"""Metrics of a run -> curves, as SVG that takes its colours from the page around it."""

import dataclasses
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

Rows = Sequence[dict[str, Any]]  # read_metrics()

# What matplotlib draws with -> what the page fills in: the CSS below has a light and a dark value
# for each, and matplotlib itself only ever sees placeholders.
_SERIES = ["#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06"]
_INK, _GRID = "#0a0b0e", "#0a0b0f"
_VARIABLES = {color: f"var(--series-{i})" for i, color in enumerate(_SERIES)} | {
  _INK: "var(--soft)",
  _GRID: "var(--line)",
}
# One fewer than the colours, so that thirty series differ; told apart without colour too.
_DASHES = [(), (5, 1.5), (1.5, 1.2), (6, 1.5, 1.5, 1.5), (3, 1)]

# Okabe and Ito's colours (readable with any colour vision), darkened or lightened for contrast.
CSS_LIGHT = (
  "--series-0:#0063a3;--series-1:#b84a00;--series-2:#007a58;--series-3:#a8447f;"
  "--series-4:#7a6000;--series-5:#444"
)
CSS_DARK = (
  "--series-0:#63b8f2;--series-1:#ff9557;--series-2:#3ecf9f;--series-3:#eb9fca;"
  "--series-4:#e8d44d;--series-5:#ccc"
)


@dataclasses.dataclass(frozen=True)
class Panel:
  title: str
  unit: str  # of the y axis
  names: tuple[str, ...]  # metrics; one that ends in "/*" stands for all that begin so
  about: str  # a sentence for the reader who does not know the metric
  percent: bool = False
  log_if_wide: bool = False


PANELS = (
  Panel(
    "Reward",
    "mean reward",
    ("reward/mean",),
    "What the captions of a step earned on average. The one curve that must rise.",
  ),
  Panel(
    "Accuracy of the judge",
    "questions answered right",
    ("judge/accuracy", "judge/accuracy/*"),
    "From the captions of the training batch alone, overall and by kind of question.",
    percent=True,
  ),
  Panel(
    "Held-out accuracy",
    "questions answered right",
    ("eval/accuracy", "eval/accuracy/*"),
    "Greedy captions of the evaluation split, during training.",
    percent=True,
  ),
  Panel(
    "Held-out reward",
    "mean reward",
    ("eval/reward",),
    "Greedy captions of the evaluation split, during training.",
  ),
  Panel(
    "Silence and falsehood",
    "questions",
    ("judge/abstained", "judge/misled", "judge/blind"),
    "Where the judge gave no answer, where it gave a wrong one, and what it gets right from "
    "an empty caption.",
    percent=True,
  ),
  Panel(
    "Reward terms",
    "mean of the term",
    (
      "reward/accuracy",
      "reward/length",
      "reward/repetition",
      "reward/timestamps",
      "reward/truncated",
      "reward/custom",
    ),
    "Each before its weight.",
  ),
  Panel(
    "Caption length",
    "tokens per caption",
    ("rollout/length",),
    "Grows where more detail answers more questions. Growth without reward is padding.",
  ),
  Panel(
    "Entropy",
    "nats per token",
    ("update/entropy",),
    "How undecided the policy is. Near zero, siblings are alike and nothing is learned.",
  ),
  Panel(
    "Distance to the reference",
    "KL, nats per token",
    ("update/kl",),
    "How far the policy has moved. Jumps say that a step was too large.",
  ),
  Panel(
    "Sampler against update",
    "nats per token",
    ("update/logp_difference", "update/logp_difference_max"),
    "How far the sampler's log-probabilities are from the update's own: rounding, or a fault.",
    log_if_wide=True,
  ),
  Panel(
    "Gradient norm",
    "norm",
    (
      "update/grad_norm",
      "update/grad_norm_vision",
      "update/grad_norm_projector",
      "update/grad_norm_decoder",
    ),
    "Before clipping. Spikes are the first sign of trouble.",
    log_if_wide=True,
  ),
  Panel(
    "Flat groups",
    "groups",
    ("advantage/flat_groups",),
    "Groups whose captions all earned the same: they teach nothing.",
    percent=True,
  ),
)


@dataclasses.dataclass(frozen=True)
class Curve:
  """One drawn panel."""

  panel: Panel
  svg: str
  legend: tuple[tuple[str, str], ...]  # label and a short line as SVG; empty for a single series
  gaps: int  # steps at which the first of the panel's metrics was not finite


def draw_curves(rows: Rows) -> list[Curve]:
  """Draws every panel of `PANELS` that has at least one finite number."""
  curves = []
  for panel in PANELS:
    series = _series(rows, panel)
    if series:
      _, values = next(iter(series.values()))
      legend = tuple((label, _key(i)) for i, label in enumerate(series)) if len(series) > 1 else ()
      svg = _draw(panel, series, f"curve{PANELS.index(panel)}")
      curves.append(Curve(panel, svg, legend, int(np.isnan(values).sum())))
  return curves


def smooth(values: np.ndarray, span: float) -> np.ndarray:
  """Exponential mean over about `span` steps, without a bias at the start; NaN stays a gap."""
  decay = 1 - 2 / (span + 1)
  total, weight, means = 0.0, 0.0, np.full(len(values), math.nan)
  for i, value in enumerate(values):
    if not math.isnan(value):
      total, weight = decay * total + value, decay * weight + 1
      means[i] = total / weight
  return means


def _series(rows: Rows, panel: Panel) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Label -> (steps, values), NaN for null. Steps that do not report the metric are left out."""
  found = {}
  for name in panel.names:
    if name.endswith("/*"):
      prefix = name[:-1]
      matches = sorted({key for row in rows for key in row if key.startswith(prefix)})
      labels = {match: match[len(prefix) :] for match in matches}
    else:
      wildcard = any(other.endswith("/*") for other in panel.names)
      labels = {
        name: "overall" if wildcard else name.partition("/")[2] if len(panel.names) > 1 else name
      }
    for match, label in labels.items():
      pairs = [(row["step"], row[match]) for row in rows if match in row]
      steps = np.array([step for step, _ in pairs])
      values = np.array([math.nan if value is None else value for _, value in pairs], float)
      if np.isfinite(values).any():
        found[label] = (steps, values)
  return found


def _draw(panel: Panel, series: dict[str, tuple[np.ndarray, np.ndarray]], slug: str) -> str:
  import matplotlib.figure  # late, here and below: it takes half a second of each start

  # Text stays text: it takes the page's font, can be searched, and is read out.
  with matplotlib.rc_context(
    {"svg.fonttype": "none", "svg.hashsalt": slug, "font.size": 9.5, "text.parse_math": False}
  ):
    everything = np.concatenate([values for _, values in series.values()])
    wide = 0 < 50 * np.nanmin(everything) < np.nanmax(everything)
    log = panel.log_if_wide and wide
    figure = matplotlib.figure.Figure(figsize=(3.7, 2.3), layout="constrained")
    axes = figure.add_subplot()
    for i, (steps, values) in enumerate(series.values()):
      color, dashes = _SERIES[i % len(_SERIES)], _DASHES[i % len(_DASHES)]
      few = len(steps) < 8
      if not few:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
      span = max(3, len(steps) / 20)
      if few:
        drawn = values
      elif log:  # a spike must not hide the steps that follow it
        drawn = np.exp(smooth(np.log(values), span))
      else:
        drawn = smooth(values, span)
      axes.plot(
        steps,
        drawn,
        color=color,
        linestyle=(0, dashes) if dashes else "-",
        linewidth=2.2 if i == 0 else 1.5,
        marker="o" if few else "",
        markersize=4,
        zorder=3,
      )
    _style(axes, panel, log)
    buffer = io.StringIO()
    figure.savefig(
      buffer,
      format="svg",
      transparent=True,
      metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
  return _inline(buffer.getvalue(), slug, _describe(panel, series))


def _key(i: int) -> str:
  """The line of series `i` in a legend."""
  dashes = " ".join(str(2 * length) for length in _DASHES[i % len(_DASHES)])
  return (
    '<svg class="key" viewBox="0 0 28 8" aria-hidden="true"><path d="M0 4H28" '
    f'stroke="var(--series-{i % len(_SERIES)})" stroke-width="{3 if i == 0 else 2.4}" '
    f'stroke-dasharray="{dashes}"/></svg>'
  )


def _style(axes, panel: Panel, log: bool) -> None:
  import matplotlib.ticker

  axes.set_xlabel("step", color=_INK)
  axes.set_ylabel(panel.unit + (", log scale" if log else ""), color=_INK)
  axes.grid(axis="y", color=_GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(colors=_INK, length=0, which="both")
  axes.spines[["top", "right", "left"]].set_visible(False)
  axes.spines["bottom"].set_color(_GRID)
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
  if log:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  if panel.percent:
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=None))


def _describe(panel: Panel, series: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
  """What a screen reader says instead of the picture."""
  parts = []
  for label, (steps, values) in series.items():
    finite = np.flatnonzero(np.isfinite(values))
    first, last = finite[0], finite[-1]
    parts.append(
      f"{label} {values[first]:.3g} at step {steps[first]}, "
      f"{values[last]:.3g} at step {steps[last]}"
    )
  return f"{panel.title}, {panel.unit}: " + "; ".join(parts)


def _inline(svg: str, slug: str, description: str) -> str:
  """A file's SVG -> an element for a page: no prologue, own ids, the page's fonts and colours."""
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
  head, body = svg.split(">", 1)
  svg = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + body
  svg = re.sub(r'\bid="', f'id="{slug}-', svg)
  svg = re.sub(r'href="#', f'href="#{slug}-', svg)
  svg = re.sub(r"url\(#", f"url(#{slug}-", svg)
  svg = re.sub(r"(font(?:-family)?: [^;\"]*?)'[^\";]*sans-serif[^;\"]*", r"\1inherit", svg)
  for color, variable in _VARIABLES.items():
    svg = svg.replace(color, variable)
  label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
  return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()
