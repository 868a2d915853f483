"""Mode `dataset`: the table, every kind of bad row with its place, copies in each format."""

import io
import json

import pytest
from PIL import Image

from caprl_jax import main
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.readers import jsonl
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import QARow, Question
from caprl_jax.modes.dataset import outputs

COLOR = Question("What color is it?", ("red", "dark blue", "tan"), 1, "color", "by hand")
YES = Question("Is it red?", ("yes", "no"), 0, "yes/no")


@pytest.fixture
def folder(tmp_path):
  for i, size in enumerate([(28, 28), (280, 140), (56, 56), (28, 28)]):
    Image.new("RGB", size, (60 * (i % 3), 0, 0)).save(tmp_path / f"{i}.png")
  Image.new("RGB", (56, 56), "blue").save(tmp_path / "4.jpg")
  rows = [
    QARow(
      tmp_path / f"{i}.png",
      (COLOR, YES)[: 1 + i % 2],
      f"row {i}",
      {"color": "x"} if i == 0 else None,
    )
    for i in range(4)
  ]
  jsonl.write_jsonl(tmp_path / "good.jsonl", [*rows, QARow(tmp_path / "4.jpg", (COLOR,), "row 4")])
  return tmp_path


def run(folder, source, *more):
  return main.main(
    [
      "main",
      "--config=configs/dataset.py",
      f"--config.dataset.input={source}",
      f"--workdir={folder / 'work'}",
      *more,
    ]
  )


def figures(folder):
  return json.loads((folder / "work" / "dataset.json").read_text())


def test_the_table(folder, capsys):
  assert run(folder, folder / "good.jsonl") == 0
  got = figures(folder)
  assert (got["rows"], got["bad"], got["images"], got["repeated_images"]) == (5, 0, 4, 1)
  assert got["formats"] == {"PNG": 4, "JPEG": 1} and got["width"] == {
    "min": 28,
    "median": 56,
    "max": 280,
  }
  assert got["questions"] == 7 and got["questions_an_image"] == {"min": 1, "median": 1, "max": 2}
  # 3136 pixels at least: 28x28 becomes 56x56, four tokens; 280x140 stays, 10 x 5.
  assert got["image_tokens"] == {"min": 4, "median": 4, "max": 50} and got["with_facts"] == 1
  assert sum(bucket["images"] for bucket in got["buckets"]) == 5 and got["buckets"][-1] == {
    "tokens": 56,
    "images": 1,
  }
  assert got["kinds"] == {
    "color": {"questions": 5, "options": {"3": 5}, "gold": {"B": 5}, "longest": 5},
    "yes/no": {"questions": 2, "options": {"2": 2}, "gold": {"A": 2}, "longest": 2},
  }
  assert got["provenance"] == {"by hand": 5, "(none)": 2}
  shown = capsys.readouterr().err
  assert (
    "5, of which bad 0" in shown
    and "4 distinct, 1 repeated" in shown
    and "row 'row 3' repeats the image of 'row 0'" in shown
  )
  page = (folder / "work" / "dataset.html").read_text()
  assert page.count("<article") == 5 and "dark blue" in page and "data:image/jpeg" in page
  assert not (folder / "work" / "bad_rows.jsonl").exists()


@pytest.fixture
def mixed(folder):
  """Good lines and one of each way to be bad; returns the file and the lines that are bad."""
  good = (folder / "good.jsonl").read_text().splitlines()
  (folder / "cut.jpg").write_bytes((folder / "4.jpg").read_bytes()[:-200])
  question = {"stem": "Q?", "options": ["a", "b"], "gold": 0}
  line = lambda image, *questions: json.dumps({"image": image, "questions": questions})
  lines = [
    good[0],
    "{",
    line("none.png", question),
    good[1],
    line("0.png", question | {"gold": 5}),
    line("cut.jpg", question),
    line("0.png", question, question),
    good[4],
  ]
  (folder / "mixed.jsonl").write_text("\n".join(lines))
  return folder / "mixed.jsonl", [2, 3, 5, 6, 7]


def test_every_bad_row_has_its_line(folder, mixed, capsys):
  path, lines = mixed
  assert run(folder, path, f"--config.dataset.output={folder / 'out.jsonl'}") == 2
  bad = [json.loads(line) for line in (folder / "work" / "bad_rows.jsonl").read_text().splitlines()]
  assert sorted(row["where"] for row in bad) == [f"{path}:{n}" for n in lines]
  said = {row["where"].rpartition(":")[2]: row["message"] for row in bad}
  assert "not JSON" in said["2"] and "not a file" in said["3"] and "has gold 5" in said["5"]
  assert "cannot read its image" in said["6"] and "asked 2 times" in said["7"]
  shown = capsys.readouterr().err
  assert all(message in shown for message in said.values())
  assert (
    "5 bad rows of 8" in shown
    and "--config.dataset.bad_rows=drop" in shown
    and not (folder / "out.jsonl").exists()
  )
  page = (folder / "work" / "dataset.html").read_text()
  assert "Bad rows" in page and "asked 2 times" in page


@pytest.mark.parametrize("output", ["out.jsonl", "out.json", "out.parquet", "tfds"])
def test_copies_hold_the_good_rows(folder, mixed, output):
  path, _ = mixed
  target = f"tfds:{folder / 'tfds'}" if output == "tfds" else folder / "new" / output
  assert (
    run(
      folder,
      path,
      f"--config.dataset.output={target}",
      "--config.dataset.bad_rows=drop",
      "--config.dataset.name=mixed",
    )
    == 0
  )
  source = (
    f"tfds:{folder / 'tfds' / 'caprl_qa' / 'mixed' / '1.0.0'}:train"
    if output == "tfds"
    else str(target)
  )
  rows = read_qa_rows(source, 0)
  want = read_qa_rows(str(folder / "good.jsonl"), 0)
  strip = (lambda q: (q.stem, q.options, q.gold)) if output == "out.json" else (lambda q: q)
  assert [list(map(strip, row.questions)) for row in rows] == [
    list(map(strip, want[i].questions)) for i in (0, 1, 4)
  ]
  if output != "out.json":
    assert [(row.name, row.facts) for row in rows] == [
      (want[i].name, want[i].facts) for i in (0, 1, 4)
    ]
  if output.startswith("out.js"):  # one folder that can be moved
    assert all(row.image.parent == folder / "new" / "out_images" for row in rows)


@pytest.mark.parametrize("output", ["out.jsonl", "tfds"])
def test_an_output_takes_nobody_s_place(folder, output, capsys):
  target = f"tfds:{folder / 'tfds'}" if output == "tfds" else folder / output
  options = [folder / "good.jsonl", f"--config.dataset.output={target}"]
  assert run(folder, *options) == 0 and run(folder, *options) == 0
  assert "is there, with these rows" in capsys.readouterr().err
  other = run(folder, *options, "--config.dataset.max_rows=2")  # its own, with other rows
  assert other == (2 if output == "tfds" else 0)
  (folder / "work" / "outputs.json").unlink()
  assert run(folder, "nowhere.jsonl", options[1]) == 2
  assert "is there already, and was not written from the workdir" in capsys.readouterr().err


def test_a_kill_once_the_output_is_there_does_not_make_it_a_strangers(folder, monkeypatch):
  rows, target = read_qa_rows(str(folder / "good.jsonl"), 0), str(folder / "killed.jsonl")
  write_json = outputs.write_json

  def kill(path, value):
    if (folder / "killed.jsonl").exists():
      raise KeyboardInterrupt
    write_json(path, value)

  monkeypatch.setattr(outputs, "write_json", kill)
  with pytest.raises(KeyboardInterrupt):
    outputs.write_output(rows, target, "train", "caprl", folder)
  monkeypatch.setattr(outputs, "write_json", write_json)
  outputs.check_output(target, "curate.output", "caprl", folder)
  outputs.write_output(rows, target, "train", "caprl", folder)
  assert [row.questions for row in read_qa_rows(target, 0)] == [row.questions for row in rows]
  with pytest.raises(ValueError, match="was not written from the workdir"):
    outputs.check_output(target, "curate.output", "caprl", folder / "another")


def test_repeated_images_are_merged(folder):
  assert (
    run(
      folder,
      folder / "good.jsonl",
      f"--config.dataset.output={folder / 'out.jsonl'}",
      "--config.dataset.repeated_images=merge",
    )
    == 0
  )
  rows = read_qa_rows(str(folder / "out.jsonl"), 0)
  assert [row.name for row in rows] == ["row 0", "row 1", "row 2", "row 4"]
  assert rows[0].questions == (COLOR, YES) and rows[1].questions == (COLOR, YES)


@pytest.mark.parametrize("output", ["out.txt", "folder"])
def test_unknown_outputs_are_refused_before_anything_is_read(folder, output, capsys):
  assert run(folder, "nowhere.jsonl", f"--config.dataset.output={output}") == 2
  assert "write FILE.jsonl, FILE.json, FILE.parquet or tfds:FOLDER" in capsys.readouterr().err


def test_max_rows_and_another_processor(folder):
  assert (
    run(
      folder,
      folder / "good.jsonl",
      "--config.dataset.max_rows=2",
      "--config.dataset.checkpoint=configs/quickstart_policy",
    )
    == 0
  )
  got = figures(folder)
  assert got["rows"] == 2 and got["image_tokens"]["max"] != 50


def test_images_are_inspected_in_full():
  file = io.BytesIO()
  Image.new("RGB", (30, 20)).save(file, "PNG")
  (fact,) = ImageCheck(None)([QARow(file.getvalue(), (COLOR,), "a")])
  assert (fact.format, fact.width, fact.height, fact.bytes) == ("PNG", 30, 20, len(file.getvalue()))


def test_images_that_the_processor_refuses_are_bad_rows(folder, capsys):
  Image.new("RGB", (2, 900)).save(folder / "thin.png")
  rows = [QARow(folder / f"{name}.png", (COLOR,), name) for name in ("0", "thin", "1")]
  jsonl.write_jsonl(folder / "some.jsonl", rows)
  out = f"--config.dataset.output={folder / 'out.jsonl'}"
  assert run(folder, folder / "some.jsonl", out) == 2
  (bad,) = (folder / "work" / "bad_rows.jsonl").read_text().splitlines()
  assert json.loads(bad)["reason"] == "too narrow" and "over 200 times" in bad
  assert run(folder, folder / "some.jsonl", out, "--config.dataset.bad_rows=drop") == 0
  assert "dropped 1 of 3 rows (too narrow: 1); all are in" in capsys.readouterr().err
  assert [row.name for row in read_qa_rows(str(folder / "out.jsonl"), 0)] == ["0", "1"]
  got = figures(folder)
  assert (got["rows"], got["bad"], got["too_narrow"]) == (3, 1, 1)
