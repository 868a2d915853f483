"""The pass over all images: each content decoded once, remembered, mended after a kill."""

import dataclasses
import io
import os
import tarfile

import pytest
from helpers.bad_images import BAD, encoded, noise

from caprl_jax.data import image_check, usable_rows
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.readers import caprl_parquet
from caprl_jax.data.readers.image_sources import find_images
from caprl_jax.data.rows import CaptionRow, QARow, Question


@pytest.fixture
def decoded(monkeypatch):
  """The images that are decoded, one entry each time."""
  seen = []
  decode = usable_rows.decode
  monkeypatch.setattr(usable_rows, "decode", lambda data: seen.append(data) or decode(data))
  return seen


@pytest.fixture
def rows(tmp_path):
  """Files, two of one content and one that is cut; one in memory, and a row without an image."""
  made = []
  for name, data in {
    "a": encoded(noise()),
    "b": encoded(noise(seed=1)),
    "same as a": encoded(noise()),
    "cut": BAD["cut JPEG"][0],
  }.items():
    path = tmp_path / f"{name}.png"
    path.write_bytes(data)
    os.utime(path, (1e9, 1e9))
    made.append(CaptionRow(path, "", name))
  return [*made, CaptionRow(encoded(noise(seed=2)), "", "memory"), CaptionRow(None, "", "text")]


def test_a_content_is_decoded_once_and_never_again(tmp_path, rows, decoded, monkeypatch):
  work = tmp_path / "work"
  first = ImageCheck(work)
  facts = first([*rows, *rows])  # several rows share an image
  assert len(decoded) == 4 and first.decoded == 4
  assert facts[: len(rows)] == facts[len(rows) :] and facts[0] == facts[2]
  assert [bool(fact.problem) for fact in facts[:5]] == [False, False, False, True, False]
  assert (facts[0].width, facts[0].height, facts[0].format) == (48, 40, "PNG")
  assert first(rows) == facts[: len(rows)] and len(decoded) == 4
  # the next start reads no file
  read = []
  source_bytes = image_check.source_bytes
  monkeypatch.setattr(image_check, "source_bytes", lambda s: read.append(s) or source_bytes(s))
  assert ImageCheck(work)(rows) == facts[: len(rows)]
  assert len(decoded) == 4 and read == [rows[4].image]  # what lies in memory has no time stamp


def test_another_at_work_in_the_folder_reads_and_does_not_write(tmp_path, rows, decoded):
  facts = ImageCheck(tmp_path)(rows[:3])
  before, kept = len(decoded), (tmp_path / "row_check.jsonl").read_bytes()
  assert ImageCheck(tmp_path, "evaluation")(rows)[:3] == facts and len(decoded) == before + 2
  assert (tmp_path / "row_check.jsonl").read_bytes() == kept
  assert (tmp_path / "row_check.evaluation.jsonl").exists()


def test_a_file_that_changes_is_looked_at_again(tmp_path, rows, decoded):
  work, path = tmp_path / "work", rows[3].image
  assert ImageCheck(work)(rows)[3].problem
  path.write_bytes(encoded(noise(seed=3)))  # mended
  assert not ImageCheck(work)(rows)[3].problem and len(decoded) == 5
  path.write_bytes(BAD["cut JPEG"][0])  # and broken again: its content is known
  assert ImageCheck(work)(rows)[3].problem and len(decoded) == 5


def test_what_cannot_be_read_is_tried_again(tmp_path, rows):
  path = rows[0].image
  data = path.read_bytes()
  path.unlink()
  (fact,) = ImageCheck(tmp_path / "work")(rows[:1])
  assert fact.reason == "no such file" and "No such file" in fact.problem
  path.write_bytes(data)
  assert not ImageCheck(tmp_path / "work")(rows[:1])[0].problem


@pytest.mark.parametrize("harm", ["torn", "garbage", "other decoder", "empty"])
def test_a_file_that_a_kill_has_torn_is_mended(tmp_path, rows, decoded, harm):
  work = tmp_path / "work"
  facts = ImageCheck(work)(rows)
  path = work / "row_check.jsonl"
  whole = path.read_bytes()
  lines = whole.splitlines(keepends=True)
  path.write_bytes(
    {
      "torn": whole[:-20],
      "garbage": b"".join([*lines[:3], b"\x00\xff\n", *lines[3:]]),
      "other decoder": b"".join([b'{"version": 0}\n', *lines[1:]]),
      "empty": b"",
    }[harm]
  )
  assert ImageCheck(work)(rows) == facts
  kept = {"torn": lines[:-1], "garbage": lines[:3]}.get(harm, [])
  assert len(decoded) == 8 - sum(line.startswith(b'["image"') for line in kept)
  before = len(decoded)
  assert ImageCheck(work)(rows) == facts and len(decoded) == before
  assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_images_inside_larger_files(tmp_path, decoded):
  images = {"a.png": encoded(noise()), "b.jpg": BAD["cut JPEG"][0]}
  with tarfile.open(tmp_path / "some.tar", "w") as tar:
    for name, data in images.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  question = (Question("q?", ("x", "y"), 0),)
  caprl_parquet.write_parquet(
    tmp_path / "some.parquet", [QARow(data, question, name) for name, data in images.items()]
  )
  rows = find_images(str(tmp_path / "some.tar"), "input") + list(
    caprl_parquet.scan_parquet(str(tmp_path / "some.parquet"))
  )
  for path in tmp_path.glob("some.*"):
    os.utime(path, (1e9, 1e9))
  facts = ImageCheck(tmp_path / "work")(rows)
  assert [bool(fact.problem) for fact in facts] == [False, True] * 2 and len(decoded) == 2
  (tmp_path / "some.tar").rename(tmp_path / "gone.tar")
  gone = ImageCheck(tmp_path / "work")(rows)
  assert gone[2:] == facts[2:] and all("put the tar file back" in fact.problem for fact in gone[:2])
  assert dataclasses.asdict(gone[0])["sha256"] == ""


def test_processes_share_the_work(tmp_path, rows, monkeypatch):
  """Each decodes its part; what the others found comes from them, and lies beside its own."""
  whole = ImageCheck(None)(rows)
  monkeypatch.setattr(image_check.jax, "process_count", lambda: 2)
  parts = {}

  def start(process, told):
    monkeypatch.setattr(image_check.jax, "process_index", lambda: process)
    monkeypatch.setattr(image_check, "_told_to_all", told)
    return ImageCheck(tmp_path / "work")

  def listen(found, count, processes):
    parts.update(found)
    return [found.get(i) for i in range(count)]

  for process in range(2):
    start(process, listen)(rows)
  assert sorted(parts) == [0, 1, 2, 3, 4] and [parts[i] for i in range(5)] == whole[:5]
  assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [
    "row_check.1.jsonl",
    "row_check.jsonl",
  ]
  # one process later finds what both have left
  monkeypatch.setattr(image_check.jax, "process_count", lambda: 1)
  later = start(0, lambda found, count, processes: [found[i] for i in range(count)])
  assert later(rows) == whole and later.decoded == 0
