"""Statistics of captioned images -> a page of samples to browse."""

import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from caprl_jax.data.rows import CaptionRow, read_image
from caprl_jax.harness.row_shards import RowResult
from caprl_jax.modes.caption.columns import Column, Written, written
from caprl_jax.modes.caption.statistics import Statistics
from caprl_jax.pages import cards, markup


def samples_page(name: str, statistics: Statistics, settings: dict[str, Any]) -> str:
  """The page: figures, then samples with their pictures. It needs no network and runs no script."""
  figures = statistics.figures()
  shown: set[int] = set()  # a row stands once: where it is most telling
  groups = []
  for title, about, found in (
    ("Failed", "No caption, and why.", statistics.failures.rows()),
    (
      "Cut",
      f"At the limit of {settings['max_tokens']} tokens, before the caption had ended.",
      statistics.cuts.rows(),
    ),
    ("Longest", "", statistics.longest.rows()),
    ("Shortest", "", statistics.shortest.rows()),
    ("Random", "", statistics.random.rows()),
  ):
    found = [item for item in found if item.number not in shown]
    shown.update(item.number for item in found)
    groups.append((title, about, found))
  groups.insert(0, groups.pop())  # what is typical comes first
  return markup.page(
    name,
    [
      _headline(figures),
      _tables(figures),
      *(_samples(*group, statistics.columns) for group in groups if group[2]),
      _settings(settings),
    ],
  )


def _headline(figures: dict[str, Any]) -> str:
  tokens = figures["caption_tokens"] or {}
  numbers = [
    markup.card(
      "Images captioned", markup.show(figures["captioned"]), f"of {figures['images']:,}", "wide"
    ),
    markup.card("Caption length", markup.show(tokens.get("mean"), "tenths"), "tokens, mean"),
    markup.card("Cut", markup.show(figures["cut_share"], "percent"), "at the token limit"),
    markup.card("Images per second", markup.show(figures["images_per_sec"], "tenths"), "all hosts"),
    markup.card(
      "Distinct captions",
      markup.show(figures["distinct_captions"]),
      f"{markup.show(figures['repeat_share'], 'percent')} repeat another",
    ),
    markup.card(
      "Failed",
      markup.show(figures["failed"]),
      "mostly: " + markup.text(next(iter(figures["failed_by_reason"])))
      if figures["failed"]
      else "none",
    ),
    markup.card(
      "Loops", markup.show(figures["loop_share"], "percent"), "of captions repeat a run of tokens"
    ),
  ]
  return f"<section><div class=cards>{''.join(numbers)}</div></section>"


def _tables(figures: dict[str, Any]) -> str:
  tables = []
  if figures["caption_tokens"]:
    tables.append(
      markup.table(
        ["tokens per caption", ""],
        [
          [label, markup.show(figures["caption_tokens"][key])]
          for label, key in (
            ("5% have at most", "p5"),
            ("half have at most", "p50"),
            ("95% have at most", "p95"),
            ("longest", "max"),
          )
        ],
      )
    )
  if figures["images_by_bucket"]:
    tables.append(
      markup.table(
        ["patches x image tokens", "images"],
        [
          [markup.text(bucket.replace("x", " x ")), markup.show(count)]
          for bucket, count in figures["images_by_bucket"].items()
        ],
      )
    )
  if figures["failed_by_reason"]:
    tables.append(
      markup.table(
        ["failed", "images"],
        [
          [markup.text(reason), markup.show(count)]
          for reason, count in figures["failed_by_reason"].items()
        ],
      )
    )
  if figures["passed_over"]["files"]:
    tables.append(
      markup.table(
        ["passed over", "files"],
        [
          [markup.text(reason), markup.show(count)]
          for reason, count in figures["passed_over"]["by_reason"].items()
        ],
      )
    )
  return (
    f"<section><h2>In numbers</h2><div class=side>{''.join(tables)}</div></section>"
    if tables
    else ""
  )


def _samples(
  title: str, about: str, found: Iterable[RowResult[CaptionRow]], columns: Sequence[Column]
) -> str:
  listed = "".join(_sample(item, columns) for item in found)
  about = f"<p class=soft>{about}</p>" if about else ""
  return (
    f"<section><h2>{title}</h2>{about}"
    '<div class=samples style="grid-template-columns:'
    'repeat(auto-fill,minmax(min(500px,100%),1fr))">'
    f"{listed}</div></section>"
  )


def _sample(item: RowResult[CaptionRow], columns: Sequence[Column]) -> str:
  row = item.row
  if "error" in row:
    words = f"<p class=marks>{cards.FAILED}</p><p>{markup.text(row['error'])}</p>"
  else:
    words = "".join(_caption(one, len(columns) > 1) for one in written(row, columns))
  return cards.image_card(_picture(item.source), row["image"], words)


def _caption(one: Written, named: bool) -> str:
  name = f"<span class=soft>{markup.text(one.column.name)}:</span> " if named else ""
  cut = f" {cards.CUT}" if one.finish == "length" else ""
  return (
    f"<p class=text>{name}{cards.caption_text(one.text)}</p><p class=marks><span class=soft>"
    f"{len(one.tokens)} tokens</span>{cut}</p>"
  )


def _picture(source: CaptionRow) -> str:
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "picture.png"
    try:
      image = read_image(source)
    except ValueError:
      return '<div class="absent soft">no picture can be shown</div>'
    image.thumbnail((markup.MAX_IMAGE_PIXELS, markup.MAX_IMAGE_PIXELS))
    image.save(path)
    return markup.picture(path, source.name)


def _settings(settings: dict[str, Any]) -> str:
  rows = [[markup.text(key), markup.text(value)] for key, value in settings.items()]
  return (
    "<section><h2>Settings</h2><details><summary>Show</summary>"
    f"{markup.table(['', ''], rows)}</details></section>"
  )
