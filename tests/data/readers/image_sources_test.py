"""Where images lie: tar files whole, odd and broken; parquet and TFDS; names and duplicates."""

import gzip
import io
import json
import logging
import os
import pathlib
import subprocess
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from caprl_jax.data.readers import image_sources
from caprl_jax.data.rows import CaptionRow, StoredImage, image_bytes, read_image


def png(value: int, size=(9, 7)) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", size, (value, 20, 30)).save(file, "PNG")
  return file.getvalue()


def write_tar(
  path: pathlib.Path, members: dict[str, bytes], kind=tarfile.PAX_FORMAT
) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", format=kind) as tar:
    for name, data in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return path


def test_members_of_a_tar_are_read_where_they_lie(tmp_path):
  members = {
    "0001.png": png(1),
    "0001.json": b"{}",
    "deep/er/0002.JPG": png(2),
    "0002.txt": b"a cat",
    "0003.png": png(3),
  }
  path = write_tar(tmp_path / "a.tar", members)
  rows = image_sources.find_images(str(path))
  assert [row.name for row in rows] == [
    "a.tar/0001.png",
    "a.tar/deep/er/0002.JPG",
    "a.tar/0003.png",
  ]
  assert [image_bytes(row) for row in rows] == [png(1), png(2), png(3)]
  assert read_image(rows[1]).getpixel((0, 0)) == (2, 20, 30)
  image: StoredImage = rows[1].image
  assert "a.tar, member 'deep/er/0002.JPG' at byte" in image.where
  with tarfile.open(path) as tar:
    assert [row.image.offset for row in rows] == [
      tar.getmember(row.image.member).offset_data for row in rows
    ]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(kind, tmp_path):
  name = "folder/" * 40 + "é" * 60 + ".png"
  rows = image_sources.find_images(
    str(write_tar(tmp_path / "a.tar", {name: png(7), "b.png": png(8)}, kind))
  )
  assert [row.name for row in rows] == [f"a.tar/{name}", "a.tar/b.png"]
  assert [image_bytes(row) for row in rows] == [png(7), png(8)]


def test_a_tar_of_the_tool_tar(tmp_path):
  (tmp_path / "in").mkdir()
  for i in range(3):
    (tmp_path / "in" / f"{i}.png").write_bytes(png(i))
  os.symlink("0.png", tmp_path / "in" / "link.png")
  subprocess.run(["tar", "cf", tmp_path / "a.tar", "-C", tmp_path, "in"], check=True)
  rows = image_sources.find_images(str(tmp_path / "a.tar"))
  assert {row.name: image_bytes(row) for row in rows} == {
    f"a.tar/in/{i}.png": png(i) for i in range(3)
  }


def test_folders_and_patterns_of_tars(tmp_path):
  for name in ("b", "a", "sub/a"):
    write_tar(tmp_path / "set" / f"{name}.tar", {"0.png": png(len(name))})
  names = ["a.tar/0.png", "b.tar/0.png", "sub/a.tar/0.png"]
  assert [row.name for row in image_sources.find_images(str(tmp_path / "set"))] == names
  assert [row.name for row in image_sources.find_images(f"{tmp_path}/set/**/*.tar")] == names
  assert [row.name for row in image_sources.find_images(f"{tmp_path}/set/*.tar")] == names[:2]
  (tmp_path / "set" / "x.png").write_bytes(png(1))
  with pytest.raises(ValueError, match="several kinds"):
    image_sources.find_images(f"{tmp_path}/set/*")
  with pytest.raises(ValueError, match="no file fits"):
    image_sources.find_images(f"{tmp_path}/set/*.parquet")


def test_a_folder_of_images_leaves_tars_alone_and_says_so(tmp_path, caplog):
  write_tar(tmp_path / "a.tar", {"0.png": png(0)})
  (tmp_path / "x.png").write_bytes(png(1))
  with caplog.at_level(logging.WARNING, "caprl_jax"):
    assert [row.name for row in image_sources.find_images(str(tmp_path))] == [
      str(tmp_path / "x.png")
    ]
  assert "only its 1 images are read, not 1 tar" in caplog.text


def test_a_tar_that_is_cut_off_or_damaged_is_named_with_the_byte(tmp_path):
  whole = write_tar(tmp_path / "whole.tar", {f"{i}.png": png(i) for i in range(3)}).read_bytes()
  with tarfile.open(tmp_path / "whole.tar") as tar:
    last = tar.getmember("2.png")
  cases = {
    "data": (
      whole[: last.offset_data + 10],
      rf"cut off: its last member reaches to byte "
      rf"{last.offset_data + 512}, the file has {last.offset_data + 10}",
    ),
    "header": (
      whole[: last.offset + 100],
      rf"damaged at byte {last.offset} of {last.offset + 100}",
    ),
    "middle": (
      whole[: last.offset] + b"x" * 512 + whole[last.offset + 512 :],
      rf"damaged at byte {last.offset}",
    ),
    "empty": (b"", "empty file"),
    "noise": (b"x" * 2000, "damaged at byte 0"),
    "packed": (gzip.compress(whole), "is compressed; unpack it"),
  }
  for name, (data, message) in cases.items():
    (tmp_path / f"{name}.tar").write_bytes(data)
    with pytest.raises(ValueError, match=message) as failure:
      image_sources.find_images(str(tmp_path / f"{name}.tar"))
    assert str(failure.value).count(f"{name}.tar") == 1
  with pytest.raises(ValueError) as failure:  # all at once
    image_sources.find_images(str(tmp_path))
  assert all(f"{name}.tar" in str(failure.value) for name in cases)
  (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole))
  with pytest.raises(ValueError, match=r"a\.tar\.gz is compressed.*unpack"):
    image_sources.find_images(str(tmp_path / "a.tar.gz"))
  with pytest.raises(ValueError, match="no image among the members"):
    image_sources.find_images(str(write_tar(tmp_path / "texts.tar", {"a.txt": b"a"})))


def test_a_tar_without_its_end_mark_is_read_with_a_warning(tmp_path, caplog):
  path = write_tar(tmp_path / "a.tar", {"0.png": png(0), "1.png": png(1)})
  with tarfile.open(path) as tar:
    end = tar.getmember("1.png").offset_data + 512
  path.write_bytes(path.read_bytes()[:end])
  with caplog.at_level(logging.WARNING, "caprl_jax"):
    assert len(image_sources.find_images(str(path))) == 2
  assert "no end mark" in caplog.text


def test_a_tar_that_changes_fails_the_row(tmp_path):
  path = write_tar(tmp_path / "a.tar", {"0.png": png(0)})
  (row,) = image_sources.find_images(str(path))
  path.write_bytes(path.read_bytes()[:520])
  with pytest.raises(ValueError, match=r"member '0\.png' at byte 512\): 8 bytes of .*cut off"):
    read_image(row)
  path.unlink()
  with pytest.raises(ValueError, match=r"No such file.*put the tar file back"):
    read_image(row)


def test_names_are_one_image_s(tmp_path, caplog):
  path = tmp_path / "rows.jsonl"
  path.write_text(
    "".join(
      json.dumps({"image": name}) + "\n" for name in ("a.png", "b\u2028.png", "a.png", "./a.png")
    )
  )
  with caplog.at_level(logging.WARNING, "caprl_jax"):
    assert [row.name for row in image_sources.find_images(str(path))] == [
      "a.png",
      "b\u2028.png",
      "./a.png",
    ]
  assert "1 images are listed more than once" in caplog.text
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    for value in (1, 2):
      member = tarfile.TarInfo("0.png")
      member.size = len(png(value))
      tar.addfile(member, io.BytesIO(png(value)))
  with pytest.raises(ValueError, match=r"two images are called 'a\.tar/0\.png'"):
    image_sources.find_images(str(tmp_path / "a.tar"))


def test_lines_that_are_none(tmp_path):
  path = tmp_path / "rows.jsonl"
  for data, message in (
    (b'{"image": "a.png"}\n{"image": 3}\n', r"rows\.jsonl:2: not a JSON object"),
    (b'{"image": "a.png"}\n\xff\n', r"rows\.jsonl:2: .*codec can't decode"),
    (b"\n\n", "has no rows"),
    (b"[1]\n", r"rows\.jsonl\[0\]"),
  ):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
      image_sources.find_images(str(path))


def test_parquet_files_that_name_images_alike(tmp_path):
  for name, values in (("b", (1, 2)), ("a", (3,))):
    images = [
      {"bytes": png(value), "path": "same.png" if value != 2 else "other.png"} for value in values
    ]
    pq.write_table(pa.table({"image": images}), tmp_path / f"{name}.parquet")
  for source in (tmp_path, tmp_path / "*.parquet"):
    rows = image_sources.find_images(str(source))
    assert [row.name for row in rows] == ["a.parquet/0", "b.parquet/0", "other.png"]
    assert [image_bytes(row) for row in rows] == [png(3), png(1), png(2)]
  assert [row.name for row in image_sources.find_images(str(tmp_path / "b.parquet"))] == [
    "same.png",
    "other.png",
  ]


def test_a_tfds_dataset(tmp_path):
  from caprl_jax.data.readers.tfds import write_tfds
  from caprl_jax.data.rows import QARow, Question

  question = Question("what?", ("a", "b"), 0)
  folder = write_tfds(
    tmp_path, {"train": [QARow(png(i), (question,), "twice" if i < 2 else "c") for i in range(3)]}
  )
  rows = image_sources.find_images(f"tfds:{folder}:train")
  assert [row.name for row in rows] == ["train/0", "train/1", "c"]
  assert [image_bytes(row) for row in rows] == [png(i) for i in range(3)]
  for source, message in (
    ("tfds:train", "write tfds:FOLDER:SPLIT"),
    (f"tfds:{folder}:test", "no split 'test'"),
  ):
    with pytest.raises(ValueError, match=message):
      image_sources.find_images(source)


def test_mirrored_paths(tmp_path):
  (tmp_path / "set" / "sub").mkdir(parents=True)
  (tmp_path / "set" / "sub" / "a.png").write_bytes(png(0))
  for source in (tmp_path / "set", tmp_path / "set" / "*" / "*.png"):
    (row,) = image_sources.find_images(str(source))
    assert str(image_sources.mirrored(row, image_sources.base_folder(str(source)))) == "sub/a.png"
  (row,) = image_sources.find_images(str(write_tar(tmp_path / "s.tar", {"x/0.png": png(0)})))
  assert str(image_sources.mirrored(row, tmp_path)) == "s.tar/x/0.png"
  for name in ("../a.png", str(tmp_path / "other" / "a.png")):
    with pytest.raises(ValueError, match="lies outside"):
      image_sources.mirrored(CaptionRow(tmp_path / "set" / name, "", name), tmp_path / "set")
  assert image_sources.base_folder("x/y/*.tar") == pathlib.Path("x/y")
