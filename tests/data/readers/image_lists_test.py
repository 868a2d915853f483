"""Lists of images: their formats, what a row may say, what fails and what is refused."""

import base64
import codecs
import io
import json

import pytest
from PIL import Image

from caprl_jax.data.readers.image_sources import find_images
from caprl_jax.data.rows import failure_reason, image_bytes, read_image


def png(value: int = 0) -> bytes:
  file = io.BytesIO()
  pixels = bytes((i * 37 + value) % 251 for i in range(32 * 24 * 3))
  Image.frombytes("RGB", (32, 24), pixels).save(file, "PNG")
  return file.getvalue()


TEXT = base64.b64encode(png()).decode()
LISTS = {
  "rows.jsonl": '{"image": "a.png"}\n\n{"image": "b.png"}\n',
  "rows.json": '[{"image": "a.png"}, {"image": "b.png"}]',
  "names.json": '["a.png", "b.png"]',
  "lines.json": '{"image": "a.png"}\n{"image": "b.png"}\n',
  "rows.txt": "a.png\n\n  b.png\r\n",
  "lines.txt": '{"image": "a.png"}\n{"image": "b.png"}\n',
  "rows.csv": 'image,caption\na.png,"x, y\nz"\nb.png,\n',
  "rows.tsv": "id\timage_path\n1\ta.png\n2\tb.png\n",
  "metadata.jsonl": '{"file_name": "a.png"}\n{"file_name": "b.png"}\n',
  "lists.jsonl": '{"images": ["a.png"]}\n{"image": {"path": "b.png", "bytes": null}}\n',
  "strings.jsonl": '"a.png"\n"b.png"\n',
  "rows.whatever": '{"image": "a.png"}\n{"image": "b.png"}\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", LISTS)
def test_lists(name, encoding, tmp_path):
  for image, value in (("a.png", 1), ("b.png", 2)):
    (tmp_path / image).write_bytes(png(value))
  (tmp_path / name).write_bytes(LISTS[name].encode(encoding))
  rows = find_images(str(tmp_path / name))
  assert [row.name for row in rows] == ["a.png", "b.png"]
  assert [image_bytes(row) for row in rows] == [png(1), png(2)]


def write_rows(path, values) -> str:
  path.write_text("".join(json.dumps({"image": value}) + "\n" for value in values))
  return str(path)


def test_images_in_the_list_have_short_names(tmp_path):
  values = [
    f"data:image/png;base64,{TEXT}",
    base64.b64encode(png(1)).decode(),
    {"path": "c.png", "bytes": base64.b64encode(png(2)).decode()},
    TEXT,  # the first again
  ]
  rows = find_images(write_rows(tmp_path / "rows.jsonl", values))
  assert [image_bytes(row) for row in rows] == [png(0), png(1), png(2)]
  assert rows[2].name == "c.png" and all(len(row.name) == 23 for row in rows[:2])
  (tmp_path / "named.jsonl").write_text(json.dumps({"image": TEXT, "name": "first"}))
  assert [row.name for row in find_images(str(tmp_path / "named.jsonl"))] == ["first"]


def test_images_in_json_lines_stay_in_their_file(tmp_path):
  path = tmp_path / "rows.jsonl"
  write_rows(path, [TEXT, base64.b64encode(png(1)).decode()])
  path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
  rows = find_images(str(path))
  assert not any(isinstance(row.image, bytes) for row in rows)
  assert [image_bytes(row) for row in rows] == [png(0), png(1)]
  write_rows(path, [TEXT, TEXT])
  with pytest.raises(ValueError, match=r"row 'sha256-.*rows\.jsonl:2\): .*"):
    read_image(rows[1])
  path.unlink()
  with pytest.raises(ValueError, match="put the list back"):
    read_image(rows[0])


def test_names_with_line_separators_are_one_line(tmp_path):
  name = "a\u2028\x0b\x85b.png"
  (tmp_path / name).write_bytes(png())
  for suffix, text in ((".txt", name), (".csv", f"image\n{name}\n")):
    (tmp_path / f"rows{suffix}").write_text(text + "\n")
    (row,) = find_images(str(tmp_path / f"rows{suffix}"))
    assert row.name == name and image_bytes(row) == png()


def test_what_cannot_be_read_fails_in_one_short_row(tmp_path):
  values = [
    "missing.png",
    "https://example.org/a.png",
    "data:image/png;base64," + "$" * 70_000,
    ["a.png", "b.png"],
    "",
    "data:image/png;base64," + TEXT[:-400],
  ]
  rows = find_images(write_rows(tmp_path / "rows.jsonl", values))
  assert [row.name for row in rows[:5]] == [
    "missing.png",
    "https://example.org/a.png",
    "rows.jsonl:3",
    "rows.jsonl:4",
    "rows.jsonl:5",
  ]
  said = []
  for row in rows:
    with pytest.raises(ValueError) as failure:
      read_image(row)
    said.append(str(failure.value))
    assert len(said[-1]) < 450 and said[-1].startswith(f"row {row.name!r}")
    assert said[-1].count("rows.jsonl:3") <= 2
    assert failure_reason(failure.value)
  assert "download it first" in said[1] and "no base64" in said[2]
  assert "2 images, but a row has one" in said[3] and "names no image" in said[4]


def test_names_of_files_that_are_no_utf_8(tmp_path):
  with open(bytes(tmp_path) + b"/caf\xe9.png", "wb") as file:
    file.write(png())
  (tmp_path / "rows.jsonl").write_text('{"image": "caf\\udce9.png"}\n')
  (row,) = find_images(str(tmp_path / "rows.jsonl"))
  assert image_bytes(row) == png()


@pytest.mark.parametrize(
  "name, data, message",
  [
    ("rows.jsonl", b'{"image": "a.png"}\n{"img": "b.png"}\n', r"rows\.jsonl:2: .*keys \['img'\]"),
    ("rows.jsonl", b'{"image": 3}', r"rows\.jsonl:1: .*image is 3"),
    ("rows.jsonl", b'{"image": ', r"rows\.jsonl:1: .*not JSON"),
    ("rows.json", b'["a.png", 3]', r"rows\.json\[1\]: .*image is 3"),
    ("rows.json", b'["a.png"', r"rows\.json: not JSON"),
    ("rows.json", b"[]", "has no rows"),
    ("rows.txt", b"\n \n", "has no rows"),
    ("rows.txt", b"a.png\n\xff.png", "not text in UTF-8"),
    ("rows.csv", b"picture\na.png", "no column image.*'picture'"),
    ("rows.csv", b"image\n", "has no rows"),
    ("rows.jsonl", codecs.BOM_UTF16_LE + b"{", "not .*UTF-16|utf-16|not JSON"),
    ("rows.json", b"[" * 100_000, "nested too deeply"),
  ],
)
def test_lists_that_are_none(name, data, message, tmp_path):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=message) as failure:
    find_images(str(tmp_path / name))
  assert len(str(failure.value)) < 500
