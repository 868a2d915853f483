"""Question texts and JSON files of the released data."""

import json
import re

import pytest
from PIL import Image

from caprl_jax.data.readers.caprl_json import parse_question, question_of, scan_json, write_json
from caprl_jax.data.rows import BadRow, QARow, Question

TEXT = """What colour
is the dog (see A) to C))?
   - A) Brown
   - B) White  \

   - C) 3. of May
   - E) Can not answer based on the caption"""


def test_a_stem_of_several_lines_and_the_added_option():
  want = Question(
    "What colour\nis the dog (see A) to C))?", ("Brown", "White", "3. of May"), 1, "dogs"
  )
  assert parse_question(TEXT, "B", "dogs") == want
  assert parse_question(TEXT.replace("E) Can not", "F) Cannot"), "B)", "dogs") == want


@pytest.mark.parametrize("form", ["- {}) {}", "{}) {}", "{}. {}", "  - {}. {}", "({}) {}"])
def test_labels_in_use(form):
  choices = [
    form.format(letter, text) for letter, text in zip("ABCD", ("red", "A. M.", "blue", "x"))
  ]
  assert question_of("Q?", choices, "B") == Question("Q?", ("red", "A. M.", "blue", "x"), 1)
  assert parse_question("\n".join(["Q?", *choices]), "D") == Question(
    "Q?", ("red", "A. M.", "blue", "x"), 3
  )


@pytest.mark.parametrize(
  "text, answer, message",
  [
    (TEXT, "D", "row 7: the answer 'D' of .* is none of its options .'A', 'B', 'C'."),
    (TEXT, "E", "is none of its options"),
    (TEXT, "", "is none of its options"),
    (TEXT.replace("- B", "- A"), "A", "two options 'A': 'Brown' and 'White'"),
    (TEXT.replace("White", "brown"), "A", "differ at most in case"),
    ("no options at all", "A", "no option stands behind"),
    ("- A) red\n- B) blue", "A", "has no text"),
  ],
)
def test_what_cannot_be_asked_is_refused(text, answer, message):
  with pytest.raises(ValueError, match=message):
    parse_question(text, answer, where="row 7")


def test_a_stem_may_hold_lines_that_look_like_options():
  text = "Look at the chart.\nQ: Which is tallest?\n   - A) red\n   - B) blue"
  assert parse_question(text, "B") == Question(
    "Look at the chart.\nQ: Which is tallest?", ("red", "blue"), 1
  )


def test_a_choice_without_a_letter():
  with pytest.raises(ValueError, match="'red' of 'Q.' has no letter; write it as 'A. red'"):
    question_of("Q?", ["red", "B) blue"], "B")


# The JSON files of the first release.

WANT = Question("What colour\nis the dog (see A) to C))?", ("Brown", "White", "3. of May"), 1)


def curated(**changes):
  return {"image_path": "a.png", "qa_list": [{"question": TEXT, "answer": "B"}]} | changes


def message(answers, image="a.png"):
  turns = [
    {"role": "system", "content": "You are ..."},
    {
      "role": "user",
      "content": [{"type": "image", "image": image}, {"type": "text", "text": "Describe."}],
    },
    {"role": "answer", "content": answers},
  ]
  return {"message": json.dumps(turns)}


@pytest.fixture
def folder(tmp_path):
  Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
  return tmp_path


@pytest.mark.parametrize("lines", [True, False])
def test_both_forms_of_the_first_release(folder, lines):
  rows = [curated(), message(repr([(TEXT, "B"), (TEXT, "A")]))]
  text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
  (folder / "a.json").write_text(text)
  first, second = scan_json(folder / "a.json")
  assert first == QARow(folder / "a.png", (WANT,), "a.png")
  assert second.image == first.image and [q.gold for q in second.questions] == [1, 0]


@pytest.mark.parametrize(
  "row, problem",
  [
    (curated(image_path="b.png"), "image 'b.png' is not a file in"),
    (curated(qa_list=[]), "no questions"),
    (curated(qa_list=[{"question": TEXT}]), "question 0 is .* must have a question and an answer"),
    (curated(qa_list=[{"question": TEXT, "answer": "D"}]), "question 0: the answer 'D'"),
    (message("__import__('os').remove('a.png')"), "message is not a list of turns"),
    (message("[('Q?', "), "message is not a list of turns"),
    (message(repr([(TEXT, "B")]), image=None), "no image path"),
    ([1], "must be an object"),
    ({"image": "a.png"}, r"no image path .*it has \['image'\]"),
  ],
)
def test_bad_rows_of_the_first_release(folder, row, problem):
  (folder / "a.json").write_text(json.dumps([curated(), row, curated()]))
  good, bad, other = scan_json(folder / "a.json")
  assert good == other and (folder / "a.png").exists()
  assert isinstance(bad, BadRow) and bad.where == f"{folder / 'a.json'}, item 1"
  assert bad.message.startswith(bad.where) and re.search(problem, bad.message)


def test_the_first_release_there_and_back(folder):
  row = QARow(folder / "a.png", (WANT, Question("Q?", ("x", "y"), 1)), "a.png")
  write_json(folder / "b.json", [row])
  assert list(scan_json(folder / "b.json")) == [row]
  stored = QARow((folder / "a.png").read_bytes(), row.questions, "memory")
  write_json(folder / "c.json", [stored], folder / "pictures")
  [read] = scan_json(folder / "c.json")
  assert read.image.parent == folder / "pictures" and read.questions == row.questions


def test_what_the_release_has_no_keys_for_is_kept(folder):
  question = Question("Q?", ("x", "y"), 1, "kind", "who")
  row = QARow(folder / "a.png", (question, WANT), "name", {"color": "red"})
  write_json(folder / "b.json", [row])
  assert list(scan_json(folder / "b.json")) == [row]


@pytest.mark.parametrize(
  "text",
  [
    "What?\n   - A) x = 1\nprint(x)\n   - B) print(2)\n   - C) nothing",
    "What?\n   - A) x\n   - C) y",
  ],
)
def test_options_that_leave_a_letter_out_are_refused(text):
  with pytest.raises(ValueError, match="have the letters .*an option must stand on one line"):
    parse_question(text, "C")


def test_a_stem_keeps_its_blank_lines():
  assert parse_question("a\n\nb\n\n- A) x\r\n\n- B) y\n", "B") == Question("a\n\nb", ("x", "y"), 1)


def test_files_that_are_no_json_of_rows(folder):
  with pytest.raises(ValueError, match="a.json: cannot be read"):
    list(scan_json(folder / "a.json"))
  (folder / "a.json").write_text("[{]")
  with pytest.raises(ValueError, match="a.json: not JSON"):
    list(scan_json(folder / "a.json"))
  (folder / "a.json").write_text("[]")
  with pytest.raises(ValueError, match="a.json: no rows"):
    list(scan_json(folder / "a.json"))
