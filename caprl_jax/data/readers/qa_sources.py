"""Name of a dataset -> rows. `SOURCES` lists what a name may be."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from caprl_jax import hub_datasets
from caprl_jax.data import json_rows
from caprl_jax.data import rows as rows_lib
from caprl_jax.data.readers import caprl_json, caprl_parquet, jsonl
from caprl_jax.data.readers.easy_vqa import read_easy_vqa
from caprl_jax.data.readers.image_sources import list_images
from caprl_jax.json_files import shown
from caprl_jax.progress import going_on

SOURCES = """  easy_vqa:train, easy_vqa:test    the package easy-vqa
  charts:train, charts:test        charts drawn from the package vega_datasets;
                                   charts:train:5000 says how many, charts:train:5000:96x72
                                   how large (small ones have no text)
  FILE.jsonl, FILE.json            rows of our own (docs: data/readers/jsonl.py) or of CapRL's
                                   first release, in lines or a list
  FILE.parquet, a folder, "*"      CapRL-QA-75K's layout
  hf:OWNER/NAME:SPLIT              a dataset of such parquet files on the Hugging Face hub;
                                   hf:OWNER/NAME is its only split, or train, and @REVISION
                                   may follow the name
  tfds:FOLDER:SPLIT                a TFDS dataset in ArrayRecord (mode dataset writes one)
  0.7*SOURCE + 0.3*SOURCE          a mixture, by weight; without weights, every row alike"""

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip")
RELEASED_KEYS = {"message", "image_path", "qa_list"}  # of a row of CapRL's first release


@dataclasses.dataclass(frozen=True)
class Part:
  """One source of a mixture. weight: its share of what is drawn, None where no source has one."""

  source: str
  weight: float | None = None


def parse_mixture(text: str) -> tuple[Part, ...]:
  """The sources joined by " + ", each with an optional "weight*" before it.

  Raises ValueError for weights that are not positive, or that only some sources have.
  """
  parts = []
  for piece in re.split(r"\s\+\s", text):
    match = re.fullmatch(r"\s*(?:([0-9.eE+-]+)\s*\*(?!\.))?\s*(\S.*?)\s*", piece)
    if not match:
      raise ValueError(f"data source {shown(text)}: a source between two '+' is empty")
    weight, source = match.groups()
    try:
      parts.append(Part(source, None if weight is None else float(weight)))
    except ValueError as error:
      raise ValueError(
        f"data source {shown(piece)}: {shown(weight)} is no weight; write 0.7*{source}"
      ) from error
  weights = [part.weight for part in parts]
  if any(w is None for w in weights) and any(w is not None for w in weights):
    raise ValueError(f"data source {shown(text)}: give every source of a mixture a weight, or none")
  if any(w is not None and not 0 < w < float("inf") for w in weights):
    raise ValueError(f"data source {shown(text)}: weights must be greater than 0")
  return tuple(parts)


def scan_qa_rows(
  source: str, seed: int, asked: bool = True
) -> Iterator[rows_lib.QARow | rows_lib.BadRow]:
  """The rows of one source (`SOURCES`, no mixture), with a BadRow for each that cannot be used.

  Args:
    seed: of what a reader draws (distractors, charts).
    asked: False where rows need no questions: then a source may also be images alone.

  Raises:
    ValueError: an unknown source, or a file that cannot be read at all.
  """
  kind, _, rest = source.partition(":")
  suffix = pathlib.Path(source).suffix.lower()
  if kind == "easy_vqa":
    yield from read_easy_vqa(rest, seed)
  elif kind == "charts":
    from caprl_jax.data.charts import rows as charts  # only here: it brings matplotlib

    match = re.fullmatch(r"([^:]*)(?::(\d+)(?::(\d+)x(\d+))?)?", rest)
    if not match:
      raise ValueError(
        f"data source {shown(source)}: write charts:SPLIT, charts:SPLIT:NUMBER or "
        "charts:SPLIT:NUMBER:WIDTHxHEIGHT"
      )
    split, count, width, height = match.groups()
    asked = {"count": int(count)} if count else {}
    yield from charts.read_charts(
      split, seed, **asked, **({"pixels": (int(width), int(height))} if width else {})
    )
  elif kind == "hf":
    files = hub_datasets.split_files(source)
    if asked or caprl_parquet.has_questions(files):
      yield from caprl_parquet.scan_parquet(files)
    else:
      yield from _images_alone(source)
  elif kind == "tfds":
    folder, _, split = rest.rpartition(":")
    if not folder:
      raise ValueError(
        f"data source {shown(source)}: write tfds:FOLDER:SPLIT, e.g. "
        "tfds:data/caprl_qa/default/1.0.0:train"
      )
    from caprl_jax.data.readers import tfds  # only here: it brings tensorflow_datasets

    yield from tfds.scan_tfds(folder, split)
  elif suffix in JSON_SUFFIXES:
    yield from _scan_json(pathlib.Path(source).expanduser(), asked)
  elif suffix == ".parquet" or pathlib.Path(source).expanduser().is_dir():
    if asked or caprl_parquet.has_questions(source):
      yield from caprl_parquet.scan_parquet(source)
    else:
      yield from _images_alone(source)
  elif not asked:
    yield from _images_alone(source)
  else:
    if suffix in PACKED_SUFFIXES and pathlib.Path(source).expanduser().is_file():
      json_rows.check_unpacked(pathlib.Path(source).expanduser())
    raise ValueError(f"data source {shown(source)} is not known; it may be\n{SOURCES}")


def _images_alone(source: str) -> Iterator[rows_lib.QARow]:
  """The images of what mode caption takes, as rows without questions."""
  for row in list_images(source, "data source").rows:
    yield rows_lib.QARow(row.image, (), row.name, where=row.where)


def _scan_json(
  path: pathlib.Path, asked: bool = True
) -> Iterator[rows_lib.QARow | rows_lib.BadRow]:
  """The rows of a JSON file, each in our own layout or in one of the first release, by its keys."""
  empty = True
  for where, item in json_rows.read_items(path):
    empty = False
    if isinstance(item, rows_lib.BadRow):
      yield item
      continue
    released = isinstance(item, dict) and RELEASED_KEYS & item.keys()
    try:
      yield (caprl_json if released else jsonl).parse_row(item, path.parent, where, asked)
    except ValueError as error:
      yield rows_lib.BadRow(where, str(error))
  if empty:
    raise ValueError(f"{path}: no rows; write one JSON object a line, or a list of them")


def read_parts(
  mixture: str,
  seed: int,
  max_rows: int | None = None,
  bad_rows: rows_lib.BadRows | rows_lib.RowKeeper = "refuse",
  asked: bool = True,
  drawn: bool = False,
) -> list[tuple[Part, list[rows_lib.QARow]]]:
  """Reads and checks the sources of a mixture, each by itself.

  Args:
    max_rows: keeps the first rows only, of each source.
    bad_rows: "refuse" them all with an error, or "drop" and log them; or who takes note of them.
    asked: as of `scan_qa_rows`.
    drawn: `max_rows` keeps rows drawn by the seed, in their order, rather than the first ones.

  Raises:
    ValueError: an unknown source, bad rows that are to be refused, or what `rows.check_rows`
    refuses.
  """
  read = []
  for part in parse_mixture(mixture):
    with going_on(f"reading {part.source}"):
      found = rows_lib.good_rows(scan_qa_rows(part.source, seed, asked), bad_rows)
      if drawn and max_rows is not None and max_rows < len(found):
        chosen = np.random.default_rng(seed).choice(len(found), max_rows, replace=False)
        found = [found[i] for i in sorted(chosen)]
      found = found[:max_rows]
    rows_lib.check_rows(found, part.source, asked)
    read.append((part, found))
  return read


def read_qa_rows(
  source: str,
  seed: int,
  max_rows: int | None = None,
  bad_rows: rows_lib.BadRows | rows_lib.RowKeeper = "refuse",
  asked: bool = True,
) -> list[rows_lib.QARow]:
  """The rows of all sources of a mixture, one after the other; weights are left aside. As
  `read_parts`.
  """
  parts = read_parts(source, seed, max_rows, bad_rows, asked)
  return [row for _, found in parts for row in found]


def read_caption_rows(
  source: str, bad_rows: rows_lib.BadRows | rows_lib.RowKeeper = "refuse"
) -> list[rows_lib.CaptionRow]:
  """Reads images with captions from a .jsonl or .json file (`jsonl.read_caption_jsonl`).
  bad_rows: as `read_parts`."""
  if pathlib.Path(source).suffix.lower() not in JSON_SUFFIXES:
    raise ValueError(
      f"caption source {shown(source)} is not known; use a .jsonl file of image and caption"
    )
  return rows_lib.good_rows(jsonl.scan_caption_jsonl(pathlib.Path(source).expanduser()), bad_rows)
