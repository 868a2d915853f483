"""Question texts of the released data."""

import pytest

from caprl_jax.data.released import parse_question, question_of
from caprl_jax.data.rows import Question

TEXT = """What colour
is the dog (see A) to C))?
   - A) Brown
   - B) White  
   - C) 3. of May
   - E) Can not answer based on the caption"""


def test_a_stem_of_several_lines_and_the_added_option():
  want = Question("What colour\nis the dog (see A) to C))?", ("Brown", "White", "3. of May"), 1, "dogs")
  assert parse_question(TEXT, "B", "dogs") == want
  assert parse_question(TEXT.replace("E) Can not", "F) Cannot"), "B)", "dogs") == want


@pytest.mark.parametrize("form", ["- {}) {}", "{}) {}", "{}. {}", "  - {}. {}", "({}) {}"])
def test_labels_in_use(form):
  choices = [form.format(letter, text) for letter, text in zip("ABCD", ("red", "A. M.", "blue", "x"))]
  assert question_of("Q?", choices, "B") == Question("Q?", ("red", "A. M.", "blue", "x"), 1)
  assert parse_question("\n".join(["Q?", *choices]), "D") == Question("Q?", ("red", "A. M.", "blue", "x"), 3)


@pytest.mark.parametrize("text, answer, message", [
    (TEXT, "D", "row 7: the answer 'D' of .* is none of its options .'A', 'B', 'C'."),
    (TEXT, "E", "is none of its options"),
    (TEXT, "", "is none of its options"),
    (TEXT.replace("- B", "- A"), "A", "two options 'A': 'Brown' and 'White'"),
    (TEXT.replace("White", "brown"), "A", "differ at most in case"),
    ("no options at all", "A", "is none of its options"),
    ("- A) red\n- B) blue", "A", "has no text"),
])
def test_what_cannot_be_asked_is_refused(text, answer, message):
  with pytest.raises(ValueError, match=message):
    parse_question(text, answer, where="row 7")


def test_a_stem_may_hold_lines_that_look_like_options():
  text = "Look at the chart.\nQ: Which is tallest?\n   - A) red\n   - B) blue"
  assert parse_question(text, "B") == Question("Look at the chart.\nQ: Which is tallest?", ("red", "blue"), 1)


def test_a_choice_without_a_letter():
  with pytest.raises(ValueError, match="'red' of 'Q.' has no letter; write it as 'A. red'"):
    question_of("Q?", ["red", "B) blue"], "B")
