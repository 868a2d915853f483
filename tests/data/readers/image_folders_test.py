"""Folders and tars: which files are images, what is passed over and counted, links."""

import io
import logging
import os
import pathlib
import shutil
import tarfile

import pytest
from PIL import Image, features

from caprl_jax.data.readers import image_folders
from caprl_jax.data.readers.image_sources import find_images, list_images
from caprl_jax.data.rows import image_bytes, read_image


def encoded(kind: str = "PNG", value: int = 0) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (16, 12), (value, 20, 30)).save(file, kind)
  return file.getvalue()


def fill(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  for name, data in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
  return folder


def listed(folder: pathlib.Path) -> tuple[list[str], dict[str, int]]:
  found = list_images(str(folder))
  return [str(pathlib.Path(row.name).relative_to(folder)) for row in found.rows], dict(
    found.passed_over.counts
  )


IMAGES = {
  "a.PNG": encoded(),
  "b.jfif": encoded("JPEG"),
  "c.jpe": encoded("JPEG"),
  "d.ppm": encoded("PPM"),
  "e.jp2": encoded("JPEG2000"),
  "f.ico": encoded("ICO"),
  "g.tga": encoded("TGA"),
  "no_suffix": encoded("WEBP"),
  "sub/h.jpg!large": encoded("JPEG"),
  "sub/i.dat": encoded("GIF"),
  "torn.png": b"",
}
OTHERS = {
  "readme.txt": b"x",
  "caption.json": b"{}",
  "model.bin": b"\0" * 40,
  "LICENSE": b"x",
  ".hidden.png": encoded(),
  "._a.png": b"\0\5\x16\7",
  ".ipynb_checkpoints/a-checkpoint.png": encoded(),
  ".git/objects/00/x": b"x",
  ".git/HEAD": b"x",
  "__MACOSX/._a.png": b"\0\5\x16\7",
  "__MACOSX/sub/b.png": encoded(),
  "Thumbs.db": b"x",
  "sub/@eaDir/a.png/SYNO.png": encoded(),
  "j.png.part": encoded(),
  "k.jpg.crdownload": encoded(),
  "l.png.tmp": encoded(),
  "~$m.png": encoded(),
  "n.png~": encoded(),
  "o.svg": b"<svg></svg>",
  "p.CR2": b"II*\0\x10\0\0\0CR\2\0",
  "q.jxl": b"\xff\x0a",
}
COUNTS = {
  image_folders.HIDDEN: 5,
  image_folders.LEFTOVER: 4,
  image_folders.PARTIAL: 5,
  "no image (.txt)": 1,
  "no image (.json)": 1,
  "no image (.bin)": 1,
  "no image (no suffix)": 1,
  "image that cannot be opened here: SVG; a drawing: render it to PNG": 1,
  "image that cannot be opened here: a camera's raw file; develop it to JPEG or PNG": 1,
  "image that cannot be opened here: JXL; pip install pillow-jxl-plugin": 1,
}


def test_every_file_of_a_folder_is_an_image_or_counted(tmp_path, caplog):
  fill(tmp_path, IMAGES | OTHERS)
  with caplog.at_level(logging.INFO, "caprl_jax"):
    names, counts = listed(tmp_path)
  assert names == sorted(IMAGES)
  assert counts == COUNTS
  assert len(names) + sum(counts.values()) == len(IMAGES | OTHERS)
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  assert "passed over 21 files: 5 hidden ('" in record.getMessage()
  assert "'o.svg'" in record.getMessage() and "pillow-jxl-plugin" in record.getMessage()
  for row in find_images(str(tmp_path)):
    if "torn" not in row.name:
      assert read_image(row).width


def test_every_member_of_a_tar_is_an_image_or_counted(tmp_path):
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    tar.add(fill(tmp_path / "in", IMAGES | OTHERS), ".")
  found = list_images(str(tmp_path / "a.tar"))
  assert sorted(row.name for row in found.rows) == sorted(f"a.tar/{name}" for name in IMAGES)
  assert found.passed_over.counts == COUNTS
  contents = {row.name.removeprefix("a.tar/"): image_bytes(row) for row in found.rows}
  assert contents == IMAGES


def test_avif_and_heif():
  avif = ".avif" in image_folders.openable_suffixes()
  assert avif == features.check("avif") or avif
  reason = image_folders.image_or_reason("a.heic", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
  if ".heic" in image_folders.openable_suffixes():
    assert reason == ""
  else:
    assert reason == "image that cannot be opened here: HEIF; pip install pillow-heif"
  # what is called so and is something else is read
  assert image_folders.image_or_reason("a.heic", lambda: encoded("JPEG")) == ""


def test_linked_folders_and_files_are_found_once(tmp_path):
  real = fill(tmp_path / "elsewhere", {"x/1.png": encoded(), "x/.secret.png": encoded()})
  folder = fill(tmp_path / "set", {"real/0.png": encoded(), "notes.txt": b""})
  (folder / "a_link").symlink_to("real")  # would come first
  (folder / "far").symlink_to(real)
  (folder / "far_again").symlink_to(real / "x")
  (folder / "circle").symlink_to(".")
  (folder / "real" / "up").symlink_to(tmp_path)
  (folder / "0_link.png").symlink_to("real/0.png")
  (folder / "far.png").symlink_to(real / "x" / ".secret.png")
  (folder / "far2.png").symlink_to(real / "x" / ".secret.png")
  (folder / "dead.png").symlink_to("nothing.png")
  os.mkfifo(folder / "pipe.png")
  names, counts = listed(folder)
  assert names == ["far/x/1.png", "far.png", "real/0.png"]
  assert counts == {
    image_folders.LINKED_AGAIN: 6,  # a_link, far_again, circle, up; 0_link.png, far2.png
    image_folders.DEAD_LINK: 1,
    image_folders.NO_FILE: 1,
    image_folders.HIDDEN: 1,
    "no image (.txt)": 1,
  }


def test_the_hub_s_cache_is_named_by_its_links(tmp_path):
  folder = fill(tmp_path, {"blobs/0a1b": encoded(), "blobs/2c3d": encoded(), "refs/main": b"0a"})
  for name in ("a.png", "b.png", "b_again.png"):
    link = folder / "snapshots" / "main" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(f"../../blobs/{'0a1b' if name == 'a.png' else '2c3d'}")
  names, counts = listed(folder)
  assert names == ["snapshots/main/a.png", "snapshots/main/b.png"]
  assert counts == {image_folders.LINKED_AGAIN: 3, "no image (no suffix)": 1}


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
  fill(tmp_path, {"a.png": encoded(), "locked/b.png": encoded()})
  scandir = os.scandir

  def refusing(folder):
    if pathlib.Path(folder).name == "locked":
      raise PermissionError(13, "Permission denied")
    return scandir(folder)

  monkeypatch.setattr(os, "scandir", refusing)
  assert listed(tmp_path) == (["a.png"], {image_folders.UNREADABLE: 1})
  with pytest.raises(ValueError, match="locked: cannot be read: Permission denied"):
    find_images(str(tmp_path / "locked"))


def test_names_that_are_odd(tmp_path):
  names = ["new\nline.png", "a" * 251 + ".png", "b.png ", "-c.png", "%d.png", "é.png"]
  fill(tmp_path, dict.fromkeys(names, encoded()))
  raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
  with open(raw, "wb") as file:
    file.write(encoded())
  found, counts = listed(tmp_path)
  assert sorted(found) == sorted([*names, "caf\udce9.png"]) and not counts
  assert all(read_image(row).size == (16, 12) for row in find_images(str(tmp_path)))
  with tarfile.open(tmp_path / "odd.tar", "w") as tar:
    for name in sorted(found):
      tar.add(tmp_path / name, name)
  rows = find_images(str(tmp_path / "odd.tar"))
  assert sorted(row.name for row in rows) == sorted(f"odd.tar/{name}" for name in found)


def test_a_folder_without_images_says_what_it_holds(tmp_path):
  with pytest.raises(ValueError, match=r"no image in this folder.*\(it is empty\)"):
    find_images(str(tmp_path))
  fill(tmp_path, {".a.png": encoded(), "b.txt": b"", "rows.jsonl": b"{}"})
  with pytest.raises(ValueError, match=r"passed over: 2 list .*1 hidden \('.a.png'\).*b\.txt'"):
    find_images(str(tmp_path))
  with pytest.raises(ValueError, match=r"^curate\.input = "):
    find_images(str(tmp_path), "curate.input")


def test_patterns_pass_over_by_the_same_rule(tmp_path):
  files = {"a.png": encoded(), "b.txt": b"", "c.png.part": encoded(), "sub/d.png": encoded()}
  fill(tmp_path, files | {"__MACOSX/e.png": encoded()})
  found = list_images(f"{tmp_path}/*")
  assert [pathlib.Path(row.name).name for row in found.rows] == ["a.png", "d.png"]
  assert found.passed_over.counts == {
    "no image (.txt)": 1,
    image_folders.PARTIAL: 1,
    image_folders.LEFTOVER: 1,
  }
  found = list_images(f"{tmp_path}/**/*.png")
  assert [pathlib.Path(row.name).name for row in found.rows] == ["a.png", "d.png"]
  assert found.passed_over.counts == {image_folders.PARTIAL: 1, image_folders.LEFTOVER: 1}


def test_a_rule_is_for_what_lies_below_the_folder_that_is_named(tmp_path):
  folder = fill(tmp_path / ".cache" / "x.tmp", {"a.png": encoded()})
  assert listed(folder) == (["a.png"], {})


def test_tars_without_images_and_links_in_tars_are_counted(tmp_path):
  folder = fill(tmp_path / "in", {"a.png": encoded()})
  os.link(folder / "a.png", folder / "b.png")
  (folder / "c.png").symlink_to("a.png")
  (tmp_path / "set").mkdir()
  with tarfile.open(tmp_path / "set" / "a.tar", "w") as tar:
    tar.add(folder, "in")
  with tarfile.open(tmp_path / "set" / "empty.tar", "w"):
    pass
  found = list_images(str(tmp_path / "set"))
  assert [row.name for row in found.rows] in (["a.tar/in/a.png"], ["a.tar/in/b.png"])
  assert found.passed_over.counts == {"link in a tar file": 2, "tar file without an image": 1}
  os.remove(tmp_path / "set" / "a.tar")
  with pytest.raises(ValueError, match="no image among the members"):
    find_images(str(tmp_path / "set"))


def test_an_archive_or_a_drawing_as_the_source_is_named(tmp_path):
  fill(tmp_path, {"in/a.png": encoded(), "b.svg": b"<svg></svg>", "c.bin": b"\0" * 99})
  shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "in")
  for name, message in (
    ("a.zip", "unpack an archive first"),
    ("b.svg", "SVG; a drawing: render it to PNG"),
    ("c.bin", "neither a list of images nor"),
  ):
    with pytest.raises(ValueError, match=message):
      find_images(str(tmp_path / name))
  shutil.copy(tmp_path / "a.zip", tmp_path / "in")
  assert listed(tmp_path / "in") == (["a.png"], {"no image (.zip)": 1})


def test_many_suffixes_are_few_reasons(tmp_path):
  fill(tmp_path, {f"a.s{i}": b"x" for i in range(40)} | {"a.png": encoded()})
  _, counts = listed(tmp_path)
  assert sum(counts.values()) == 40 and len(counts) < 15


def test_patterns_walk_no_circle_and_find_each_file_once(tmp_path):
  folder = fill(tmp_path / "photos [2020]", {"a.png": encoded(), "sub/b.png": encoded()})
  for name in ("one", "two", "three"):  # as many ways as there are leaves, for glob
    (folder / "sub" / name).symlink_to("..")
  (folder / "alias").symlink_to("sub")
  for pattern in ("**/*.png", "**", "*", "**/*"):
    found = list_images(f"{folder}/{pattern}")
    names = [str(pathlib.Path(row.name).relative_to(folder)) for row in found.rows]
    assert names == ["a.png", "alias/b.png" if pattern == "*" else "sub/b.png"], pattern
    assert found.passed_over.counts.keys() == {image_folders.LINKED_AGAIN}
  assert len(find_images(f"{folder}/sub")) == 1 and len(find_images(f"{folder}/s*/**/b*")) == 1
  with pytest.raises(ValueError, match="no file fits"):
    find_images(f"{folder}/**/c*")


@pytest.mark.parametrize(
  "source", ["", "  ", "~nobody-of-this-name/x", "x" * 5000, "a\0b", "*\0", "/dev/null"]
)
def test_sources_that_are_none(source):
  with pytest.raises(ValueError) as failure:
    find_images(source)
  assert len(str(failure.value)) < 500


@pytest.mark.parametrize("first", [True, False])
def test_a_tar_with_numbers_that_are_none_is_named(first, tmp_path):
  with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
    for name in ("a.png", "b.png"):
      member = tarfile.TarInfo(name)
      if first or name == "b.png":
        member.pax_headers = {"GNU.sparse.map": "0,1,x", "GNU.sparse.size": "9"}
      tar.addfile(member)
  with pytest.raises(ValueError, match=r"a\.tar is damaged at byte .*invalid literal"):
    find_images(str(tmp_path / "a.tar"))
