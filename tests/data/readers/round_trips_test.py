"""Questions of all kinds, written and read again: equal, or refused when they are written."""

import pathlib
import tempfile

import pytest
from helpers.qa_rows import png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caprl_jax.data.option_letters import folded
from caprl_jax.data.readers import caprl_json, caprl_parquet, jsonl, tfds
from caprl_jax.data.readers.qa_sources import scan_qa_rows
from caprl_jax.data.rows import QARow, Question, check_rows, image_bytes

quick = settings(
  max_examples=60,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(HealthCheck),
)

_PIECES = st.sampled_from(
  [
    *("\n", "\r", "\r\n", "\u2028", "\x85", "\x0b", "\t", " ", "\0", "\\", '"', "'"),
    *("é", "e\u0301", "北京", "🙂", "red", "Red", "1", "<image>"),
    *("A) ", "B) x", "(C)", "(A) ", "- A) red", "   - B) ", "a. ", "E: ", "Ａ．"),
    *("Cannot answer", "Can not answer based on the caption", "None of the above"),
  ]
)
TEXTS = st.lists(_PIECES, min_size=1, max_size=4).map("".join) | st.text(max_size=20)
WORDS = st.text(st.sampled_from("abcdefgh \u0301\r"), min_size=3, max_size=9).filter(str.strip)


def option_lists(texts) -> st.SearchStrategy[list[str]]:
  return st.one_of(
    st.lists(texts, max_size=5),
    st.lists(texts.filter(str.strip), min_size=2, max_size=4, unique_by=folded),
    st.lists(WORDS, min_size=24, max_size=28, unique_by=folded),
  )


@st.composite
def questions(draw):
  options = draw(option_lists(TEXTS) | option_lists(WORDS))
  gold = draw(st.integers(0, max(len(options) - 1, 0)))
  return Question(draw(TEXTS), tuple(options), gold, draw(TEXTS), draw(TEXTS))


@st.composite
def rows(draw):
  return QARow(
    png((draw(st.integers(0, 255)), 0, 0)),
    tuple(draw(st.lists(questions(), min_size=1, max_size=2))),
    draw(TEXTS),
    draw(st.none() | st.dictionaries(TEXTS, TEXTS, max_size=2)),
  )


def held(row: QARow):
  return row.questions, row.name, row.facts, image_bytes(row)


def write(kind: str, folder: pathlib.Path, row: QARow) -> str:
  path = folder / f"a.{kind}"
  if kind == "parquet":
    caprl_parquet.write_parquet(path, [row])
  elif kind == "json":
    caprl_json.write_json(path, [row], folder / "images")
  else:
    jsonl.write_jsonl(path, [row], image_folder=folder / "images")
  return str(path)


def good(row: QARow) -> bool:
  try:
    check_rows([row], "x")
  except ValueError:
    return False
  return True


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@quick
@given(rows())
def test_what_is_written_reads_back_equal_or_is_refused(kind, row):
  with tempfile.TemporaryDirectory() as folder:
    try:
      source = write(kind, pathlib.Path(folder), row)
    except ValueError as error:
      assert kind == "json" or not good(row), f"refused: {error}"
      assert len(str(error)) < 600
      return
    [read] = scan_qa_rows(source, 0)
    assert isinstance(read, QARow), read
    assert held(read) == held(row)


def test_tfds_reads_back_equal():
  made: list[QARow] = []

  @quick
  @given(rows())
  def collect(row):
    if good(row):
      made.append(row)

  collect()
  with tempfile.TemporaryDirectory() as folder:
    place = tfds.write_tfds(folder, {"train": made})
    read = list(tfds.scan_tfds(str(place), "train"))
    assert len(made) > 10 and [held(row) for row in read] == [held(row) for row in made]


@settings(quick, max_examples=20)
@given(st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=40))
def test_images_of_any_name(name):
  question = Question("Q?", ("a", "b"), 0)
  for place in ("", "~", "a b", "file:", "data:image", "C:\\x", "%41#?"):
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
      for root in (folder, other):  # below the file's folder, and outside it
        file = pathlib.Path(root, place, name)
        if name in (".", "..") or len(name.encode()) > 255:
          return
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(png("red"))
        row = QARow(file, (question,), "row")
        for kind, writer in (("jsonl", jsonl.write_jsonl), ("json", caprl_json.write_json)):
          writer(pathlib.Path(folder, f"rows.{kind}"), [row])
          [read] = scan_qa_rows(f"{folder}/rows.{kind}", 0)
          assert isinstance(read, QARow), read
          assert isinstance(read.image, pathlib.Path) and read.image.samefile(file)
          assert read.name == "row"


def test_a_file_name_that_is_no_utf_8_is_refused(tmp_path):
  file = pathlib.Path(f"{tmp_path}/\udcff.png")
  file.write_bytes(png("red"))
  row = QARow(file, (Question("Q?", ("a", "b"), 0),), "row")
  with pytest.raises(ValueError, match="row 'row': its image's path: .*half of a surrogate pair"):
    jsonl.write_jsonl(tmp_path / "a.jsonl", [row])
  assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
  "options, message",
  [
    (["x = 1\nprint(x)", "print(2)"], "would not read back equal.*write .jsonl or .parquet"),
    (["yes", "no", "Can not answer based on the caption"], "would not read back equal"),
    (["red ", "blue"], "would not read back equal"),
  ],
)
def test_what_the_first_releases_json_has_no_place_for(options, message, tmp_path):
  row = QARow(png("red"), (Question("Q?", tuple(options), 0),), "row")
  with pytest.raises(ValueError, match=f"a.json: row 'row': question 'Q.' {message}"):
    write("json", tmp_path, row)
  for kind in ("jsonl", "parquet"):
    [read] = scan_qa_rows(write(kind, tmp_path, row), 0)
    assert held(read) == held(row)


def test_an_option_that_begins_with_cannot_answer_stays(tmp_path):
  options = ("yes", "no", "Cannot answer: it is cut off", "partly")
  row = QARow(png("red"), (Question("Can the sign be read?", options, 3),), "row", {"sign": "cut"})
  for kind in ("jsonl", "json", "parquet"):
    [read] = scan_qa_rows(write(kind, tmp_path, row), 0)
    assert held(read) == held(row)
