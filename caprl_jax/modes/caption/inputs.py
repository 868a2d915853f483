"""The section `caption` -> the rows to caption, with what may stand in the way said first."""

import dataclasses
import logging
import pathlib
import tempfile
from collections.abc import Sequence

from caprl_jax.data.readers.image_folders import PassedOver
from caprl_jax.data.readers.image_sources import base_folder, list_images
from caprl_jax.data.readers.inputs.fetch import Fetcher, WebImage
from caprl_jax.data.readers.inputs.options import ListingOptions, is_address
from caprl_jax.data.rows import CaptionRow
from caprl_jax.json_files import shown
from caprl_jax.modes.caption.columns import Column
from caprl_jax.modes.caption.section import CaptionConfig
from caprl_jax.modes.caption.selection import selected
from caprl_jax.modes.caption.texts import OWN_FIELDS, check_fields, fields_of, fill

log = logging.getLogger("caprl_jax.modes.caption.inputs")

MOST_PROMPTS = 32  # that differ: each is compiled


@dataclasses.dataclass(frozen=True)
class Inputs:
  """rows: to caption; passed_over: files that are none."""

  rows: list[CaptionRow]
  passed_over: PassedOver


def own_caption_fields(column: Column) -> tuple[str, ...]:
  """The fields in which a row may have a caption for a column: the first that is there counts. A
  WebDataset has it in its member .txt.
  """
  return (column.name, "txt") if column.name == "caption" else (column.name,)


def read_inputs(
  cfg: CaptionConfig, columns: Sequence[Column], cache: pathlib.Path, *, texts: bool
) -> Inputs:
  """The rows of `caption.input` that its filter leaves.

  Args:
    cache: the folder of fetched images, where `caption.fetch` names none.
    texts: captions that are there are texts in the output's folder, not fields of rows.

  Raises:
    ValueError: as `list_images` and `selected`; a field that no row has, with those there are; all
      images on the web and `caption.allow_urls` off; too many different prompts; captions of rows,
      with `caption.existing` = refuse.
  """
  templates = {"caption.text.before": cfg.text.before, "caption.text.after": cfg.text.after}
  for column in columns:
    key = "caption.prompt" if cfg.prompts is None else f"caption.prompts.{column.name}"
    templates[key] = column.prompt
  wanted = {name for text in templates.values() for name in fields_of(text)} - set(OWN_FIELDS)
  in_rows = cfg.existing is not None and not texts
  if in_rows:
    wanted.update(name for column in columns for name in own_caption_fields(column))
  fetcher = None
  if cfg.allow_urls:
    folder = cache if cfg.fetch.cache is None else pathlib.Path(cfg.fetch.cache).expanduser()
    fetcher = Fetcher(cfg.fetch, folder)
  options = ListingOptions(cfg.column, wanted, fetcher)
  listing = list_images(cfg.input, options=options)
  rows = selected(listing.rows, cfg.filter, base_folder(cfg.input))
  _check_addresses(rows, cfg)
  check_fields(templates, list(options.seen))
  for column in columns:
    _check_prompts(rows, column)
  if in_rows and cfg.existing == "refuse":
    _refuse_captions(rows, columns)
  return Inputs(rows, listing.passed_over)


def temporary_cache() -> tempfile.TemporaryDirectory:
  """Where a dry run keeps what it fetches."""
  return tempfile.TemporaryDirectory(prefix="caprl_jax_urls_")


def own_caption(row: CaptionRow, column: Column) -> str | None:
  """The caption that a row has in its input for a column."""
  values = row.fields or {}
  found = next((values[key] for key in own_caption_fields(column) if values.get(key)), None)
  return found if isinstance(found, str) and found.strip() else None


def _check_addresses(rows: Sequence[CaptionRow], cfg: CaptionConfig) -> None:
  if cfg.allow_urls:
    return
  count = sum(is_address(row.name) and not isinstance(row.image, WebImage) for row in rows)
  what = "images are addresses on the web, and nothing is fetched unless caption.allow_urls=True"
  if count == len(rows):
    raise ValueError(f"caption.input = {shown(cfg.input)}: all {count} {what}")
  if count:
    log.warning("%d of %d %s: they will fail", count, len(rows), what)


def _check_prompts(rows: Sequence[CaptionRow], column: Column) -> None:
  """Raises ValueError where a prompt's fields make too many prompts of it."""
  if not fields_of(column.prompt):
    return
  found: set[str] = set()
  for row in rows:
    try:
      found.add(fill(column.prompt, row))
    except ValueError:
      continue  # the row fails when its turn comes
    if len(found) > MOST_PROMPTS:
      raise ValueError(
        f"the prompt {shown(column.prompt)} is another text for more than {MOST_PROMPTS} groups of "
        "images, and each is compiled; take a field with fewer values, such as {folder}, or put "
        "it into caption.text.before"
      )


def _refuse_captions(rows: Sequence[CaptionRow], columns: Sequence[Column]) -> None:
  there = [row.name for row in rows if any(own_caption(row, column) for column in columns)]
  if there:
    raise ValueError(
      f"{len(there)} of {len(rows)} rows have a caption already, such as {shown(there[0])} "
      "(caption.existing = refuse); set caption.existing to skip, overwrite, append or prepend"
    )
