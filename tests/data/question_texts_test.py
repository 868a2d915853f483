"""What a captioner's own model is asked."""

import pytest

from caprl_jax.data.question_texts import question_text
from caprl_jax.data.rows import Question


@pytest.mark.parametrize(
  "last, times", [("blue", 1), ("None of the above", 1), ("none of the above.", 0)]
)
def test_none_of_the_above_stands_there_once(last, times):
  question = Question("Q?", ("red", last), 0)
  text = question_text(question, [1, 0], none_of_above=True)
  assert text.count("None of the above") == times
  assert text.lower().count("none of the above") == 1
