"""Parquet in the release's layout: there and back, the release's rows, refusals, lazy images."""

import base64
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.qa_rows import ROWS, plain, png

from caprl_jax.data.readers import caprl_parquet, parquet_images
from caprl_jax.data.rows import BadRow, QARow, Question, image_bytes, read_image

# One row exactly as the release's card describes it.
RELEASED = {
  "id": "d976b8c551d62f12920218d54ecb6a58",
  "image": {"bytes": png("red"), "path": None},
  "prompt": [{"role": "user", "content": "<image> Please describe this image in detail."}],
  "data_source": "image_caption_rl",
  "reward_model": {
    "ground_truth": [
      {
        "question": "Which city is mentioned in the company's address?",
        "choices": ["A) 北京市", "B) 上海市", "C) 惠州市", "D) 广州市"],
        "answer": "C",
      }
    ]
  },
}


def test_round_trip_over_several_row_groups(tmp_path, monkeypatch):
  monkeypatch.setattr(caprl_parquet, "ROWS_PER_GROUP", 3)
  caprl_parquet.write_parquet(tmp_path / "a.parquet", ROWS)
  read = list(caprl_parquet.scan_parquet(tmp_path / "a.parquet"))
  assert [plain(row) for row in read] == [plain(row) for row in ROWS]
  assert {row.image.group for row in read} == {0, 1, 2}
  assert pq.read_schema(tmp_path / "a.parquet").names[:5] == list(RELEASED)
  [item] = pq.read_table(tmp_path / "a.parquet").slice(1, 1).to_pylist()
  assert item["reward_model"]["ground_truth"][0] == {
    "question": "第1?",
    "choices": ["A) 北京市", "B) 上海市", "C) A) x"],
    "answer": "B",
  }


def test_the_releases_own_layout(tmp_path):
  for i in range(2):
    pq.write_table(pa.Table.from_pylist([RELEASED]), tmp_path / f"train-0000{i}.parquet")
  for source in (tmp_path, tmp_path / "train-*.parquet"):
    first, second = caprl_parquet.scan_parquet(source)
    assert (
      first.questions
      == second.questions
      == (
        Question(
          "Which city is mentioned in the company's address?",
          ("北京市", "上海市", "惠州市", "广州市"),
          2,
        ),
      )
    )
    assert first.name == RELEASED["id"] and read_image(first).getpixel((0, 0)) == (255, 0, 0)


def test_video_labels_and_bad_rows(tmp_path):
  change = lambda **qa: (
    RELEASED
    | {"reward_model": {"ground_truth": [RELEASED["reward_model"]["ground_truth"][0] | qa]}}
  )
  rows = [
    change(choices=["A. Black", "B. White"], answer="B"),
    change(answer="E"),
    change(choices=[]),
    RELEASED | {"reward_model": {"ground_truth": []}},
    RELEASED,
  ]
  path = tmp_path / "a.parquet"
  pq.write_table(pa.Table.from_pylist(rows, caprl_parquet.SCHEMA.remove(5)), path)
  read = list(caprl_parquet.scan_parquet(path))
  assert read[0].questions[0].options == ("Black", "White") and read[0].questions[0].gold == 1
  assert [row.where for row in read if isinstance(row, BadRow)] == [
    f"{path}, row {i}" for i in (1, 2, 3)
  ]
  assert all(row.message.startswith(row.where) for row in read if isinstance(row, BadRow))
  assert (
    "none of its options ['A', 'B', 'C', 'D']" in read[1].message
    and "holds no questions" in read[3].message
  )


def test_images_of_any_parquet(tmp_path):
  table = pa.table({"image": pa.array([png("red"), png("blue")]), "x": [1, 2]})
  pq.write_table(table, tmp_path / "plain.parquet")
  names = [row.name for row in caprl_parquet.scan_images(tmp_path / "plain.parquet")]
  assert names == ["plain.parquet/0", "plain.parquet/1"]
  assert read_image(list(caprl_parquet.scan_images(tmp_path / "plain.parquet"))[1]).getpixel(
    (0, 0)
  ) == (0, 0, 255)
  struct = pa.table(
    {"image": [{"bytes": png("red"), "path": "a/b.png"}, {"bytes": None, "path": "c.png"}]}
  )
  pq.write_table(struct, tmp_path / "struct.parquet")
  good, none = caprl_parquet.scan_images(tmp_path / "struct.parquet")
  assert (good.name, none.name) == ("a/b.png", "c.png") and good.image.read() == png("red")
  with pytest.raises(
    ValueError, match="row 'c.png': cannot read its image .*row 1 in it.*no image bytes"
  ):
    read_image(none)


def test_spellings_of_choices_and_answers(tmp_path):
  forms = [
    (["(A) red", "(B) blue"], "(B)"),
    (["a) red", "b) blue"], "b"),
    (["A.red", "B.blue"], "B."),
    (["A: red", "B: blue"], "B"),
    (["A、red", "B、blue"], "B"),
    (["Ａ． red", "Ｂ． blue"], "Ｂ"),
    (["red", "blue"], "B"),
    (["A) red", "B) blue"], "B) blue"),
    (["A) red", "B) blue"], "blue"),
    (["A) red", "B) blue"], "1"),
    (["B) blue", "A) red"], "B"),
    (["A) red", "B) blue", "F) Can not answer based on the caption"], "B"),
  ]
  bad = [
    (["red", "b) blue"], "A", "'red' of 'color.' has no letter; write it as 'A. red'"),
    (["B) red", "C) blue"], "B", "have the letters B, C, not A, B, C"),
    (["A) red", "B) blue"], "A) blue", "is none of its options"),
  ]
  item = lambda choices, answer: {"question": "color?", "choices": choices, "answer": answer}
  made = [
    RELEASED | {"reward_model": {"ground_truth": [item(choices, answer)]}}
    for choices, answer, *_ in [*forms, *bad]
  ]
  pq.write_table(pa.Table.from_pylist(made), tmp_path / "a.parquet")
  read = list(caprl_parquet.scan_parquet(tmp_path / "a.parquet"))
  for form, row in zip(forms, read, strict=False):
    assert isinstance(row, QARow), row
    [question] = row.questions
    assert sorted(question.options) == ["blue", "red"], form
    assert question.options[question.gold] == "blue", form
  for (*_, message), row in zip(bad, read[len(forms) :], strict=True):
    assert isinstance(row, BadRow) and re.search(message, row.message), row


def test_paths_without_bytes_are_files_beside_the_parquet(tmp_path):
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "a b.png").write_bytes(png("red"))
  question = RELEASED["reward_model"]
  images = [
    {"bytes": None, "path": "images/a b.png"},
    {"bytes": png("blue"), "path": "images/a b.png"},
    {"bytes": None, "path": f"file://{tmp_path}/images/a%20b.png"},
    {"bytes": None, "path": "images/none.png"},
    {"bytes": None, "path": None},
    None,
  ]
  table = pa.table({"image": images, "reward_model": [question] * len(images)})
  for rows_per_group in (1, 2, 10):
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows_per_group)
    first, bytes_first, url, *bad = caprl_parquet.scan_parquet(tmp_path / "a.parquet")
    assert first.image == url.image == tmp_path / "images" / "a b.png"
    assert first.name == "images/a b.png" and bytes_first.image.read() == png("blue")
    assert [row.where for row in bad] == [f"{tmp_path / 'a.parquet'}, row {i}" for i in (3, 4, 5)]
    assert "image 'images/none.png' is not a file in" in bad[0].message
    assert all(row.message.count("a.parquet") == 1 for row in bad)
  *good, _, _, _ = caprl_parquet.scan_images(tmp_path / "a.parquet")
  assert [image_bytes(row) for row in good] == [png("red"), png("blue"), png("red")]


def test_columns_of_paths_and_lists_of_one(tmp_path):
  (tmp_path / "a.png").write_bytes(png("red"))
  uri = "data:image/png;base64," + base64.b64encode(png("red")).decode()
  for name, column in (
    ("image", ["a.png", uri]),
    ("images", [["a.png"], [uri]]),
    ("images", [[{"bytes": png("red"), "path": "x.png"}]] * 2),
    ("image", [{"path": "a.png"}] * 2),
  ):
    table = pa.table({name: column, "reward_model": [RELEASED["reward_model"]] * 2})
    pq.write_table(table, tmp_path / "a.parquet")
    for scan in (caprl_parquet.scan_parquet, caprl_parquet.scan_images):
      assert [image_bytes(row) for row in scan(tmp_path / "a.parquet")] == [png("red")] * 2
  pq.write_table(pa.table({"image": [["a.png", "a.png"]]}), tmp_path / "a.parquet")
  [row] = caprl_parquet.scan_images(tmp_path / "a.parquet")
  with pytest.raises(ValueError, match="2 images, but a row has one"):
    image_bytes(row)


def test_ground_truth_of_other_shapes_is_a_bad_row(tmp_path):
  for model in (
    {"ground_truth": [{"question": "a"}]},
    {"ground_truth": "no JSON"},
    {"ground_truth": 3},
    "text",
  ):
    table = pa.table({"image": [png("red")], "reward_model": [model]})
    pq.write_table(table, tmp_path / "a.parquet")
    [row] = caprl_parquet.scan_parquet(tmp_path / "a.parquet")
    assert isinstance(row, BadRow) and row.message.startswith(f"{tmp_path / 'a.parquet'}, row 0")


def test_refusals(tmp_path):
  with pytest.raises(ValueError, match="no parquet file there; name"):
    list(caprl_parquet.scan_parquet(tmp_path))
  (tmp_path / "bad.parquet").write_bytes(b"PAR1 cut off")
  with pytest.raises(ValueError, match="bad.parquet: cannot be read as parquet"):
    list(caprl_parquet.scan_parquet(tmp_path / "bad.parquet"))
  pq.write_table(pa.table({"videos": [["a.mp4"]], "prompt": ["x"]}), tmp_path / "video.parquet")
  with pytest.raises(
    ValueError, match="columns .'image', 'reward_model'. are missing .videos are not supported"
  ):
    list(caprl_parquet.scan_parquet(tmp_path / "video.parquet"))
  pq.write_table(pa.table({"image": [1]}), tmp_path / "number.parquet")
  with pytest.raises(ValueError, match="'image' is int64; it must be bytes, paths, or"):
    list(caprl_parquet.scan_images(tmp_path / "number.parquet"))


def test_a_failed_write_leaves_nothing(tmp_path):
  with pytest.raises(ValueError, match="row 'bad': its image .3 bytes. is in no known format"):
    caprl_parquet.write_parquet(
      tmp_path / "a.parquet", [*ROWS, QARow(b"abc", ROWS[0].questions, "bad")]
    )
  assert list(tmp_path.iterdir()) == []


def test_decoded_groups_are_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(caprl_parquet, "ROWS_PER_GROUP", 1)
  monkeypatch.setattr(parquet_images, "KEPT_BYTES", 200)
  groups = parquet_images._Groups()
  monkeypatch.setattr(parquet_images, "_groups", groups)
  caprl_parquet.write_parquet(tmp_path / "a.parquet", ROWS)
  for row in [*caprl_parquet.scan_parquet(tmp_path / "a.parquet")] * 2:
    assert row.image.read() == ROWS[row.image.group].image
    assert sum(kept.nbytes for kept in groups.kept.values()) <= 200 and groups.kept


def test_extra_info_of_others_is_refused_by_place(tmp_path):
  row = RELEASED | {"extra_info": json.dumps({"kinds": ["a", "b"]})}
  pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
  [bad] = caprl_parquet.scan_parquet(tmp_path / "a.parquet")
  assert bad == BadRow(
    f"{tmp_path / 'a.parquet'}, row 0",
    f"{tmp_path / 'a.parquet'}, row 0: extra_info has 2 kinds and 1 provenances for 1 questions",
  )
