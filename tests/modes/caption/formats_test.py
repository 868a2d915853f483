"""Where captions go: each format read back by its own reader, refusals, kills."""

import json
import pathlib
import shutil
import subprocess

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.captioned_rows import outcome, write_images
from PIL import Image

from caprl_jax.data.readers.image_sources import base_folder, find_images
from caprl_jax.modes.caption.formats import hf
from caprl_jax.modes.caption.formats import output as caption_formats
from caprl_jax.modes.caption.formats.output import Output


@pytest.fixture
def images(tmp_path):
  """A folder of six images in a tree."""
  return write_images(tmp_path / "images")


def output(kind, path, source, **more) -> Output:
  return Output(path, kind, base_folder(str(source)), **more)


def lines(path):
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_json_lines(images, tmp_path):
  rows = find_images(str(images))
  output("jsonl", tmp_path / "new" / "out.jsonl", images).write(outcome(rows))
  assert lines(tmp_path / "new" / "out.jsonl") == [item.row for item in outcome(rows)]
  output("caprl_2m", tmp_path / "c.jsonl", images, image_key="img", caption_key="text").write(
    outcome(rows)
  )
  good = [item.row for item in outcome(rows) if "error" not in item.row]
  assert lines(tmp_path / "c.jsonl") == [
    {"img": row["image"], "text": row["caption"]} for row in good
  ]
  assert lines(tmp_path / "c.failed.jsonl") == [{"image": rows[3].name, "error": "no"}]


def test_parquet(images, tmp_path, monkeypatch):
  monkeypatch.setattr(caption_formats, "ROWS_PER_GROUP", 4)
  rows = find_images(str(images))
  output("parquet", tmp_path / "out.parquet", images).write(outcome(rows))
  file = pq.ParquetFile(tmp_path / "out.parquet")
  assert file.metadata.num_row_groups == 2
  found = file.read().to_pylist()
  there = lambda row: {key: value for key, value in row.items() if value is not None}
  assert [there(row) for row in found] == [item.row for item in outcome(rows)]
  assert all(row.keys() == {"image", "caption", "tokens", "finish", "error"} for row in found)


def test_texts_beside_the_images_and_in_a_tree_of_their_own(images, tmp_path):
  rows = find_images(str(images))
  for folder in (images, tmp_path / "texts"):
    out = output("txt", folder, images)
    out.check(rows)
    out.write(outcome(rows))
    found = {
      str(path.relative_to(folder)): path.read_text("utf-8") for path in folder.rglob("*.txt")
    }
    assert found == {
      ("deep/" if int(row["image"][-5]) % 2 else "") + row["image"][-5] + ".txt": row["caption"]
      + "\n"
      for row in (item.row for item in outcome(rows))
      if "error" not in row
    }
    assert lines(folder.with_name(folder.name + ".failed.jsonl")) == [
      {"image": rows[3].name, "error": "no"}
    ]
    with pytest.raises(ValueError, match="5 of the texts to write are there already"):
      out.check(rows)
  shutil.copy(images / "0.png", images / "0.jpg")
  with pytest.raises(ValueError, match="would both be captioned in"):
    output("txt", tmp_path / "more", images).check(find_images(str(images)))


def test_texts_for_images_in_a_tar(images, tmp_path):
  (tmp_path / "set").mkdir()
  subprocess.run(
    ["tar", "cf", tmp_path / "set" / "a.tar", "-C", images, "0.png", "deep"], check=True
  )
  rows = find_images(str(tmp_path / "set"))
  output("txt", tmp_path / "texts", tmp_path / "set").write(outcome(rows)[:1])
  assert [
    str(path.relative_to(tmp_path / "texts")) for path in (tmp_path / "texts").rglob("*.txt")
  ] == ["a.tar/0.txt"]
  with pytest.raises(ValueError, match=r"a\.tar is a file"):
    output("txt", tmp_path / "set", tmp_path / "set").check(rows)


@pytest.mark.parametrize("embed", [True, False])
def test_a_hugging_face_dataset(embed, images, tmp_path, monkeypatch):
  monkeypatch.setattr(hf, "FILE_BYTES", 500)  # several files
  monkeypatch.setattr(hf, "GROUP_BYTES", 300)
  rows = find_images(str(images))
  out = output("hf", tmp_path / "set", images, embed_images=embed, about=" with `m: {x}`")
  out.write(outcome(rows))
  names = sorted(path.name for path in (tmp_path / "set" / "data").iterdir())
  assert names == [f"train-{i:05d}-of-{len(names):05d}.parquet" for i in range(len(names))]
  assert len(names) > 1 if embed else len(names) == 1
  found = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))["train"]
  good = [(item.number, item.row) for item in outcome(rows) if "error" not in item.row]
  assert found["caption"] == [row["caption"] for _, row in good]
  assert found["finish"] == [row["finish"] for _, row in good]
  assert found["tokens"] == [row["tokens"] for _, row in good]
  assert found["name" if embed else "image"] == [row["image"] for _, row in good]
  if embed:
    assert isinstance(found.features["image"], datasets.Image)
    for picture, (i, _) in zip(found["image"], good, strict=True):
      assert np.array_equal(np.asarray(picture), np.asarray(Image.open(rows[i].image)))
    one = datasets.Dataset.from_parquet(
      str(tmp_path / "set" / "data" / names[0]), cache_dir=str(tmp_path / "cache")
    )
    assert one[0]["image"].size == (9, 8)  # a file by itself too
  out.write(outcome(rows)[:2])  # after a kill: what is there is ours, and gives way
  assert (
    datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache2"))[
      "train"
    ].num_rows
    == 2
  )


def test_outputs_that_are_there_or_say_no_format_are_refused(images, tmp_path):
  rows = find_images(str(images))
  for kind, path in (("jsonl", tmp_path / "x.jsonl"), ("hf", tmp_path / "x")):
    path.mkdir() if kind == "hf" else path.write_text("mine")
    with pytest.raises(ValueError, match="is there already, and not from this job"):
      output(kind, path, images).check(rows)
  assert caption_formats.kind_of(pathlib.Path("a.parquet"), None) == "parquet"
  assert caption_formats.kind_of(pathlib.Path("a.parquet"), "hf") == "hf"
  with pytest.raises(ValueError, match="does not say its format"):
    caption_formats.kind_of(pathlib.Path("captions"), None)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf", "caprl_2m"])
def test_a_kill_leaves_no_half_of_an_output(kind, images, tmp_path):
  rows = find_images(str(images))

  def killed():
    yield from outcome(rows)[:3]
    raise KeyboardInterrupt

  out = output(kind, tmp_path / "out.x", images)
  with pytest.raises(KeyboardInterrupt):
    out.write(killed())
  assert not out.path.exists()
  out.write(outcome(rows))
  assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_names_that_are_too_long_are_refused_before_and_others_are_written(images, tmp_path):
  long = tmp_path / "long"
  long.mkdir()
  (long / ("a" * 251 + ".png")).write_bytes((images / "0.png").read_bytes())
  rows = find_images(str(long))
  texts = output("txt", tmp_path / "texts", long)
  texts.check(rows)
  texts.write(outcome(rows))
  assert [path.name for path in (tmp_path / "texts").iterdir()] == ["a" * 251 + ".txt"]
  (long / ("b" * 253)).write_bytes((images / "0.png").read_bytes())
  with pytest.raises(ValueError, match="name has more than 255 bytes; rename it"):
    output("txt", tmp_path / "more", long).check(find_images(str(long)))
  with pytest.raises(ValueError, match="its name is too long for a file beside it"):
    output("jsonl", tmp_path / ("c" * 230 + ".jsonl"), long).check(rows)


def test_texts_of_images_that_a_list_names_outside_its_folder_are_refused(images, tmp_path):
  list_file = tmp_path / "lists" / "rows.txt"
  list_file.parent.mkdir()
  list_file.write_text(f"file://{images}/0.png\n")
  with pytest.raises(ValueError, match="lies outside"):
    output("txt", tmp_path / "texts", list_file).check(find_images(str(list_file)))
