"""Rows -> a file or a TFDS dataset, in the format of its name, which takes nobody's place."""

import hashlib
import json
import logging
import pathlib
from collections.abc import Sequence

from caprl_jax.atomic_files import write_json
from caprl_jax.data.readers import caprl_json, caprl_parquet, jsonl
from caprl_jax.data.rows import QARow
from caprl_jax.errors import UserError
from caprl_jax.json_files import read_record, shown
from caprl_jax.progress import counted, going_on

log = logging.getLogger("caprl_jax.modes.dataset.outputs")

# In the workdir: what was written from there, and the digests of its rows; "" while it is written.
WRITTEN = "outputs.json"
SUFFIXES = (".jsonl", ".json", ".parquet")


def check_output(output: str, key: str, name: str, workdir: pathlib.Path) -> None:
  """Raises UserError, with the config's key, for an output in no known format, and for one that is
  there already and was not written from this workdir.

  Args:
    name: of the dataset, where the output is `tfds:FOLDER`.
  """
  if not output.startswith("tfds:") and pathlib.Path(output).suffix not in SUFFIXES:
    raise UserError(f"{key} = {output!r}: write FILE.jsonl, FILE.json, FILE.parquet or tfds:FOLDER")
  path = output_path(output, name)
  if path.exists() and str(path.absolute()) not in _written(workdir):
    raise UserError(
      f"{key}: {shown(str(path), 300)} is there already, and was not written from the workdir "
      f"{workdir}: delete it, or name another output"
    )


def output_path(output: str, name: str) -> pathlib.Path:
  """The file, or the dataset's own folder, that an output is."""
  if output.startswith("tfds:"):
    from caprl_jax.data.readers import tfds  # late: it brings tensorflow_datasets

    return tfds.dataset_folder(_folder(output), name)
  return pathlib.Path(output).expanduser()


def write_output(
  rows: Sequence[QARow], output: str, split: str, name: str, workdir: pathlib.Path
) -> pathlib.Path:
  """Writes an output that `check_output` lets pass, whole or not at all, and returns its path. What
  is there with these rows stays as it is.

  Raises:
    ValueError: an image cannot be read; a TFDS dataset is there with other rows.
  """
  path, digest = output_path(output, name), _digest(rows, split)
  written, place = _written(workdir), str(path.absolute())
  if path.exists() and written.get(place) == digest:
    log.info("%s is there, with these rows", path)
    return path
  # First: where a kill comes once the output is there, the next start must know whose it is.
  write_json(workdir / WRITTEN, written | {place: ""})
  with going_on(f"writing {path}"):
    _write(rows, output, split, name)
  write_json(workdir / WRITTEN, written | {place: digest})
  return path


def _write(rows: Sequence[QARow], output: str, split: str, name: str) -> None:
  if output.startswith("tfds:"):
    from caprl_jax.data.readers import tfds

    tfds.write_tfds(_folder(output), {split: rows}, name)
    return
  path = output_path(output, name)
  if path.suffix == ".parquet":
    caprl_parquet.write_parquet(path, rows)
    return
  if path.suffix == ".json":
    caprl_json.check_questions(rows, str(path))  # before images are copied
  # Copied even where they are files: the dataset is then one folder that can be moved.
  folder = path.with_name(f"{path.stem}_images")
  rows = [
    jsonl.save_image(row, folder, copy=True) for row in counted(rows, "saving images", "image")
  ]
  (caprl_json.write_json if path.suffix == ".json" else jsonl.write_jsonl)(path, rows)


def _folder(output: str) -> pathlib.Path:
  return pathlib.Path(output.removeprefix("tfds:")).expanduser()


def _written(workdir: pathlib.Path) -> dict[str, str]:
  path = workdir / WRITTEN
  found = read_record(path) if path.exists() else {}
  if not isinstance(found, dict):
    raise UserError(f"{path}: not what this mode writes; delete it")
  return found


def _digest(rows: Sequence[QARow], split: str) -> str:
  digest = hashlib.sha256(split.encode())
  for row in rows:
    value = [row.name, jsonl.plain_questions(row), row.facts]
    digest.update(json.dumps(value).encode() + b"\0")
  return digest.hexdigest()
