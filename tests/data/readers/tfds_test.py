"""The TFDS builder and its reader: there and back without TensorFlow, order, refusals."""

import json
import pathlib
import subprocess
import sys

import pytest
from helpers.qa_rows import ROWS, plain

from caprl_jax.data.readers import tfds
from caprl_jax.data.rows import BadRow, QARow, read_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
  return str(
    tfds.write_tfds(tmp_path_factory.mktemp("tfds"), {"train": ROWS, "test": ROWS[:2]}, "colors")
  )


def test_round_trip_in_order(folder):
  assert pathlib.Path(folder).parts[-3:] == ("caprl_qa", "colors", "1.0.0")
  read = list(tfds.scan_tfds(folder, "train"))
  assert [plain(row) for row in read] == [plain(row) for row in ROWS]
  assert len(list(tfds.scan_tfds(folder, "test"))) == 2
  images = list(tfds.scan_images(folder, "train"))
  assert [image.name for image in images] == [row.name for row in ROWS]
  assert read_image(images[3]).getpixel((0, 0)) == (3, 0, 0)


def test_reading_needs_no_tensorflow(folder):
  code = (
    "import sys; from caprl_jax.data.readers import tfds; rows = "
    "list(tfds.scan_tfds(sys.argv[1], 'train'));rows[0].image.read(); assert len(rows) == 7 "
    "and 'tensorflow' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=120)


def test_a_record_that_cannot_be_used(folder, monkeypatch):
  source = tfds._source(folder, "test")
  records = [
    dict(source[0]),
    dict(source[1]) | {"qa": json.dumps({"questions": [{"stem": "Q?"}]}).encode()},
  ]
  monkeypatch.setattr(type(source), "__getitem__", lambda self, i: records[i])
  good, bad = tfds.scan_tfds(folder, "test")
  assert isinstance(good, QARow) and isinstance(bad, BadRow)
  assert (
    bad.message
    == f"{folder}:test, record 1: questions[0]: the key 'options' is missing (known keys: stem, "
    "options, gold, kind, provenance)"
  )


def test_refusals(folder, tmp_path):
  with pytest.raises(ValueError, match="no split 'val'; it has ..test', 'train'."):
    list(tfds.scan_tfds(folder, "val"))
  parent = str(pathlib.Path(folder).parents[1])
  with pytest.raises(ValueError, match=f"no TFDS dataset there .*did you mean {folder}"):
    list(tfds.scan_tfds(parent, "train"))
  with pytest.raises(ValueError, match="holds a dataset already"):
    tfds.write_tfds(pathlib.Path(folder).parents[2], {"train": ROWS}, "colors")
  with pytest.raises(ValueError, match="split name 'a-b'"):
    tfds.write_tfds(tmp_path, {"a-b": ROWS})
  with pytest.raises(ValueError, match="row 'bad': its image"):
    tfds.write_tfds(tmp_path, {"train": [*ROWS, QARow(b"abc", ROWS[0].questions, "bad")]})
  assert not list(tmp_path.rglob("dataset_info.json"))
  with pytest.raises(ValueError, match="has no rows to write"):
    tfds.CaprlQa(data_dir=str(tmp_path)).download_and_prepare()
