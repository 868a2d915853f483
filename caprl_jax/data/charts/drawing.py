"""What a chart shows -> its PNG, drawn by matplotlib when it is read.

Figures are made without pyplot and every setting is an explicit argument, so that threads may draw
at the same time and nothing depends on rcParams that others may change.
"""

import dataclasses
import decimal
import io
import textwrap

from matplotlib import ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Below this width or height no text is readable: charts are plain (colours only) there.
PLAIN_BELOW = (320, 240)

PALETTES = (
  {
    "blue": "#1f77b4",
    "orange": "#ff7f0e",
    "green": "#2ca02c",
    "red": "#d62728",
    "purple": "#9467bd",
    "brown": "#8c564b",
    "pink": "#f178c8",
    "gray": "#7f7f7f",
    "black": "#000000",
    "yellow": "#e8c400",
  },
  {
    "blue": "#2443c4",
    "orange": "#f39c2c",
    "green": "#3c7a3c",
    "red": "#e8413a",
    "purple": "#6a3d9a",
    "brown": "#7a4a1e",
    "pink": "#ff9ecb",
    "gray": "#9a9a9a",
    "black": "#222222",
    "yellow": "#f5d60a",
  },
)
PLAIN_COLORS = {
  "red": "#e00000",
  "blue": "#0030ff",
  "green": "#00a000",
  "orange": "#ff9000",
  "purple": "#9000b0",
  "black": "#000000",
}

_DPI = 128  # a power of two: pixels / _DPI * _DPI is exact, so no pixel is lost to rounding
_CHARACTER = 0.62  # a character's mean width in ems, rather too wide than too narrow


@dataclasses.dataclass(frozen=True)
class Mark:
  """A bar, a slice, a line or a group of points, in one colour.

  A bar and a slice have one `y` and no `x`; a line's `x` are names, a group's are numbers. `labels`
  are the texts at the points, "" for none.
  """

  name: str
  color: str
  y: tuple[decimal.Decimal, ...]
  labels: tuple[str, ...]
  x: tuple[str, ...] | tuple[decimal.Decimal, ...] = ()


@dataclasses.dataclass(frozen=True)
class Chart:
  """What a chart shows. `kind` is bar, line, scatter or pie; `plain` leaves all text out.

  `x_label` names what the bars or lines stand along (a pie: what its slices are), `y_label` their
  values with the unit. A `horizontal` bar chart has them on the other axis.
  """

  kind: str
  title: str
  x_label: str
  y_label: str
  marks: tuple[Mark, ...]
  horizontal: bool = False
  legend: bool = False
  plain: bool = False


@dataclasses.dataclass(frozen=True)
class Look:
  """What does not change what a chart says. Sizes are pixels of a chart 448 wide."""

  palette: int = 0
  text: int = 12
  serif: bool = False
  grid: bool = True
  frame: bool = False
  legend_right: bool = True
  marker: str = "o"
  width: float = 0.7  # of a bar, as a share of its slot
  start: int = 90  # angle of a pie's first slice


@dataclasses.dataclass(frozen=True)
class ChartImage:
  """A chart that is drawn when it is read (a `rows.StoredImage`); the same bytes each time."""

  where: str
  chart: Chart
  look: Look
  pixels: tuple[int, int]  # width, height

  def read(self) -> bytes:
    """The chart as PNG."""
    file = io.BytesIO()
    # Without metadata: matplotlib would write its version.
    FigureCanvasAgg(draw(self.chart, self.look, self.pixels)).print_png(
      file, metadata={"Software": None}
    )
    return file.getvalue()


def text_pixels(look: Look, pixels: tuple[int, int]) -> float:
  """The height of the small text; titles are a quarter larger."""
  return max(10.0, look.text * min(pixels[0] / 448, pixels[1] / 336))


def wrapped(names: list[str], look: Look, pixels: tuple[int, int]) -> list[str] | None:
  """The names broken to stand side by side under a chart's marks, or None when they are too long
  for that.
  """
  slot = (pixels[0] * 0.82) / len(names) / (_CHARACTER * text_pixels(look, pixels))  # in characters
  if max(len(word) for name in names for word in name.split()) > slot - 0.5:
    return None
  lines = [textwrap.fill(name, max(1, int(slot - 0.5)), break_long_words=False) for name in names]
  return lines if max(line.count("\n") for line in lines) < 3 else None


def lines_fit(marks: tuple[Mark, ...], look: Look, pixels: tuple[int, int]) -> bool:
  """Whether the names under lines, and the numbers at the points of a single one, stand clear of
  each other.
  """
  labels = marks[0].x + (marks[0].labels if len(marks) == 1 else ())
  widest = max(map(len, labels)) * _CHARACTER * text_pixels(look, pixels)
  inner = _inner(marks, look, pixels) - (2 * _beside(marks, look, pixels) if len(marks) > 1 else 0)
  return (widest + 6) * len(marks[0].x) < inner


def _inner(marks: tuple[Mark, ...], look: Look, pixels: tuple[int, int]) -> float:
  """About the width that remains inside the axes of a line chart."""
  text = text_pixels(look, pixels)
  legend = (
    (max(len(mark.name) for mark in marks) * _CHARACTER + 4) * text
    if _legend_right(marks, look, pixels)
    else 0
  )
  return pixels[0] - 5.5 * text - (legend if len(marks) > 1 else 0)


def _beside(marks: tuple[Mark, ...], look: Look, pixels: tuple[int, int]) -> float:
  """What the labels at the ends of lines need beyond them, in pixels."""
  widest = (
    max(len(label) for mark in marks for label in mark.labels)
    * _CHARACTER
    * text_pixels(look, pixels)
  )
  return widest + 12 if len(marks) > 1 else widest / 2 + 8


def _legend_right(marks: tuple[Mark, ...], look: Look, pixels: tuple[int, int]) -> bool:
  """As the look says, unless the names are too long for one row below."""
  row = sum(len(mark.name) * _CHARACTER + 5 for mark in marks) * text_pixels(look, pixels)
  return look.legend_right or row > pixels[0]


def draw(chart: Chart, look: Look, pixels: tuple[int, int]) -> Figure:
  """The chart as a figure of `pixels` (width, height)."""
  figure = Figure(
    figsize=(pixels[0] / _DPI, pixels[1] / _DPI),
    dpi=_DPI,
    facecolor="white",
    layout=None if chart.plain else "constrained",
  )
  if chart.plain:
    axes = figure.add_axes((0.05, 0.05, 0.9, 0.9))
    axes.set(xticks=[], yticks=[])
  else:
    axes = figure.add_subplot()
    small = _points(text_pixels(look, pixels))
    _titles(figure, axes, chart, look, pixels)
    axes.tick_params(labelsize=small, labelfontfamily=_family(look), length=_points(3))
  for side in ("top", "right"):
    axes.spines[side].set_visible(look.frame and not chart.plain)
  {"bar": _bars, "line": _lines, "scatter": _scatter, "pie": _pie}[chart.kind](
    axes, chart, look, pixels
  )
  if chart.legend and not chart.plain:
    _legend(figure, axes, chart, look, pixels)
  return figure


def _points(pixels: float) -> float:
  """matplotlib's unit of lengths."""
  return pixels * 72 / _DPI


def _family(look: Look) -> str:
  return "DejaVu Serif" if look.serif else "DejaVu Sans"  # the fonts that matplotlib brings along


def _font(look: Look, pixels: tuple[int, int], scale: float = 1.0) -> dict:
  return {"fontsize": _points(text_pixels(look, pixels) * scale), "fontfamily": _family(look)}


def _color(mark: Mark, chart: Chart, look: Look) -> str:
  return (PLAIN_COLORS if chart.plain else PALETTES[look.palette])[mark.color]


def _titles(figure, axes, chart: Chart, look: Look, pixels: tuple[int, int]) -> None:
  font = _font(look, pixels, 1.25)
  line = int(pixels[0] * 0.96 / (_CHARACTER * text_pixels(look, pixels) * 1.25))
  figure.suptitle(_balanced(chart.title, line), **font)
  x, y = (chart.y_label, chart.x_label) if chart.horizontal else (chart.x_label, chart.y_label)
  if chart.kind == "pie":
    x, y = chart.y_label, ""
  axes.set_xlabel(x, **_font(look, pixels))
  # A long label would leave the figure at top and bottom.
  line = int(pixels[1] * 0.62 / (_CHARACTER * text_pixels(look, pixels)))
  axes.set_ylabel(_balanced(y, line), **_font(look, pixels))


def _balanced(text: str, most: int) -> str:
  """The text in as few lines of at most `most` characters as it needs, about equally long."""
  lines = len(textwrap.wrap(text, most))
  for width in range(max(len(text) // max(lines, 1), 1), most):
    if len(textwrap.wrap(text, width)) == lines:
      return textwrap.fill(text, width)
  return textwrap.fill(text, most)


def _value_axis(axes, name: str, chart: Chart, look: Look) -> None:
  """Few ticks in plain numbers; a grid line at each."""
  axis = axes.xaxis if name == "x" else axes.yaxis
  if chart.plain:
    return
  axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
  axis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
  if look.grid:
    axes.grid(axis=name, color="#d8d8d8", linewidth=_points(1))
    axes.set_axisbelow(True)


def _bars(axes, chart: Chart, look: Look, pixels: tuple[int, int]) -> None:
  values = [float(mark.y[0]) for mark in chart.marks]
  colors = [_color(mark, chart, look) for mark in chart.marks]
  places = range(len(values))
  bars = (axes.barh if chart.horizontal else axes.bar)(places, values, look.width, color=colors)
  value_axis, name_axis = "xy" if chart.horizontal else "yx"
  _value_axis(axes, value_axis, chart, look)
  if chart.horizontal:
    axes.invert_yaxis()  # the first bar at the top
  if chart.plain:
    return
  longest = max(len(mark.labels[0]) for mark in chart.marks)
  # Room for the labels beyond the longest bar.
  room = (
    longest * _CHARACTER * text_pixels(look, pixels) / (pixels[0] * 0.6)
    if chart.horizontal
    else 0.1
  )
  axes.set(**{f"{value_axis}lim": (0, max(values) * (1.04 + room))})
  axes.bar_label(
    bars, [mark.labels[0] for mark in chart.marks], padding=_points(3), **_font(look, pixels)
  )
  names = [mark.name for mark in chart.marks]
  axes.set(**{f"{name_axis}ticks": places})
  axes.set(
    **{
      f"{name_axis}ticklabels": names if chart.horizontal else wrapped(names, look, pixels) or names
    }
  )


def _lines(axes, chart: Chart, look: Look, pixels: tuple[int, int]) -> None:
  names = chart.marks[0].x
  for mark in chart.marks:
    y = [float(value) for value in mark.y]
    axes.plot(
      range(len(y)),
      y,
      color=_color(mark, chart, look),
      linewidth=_points(2),
      marker=None if chart.plain else look.marker,
      markersize=_points(5),
    )
    for i, label in enumerate(mark.labels):
      if label and not chart.plain:
        _line_label(axes, i, y, label, look, pixels, ends_only=len(chart.marks) > 1)
  _value_axis(axes, "y", chart, look)
  axes.margins(y=0.08 if chart.plain else 0.16)
  if chart.plain:
    return
  steps = len(names) - 1
  beside = _beside(chart.marks, look, pixels)
  room = beside * steps / (_inner(chart.marks, look, pixels) - 2 * beside)
  axes.set_xlim(-room, steps + room)
  axes.set_xticks(range(len(names)), names)


def _line_label(
  axes, i: int, y: list[float], label: str, look: Look, pixels: tuple[int, int], ends_only: bool
) -> None:
  """Beside the ends of several lines; over or under the points of one, on the side that the line
  leaves free.
  """
  gap = _points(5)
  if ends_only:
    offset, across, up = (-gap if i == 0 else gap, 0), "right" if i == 0 else "left", "center"
  else:
    before, after = y[max(i - 1, 0)], y[min(i + 1, len(y) - 1)]
    neighbours = [y[j] for j in (i - 1, i + 1) if 0 <= j < len(y)]
    above = y[i] >= sum(neighbours) / len(neighbours)
    # A line that passes through from lower left to upper right leaves upper left and lower right
    # free.
    rising, passing = after > before, min(before, after) < y[i] < max(before, after)
    aside = 0.3 * len(label) * _CHARACTER * _points(text_pixels(look, pixels)) * passing
    offset = (-aside if rising == above else aside, gap if above else -gap)
    across, up = "center", "bottom" if above else "top"
  axes.annotate(
    label, (i, y[i]), offset, textcoords="offset points", ha=across, va=up, **_font(look, pixels)
  )


def _scatter(axes, chart: Chart, look: Look, pixels: tuple[int, int]) -> None:
  size = _points(6 if chart.plain else 7) ** 2
  for mark in chart.marks:
    x, y = [float(value) for value in mark.x], [float(value) for value in mark.y]
    axes.scatter(
      x, y, size, color=_color(mark, chart, look), marker="o" if chart.plain else look.marker
    )
    for i, label in enumerate(mark.labels):
      if label and not chart.plain:
        highest = y[i] == max(float(value) for other in chart.marks for value in other.y)
        axes.annotate(
          label,
          (x[i], y[i]),
          (0, _points(6) * (1 if highest else -1)),
          textcoords="offset points",
          ha="center",
          va="bottom" if highest else "top",
          **_font(look, pixels),
        )
  _value_axis(axes, "y", chart, look)
  _value_axis(axes, "x", chart, look)
  axes.margins(x=0.1, y=0.08 if chart.plain else 0.16)


def _pie(axes, chart: Chart, look: Look, pixels: tuple[int, int]) -> None:
  labels = None
  if not chart.plain:
    labels = [
      mark.labels[0] if chart.legend else f"{mark.name}\n{mark.labels[0]}" for mark in chart.marks
    ]
  axes.pie(
    [float(mark.y[0]) for mark in chart.marks],
    labels=labels,
    startangle=look.start,
    labeldistance=1.12,
    radius=1.2 if chart.plain else 1.0,
    counterclock=False,
    colors=[_color(m, chart, look) for m in chart.marks],
    wedgeprops={"edgecolor": "white", "linewidth": _points(1)},
    textprops=None if chart.plain else _font(look, pixels),
  )


def _legend(figure, axes, chart: Chart, look: Look, pixels: tuple[int, int]) -> None:
  """Beside or below the axes, never over the data."""
  if chart.kind == "line":
    handles = axes.lines
  else:
    handles = axes.patches if chart.kind == "pie" else axes.collections
  names = [mark.name for mark in chart.marks]
  text = text_pixels(look, pixels)
  right = _legend_right(chart.marks, look, pixels)
  font = {"size": _points(text), "family": _family(look)}
  figure.legend(
    handles,
    names,
    loc="outside right center" if right else "outside lower center",
    ncols=1 if right else len(names),
    prop=font,
    frameon=look.frame,
    handlelength=1.2,
  )
