"""A reward function of texts: what it is given, what becomes of its values, how it fails."""

import logging

import numpy as np
import pytest
from PIL import Image

from caprl_jax.data.rows import QARow, Question
from caprl_jax.errors import UserError
from caprl_jax.harness.rewards.function import load_custom_reward
from caprl_jax.harness.rewards.texts import TextReward

QUESTION = Question("what color?", ("red", "blue"), 0, "color")


class Letters:
  """A tokenizer of which id 0 is "a"."""

  def decode(self, ids):
    return "".join(chr(ord("a") + i) for i in ids)


@pytest.fixture
def rows(tmp_path):
  path = tmp_path / "blue.png"
  Image.new("RGB", (3, 2), "blue").save(path)
  return [
    QARow(b"", (QUESTION,), "red.png", {"color": "red"}),
    QARow(path, (QUESTION,), "blue.png", {"color": "blue", "size": "large"}),
  ]


def made(folder, rows, body: str, parameters: str = "completions, **kwargs") -> TextReward:
  path = folder / "own.py"
  path.write_text(f"def reward({parameters}):\n  {body}\n")
  return TextReward(load_custom_reward(f"{path}:reward"), rows, Letters(), "Describe it.")


# of row 1, then of row 0: two captions each
TOKENS = np.array([[[0, 1, 9], [2, 9, 0]], [[3, 4, 5], [6, 9, 0]]], np.int32)
VALID = np.array([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 0, 0]]], bool)
ACCURACY = np.array([[1.0, 0.5], [np.nan, 0.0]], np.float32)


def call(reward: TextReward):
  return reward(np.array([1, 0], np.int32), TOKENS, VALID, ACCURACY)


def test_it_is_given_lists_as_trl_gives_them(tmp_path, rows):
  reward = made(
    tmp_path, rows, "SEEN.append(kwargs | {'completions': completions}); return [1] * 4"
  )
  seen = reward.custom.function.__globals__["SEEN"] = []
  found, valid = call(reward)
  assert found.tolist() == [[1, 1], [1, 1]] and valid.all() and found.dtype == np.float32
  [columns] = seen
  assert columns["completions"] == ["ab", "c", "def", "g"]
  assert columns["completion_ids"] == [[0, 1], [2], [3, 4, 5], [6]]
  assert columns["prompts"] == ["Describe it."] * 4
  assert columns["name"] == ["blue.png"] * 2 + ["red.png"] * 2
  assert columns["color"] == ["blue"] * 2 + ["red"] * 2
  assert columns["size"] == ["large"] * 2 + [None] * 2
  assert columns["facts"][0] == {"color": "blue", "size": "large"}
  assert columns["accuracy"] == [1.0, 0.5, None, 0.0]
  assert columns["questions"][3][0]["stem"] == "what color?"
  assert "image" not in columns  # opened only for a function that names it


def test_it_is_given_what_it_names_and_the_image_too(tmp_path, rows):
  body = "return [float(one.size[0]) for one in image]"
  reward = made(tmp_path, rows[1:], body, "completions, image, scale=2")
  found, _ = reward(np.zeros(1, np.int32), TOKENS[:1], VALID[:1], ACCURACY[:1])
  assert found.tolist() == [[3.0, 3.0]]
  with pytest.raises(UserError, match=r"wants solution, .*columns: prompts, .*color, size\)"):
    made(tmp_path, rows, "return []", "completions, solution")


def test_none_and_what_is_not_finite_exclude(tmp_path, rows, caplog):
  reward = made(tmp_path, rows, "return [None, float('nan'), True, 0]")
  with caplog.at_level(logging.WARNING):
    found, valid = call(reward)
  assert valid.tolist() == [[False, False], [True, True]] and found[1].tolist() == [1.0, 0.0]
  (said,) = caplog.messages  # None is meant, and is not said
  assert "returned nan for a caption of row 'blue.png'" in said and "'c'" in said


def test_a_coroutine_is_waited_for(tmp_path, rows):
  (tmp_path / "own.py").write_text("async def reward(completions):\n  return [1, 2, 3, 4]\n")
  reward = TextReward(
    load_custom_reward(f"{tmp_path / 'own.py'}:reward"), rows, Letters(), "Describe it."
  )
  assert call(reward)[0].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
  "body, message",
  [
    (
      "return [1.0]",
      "returned 1 values for 4 captions .of the rows from 'blue.png' to 'red.png'.",
    ),
    ("return 3", "returned 3; it must return a list"),
    ("return [1, 2, '0.5', 3]", "returned '0.5' for a caption of row 'red.png': 'def'"),
    (
      "return [1 / (c != 'def') for c in completions]",
      "raised ZeroDivisionError in line 2: .*fails on a caption of row 'red.png': 'def'",
    ),
    ("return [][len(completions)]", "raised IndexError in line 2: .*row 'blue.png': 'ab'"),
    (
      "return 1 / (len(completions) < 4)",
      "raised ZeroDivisionError .*it was given captions of the rows 'blue.png', 'red.png'",
    ),
  ],
)
def test_what_stops_a_run_names_the_row(tmp_path, rows, body, message):
  reward = made(tmp_path, rows, body)
  with pytest.raises(UserError, match=message) as raised:
    call(reward)
  assert str(raised.value).startswith(f"reward.custom = {tmp_path / 'own.py'}:reward ")


def test_without_a_judge_there_is_no_accuracy(tmp_path, rows):
  path = tmp_path / "own.py"
  path.write_text("def reward(completions, accuracy):\n  return accuracy\n")
  custom = load_custom_reward(f"{path}:reward")
  TextReward(custom, rows, Letters(), "")
  with pytest.raises(UserError, match=r"wants accuracy, which.*accuracy is a judge's"):
    TextReward(custom, rows, Letters(), "", judged=False)
