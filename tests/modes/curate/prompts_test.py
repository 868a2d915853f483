"""The generator's prompt: ours, a text, or the strings of a program that is not run."""

import hashlib
import logging

import pytest

from caprl_jax.modes.curate import prompts

PROGRAM = """import does_not_exist
SYS_PROMPT='''Write five \\"questions\\".
#### 1. **Which?**\x20\x20\x20
'''
PROMPT='Here it is'
raise SystemExit
"""
WRITTEN = 'Write five "questions".\n#### 1. **Which?**   \n'


def test_ours_and_a_text(tmp_path):
  assert prompts.read_prompt(None) == (prompts.GENERATION_SYSTEM, "Here is the image")
  (tmp_path / "own.txt").write_bytes("\ufeffFünf Fragen. \n".encode())
  assert prompts.read_prompt(str(tmp_path / "own.txt")) == ("Fünf Fragen. \n", "Here is the image")


def test_a_programs_strings_are_read_to_the_byte_and_it_is_not_run(tmp_path, caplog, monkeypatch):
  (tmp_path / "gen_qa.py").write_text(PROGRAM)
  got = prompts.read_prompt(str(tmp_path / "gen_qa.py"))
  assert got == (WRITTEN, "Here it is")
  assert "is not the one that was released" in caplog.text
  monkeypatch.setattr(prompts, "RELEASED_SHA256", hashlib.sha256(WRITTEN.encode()).hexdigest())
  with caplog.at_level(logging.INFO):
    prompts.read_prompt(str(tmp_path / "gen_qa.py"))
  assert "the released prompt, to the byte" in caplog.text


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("none.txt", None, "cannot be read"),
    ("empty.txt", " \n", "is empty"),
    ("other.py", "SYSTEM = 'x'", "assigns no string SYS_PROMPT"),
    ("other.py", "SYS_PROMPT = f'{x}'", "assigns no string SYS_PROMPT"),
    ("broken.py", "SYS_PROMPT = '''", "is no Python"),
  ],
)
def test_files_that_hold_no_prompt(name, text, message, tmp_path):
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    prompts.read_prompt(str(tmp_path / name))
