"""The generator's prompt: ours, or a text. (The released one: released_texts_test.py.)"""

import pytest

from caprl_jax.modes.curate import prompts


def test_ours_and_a_text(tmp_path):
  assert prompts.read_prompt("ours") == (prompts.GENERATION_SYSTEM, "Here is the image")
  (tmp_path / "own.txt").write_bytes("\ufeffFünf Fragen. \n".encode())
  assert prompts.read_prompt(str(tmp_path / "own.txt")) == ("Fünf Fragen. \n", "Here is the image")


@pytest.mark.parametrize(
  "name, text, message", [("none.txt", None, "cannot be read"), ("empty.txt", " \n", "is empty")]
)
def test_files_that_hold_no_prompt(name, text, message, tmp_path):
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    prompts.read_prompt(str(tmp_path / name))
