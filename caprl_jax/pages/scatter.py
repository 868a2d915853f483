"""Shares in two directions -> a plot as SVG, in the colours of the page around it: one dot per
series with its intervals, and a thin path of what it is made of."""

import dataclasses
import math
from collections.abc import Sequence

from caprl_jax.pages.markup import percent, text

_WIDTH, _HEIGHT = 560, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 12, 46
_COLORS = 6  # that the page has
_TICKS = 5


@dataclasses.dataclass(frozen=True)
class Spot:
  """A place, as shares; note: a word or number beside it."""

  x: float
  y: float
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Series:
  """One captioner: where it stands, its intervals (low, high), and the places of its parts."""

  name: str
  at: Spot
  x_interval: tuple[float, float]
  y_interval: tuple[float, float]
  path: tuple[Spot, ...] = ()


def scatter(series: Sequence[Series], x_label: str, y_label: str) -> str:
  """The plot with its legend. Both axes show the shares that there are, in whole steps."""
  x_low, x_high, x_step = _range([v for one in series for v in _values(one, "x")])
  y_low, y_high, y_step = _range([v for one in series for v in _values(one, "y")])
  across = lambda x: _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
  up = lambda y: _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
  lines = []
  for value in _steps(y_low, y_high, y_step):
    lines.append(
      f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(value):.1f}" y2="{up(value):.1f}" '
      f'stroke="var(--line)"/><text x="{_LEFT - 8}" y="{up(value) + 4:.1f}" text-anchor="end">'
      f"{100 * value:.0f}%</text>"
    )
  for value in _steps(x_low, x_high, x_step):
    lines.append(
      f'<text x="{across(value):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">'
      f"{100 * value:.0f}%</text>"
    )
  lines.append(
    f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
    f'{text(x_label)}</text><text transform="translate(14,{(_TOP + _HEIGHT - _BOTTOM) / 2}) '
    f'rotate(-90)" text-anchor="middle">{text(y_label)}</text>'
  )
  lines += [_drawn(one, i, across, up) for i, one in enumerate(series)]
  said = "; ".join(f"{one.name}: {percent(one.at.x)}, {percent(one.at.y)}" for one in series)
  keys = "".join(
    '<span><svg class=dot viewBox="0 0 12 12" width=12 height=12 aria-hidden="true"><circle '
    f'cx="6" cy="6" r="5" fill="var(--series-{i % _COLORS})"/></svg> {text(one.name)}</span>'
    for i, one in enumerate(series)
  )
  return (
    f'<figure style="margin:0"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
    f'style="width:100%;max-width:{_WIDTH}px" role="img" aria-label="{text(y_label)} over '
    f'{text(x_label)}: {text(said)}" fill="var(--soft)" font-family="system-ui,sans-serif" '
    f'font-size="12">{"".join(lines)}</svg><figcaption class=legend>{keys}</figcaption></figure>'
  )


def _values(one: Series, axis: str) -> list[float]:
  spots = [getattr(spot, axis) for spot in (one.at, *one.path)]
  return [*spots, *getattr(one, f"{axis}_interval")]


def _range(values: Sequence[float]) -> tuple[float, float, float]:
  """The least and greatest share of an axis, multiples of the step between its lines."""
  low, high = min(values), max(values)
  step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 1.0) if (high - low) / s <= _TICKS)
  low = max(0.0, math.floor(low / step + 1e-9) * step)
  high = max(math.ceil(high / step - 1e-9) * step, low + step)
  return (low, high, step) if high <= 1 + 1e-9 else (1 - step, 1.0, step)


def _steps(low: float, high: float, step: float) -> list[float]:
  return [low + i * step for i in range(round((high - low) / step) + 1)]


def _drawn(one: Series, number: int, across, up) -> str:
  color = f"var(--series-{number % _COLORS})"
  x, y = across(one.at.x), up(one.at.y)
  (left, right), (bottom, top) = one.x_interval, one.y_interval
  marks = [
    f'<line x1="{across(left):.1f}" x2="{across(right):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up(bottom):.1f}" y2="{up(top):.1f}"/>'
  ]
  if one.path:
    points = " ".join(f"{across(spot.x):.1f},{up(spot.y):.1f}" for spot in one.path)
    marks.append(f'<polyline points="{points}" fill="none" opacity=".55" stroke-width="1.5"/>')
  dots = "".join(
    f'<circle cx="{across(spot.x):.1f}" cy="{up(spot.y):.1f}" r="3"/>'
    f'<text x="{across(spot.x) + 5:.1f}" y="{up(spot.y) - 5:.1f}" font-size="11">'
    f"{text(spot.note)}</text>"
    for spot in one.path
  )
  return (
    f'<g stroke="{color}" stroke-width="2" fill="{color}">{"".join(marks)}'
    f'<g stroke="none">{dots}<circle cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{text(one.name)}: '
    f"{percent(one.at.x)}, {percent(one.at.y)}</title></circle></g></g>"
  )
