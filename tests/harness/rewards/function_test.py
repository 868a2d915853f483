"""`reward.custom` -> a function of arrays or of texts, and what is said of one that is neither."""

import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.errors import UserError
from caprl_jax.harness.rewards.function import ARRAYS, given_reward, load_custom_reward
from caprl_jax.harness.settings import read_settings
from caprl_jax.rl.reward import RewardArrays

SIZES = dict(images=2, captions=3, tokens=5, questions=4)


def load(folder, source: str, name: str = "reward"):
  path = folder / "rewards.py"
  path.write_text(source)
  return load_custom_reward(f"{path}:{name}")


def test_the_parameters_say_which_it_is(tmp_path):
  texts = load(tmp_path, "def reward(completions, color, **kwargs):\n  return [0.0]\n")
  assert texts.of_texts and texts.takes_all and texts.names == ("completions", "color")
  arrays = load(tmp_path, "def reward(accuracy_BG, length_BG, slope=0.1):\n  return accuracy_BG\n")
  assert not arrays.of_texts and arrays.names == ("accuracy_BG", "length_BG")
  assert texts.sha256 != arrays.sha256 and len(texts.sha256) == 64


def test_a_file_may_import_what_lies_beside_it(tmp_path):
  (tmp_path / "lengths_of_mine.py").write_text("LIMIT = 7\n")
  source = (
    "import dataclasses\nfrom lengths_of_mine import LIMIT\n"
    "@dataclasses.dataclass\nclass Limit:\n  tokens: int = LIMIT\n"
    "def reward(length_BG):\n  return length_BG / Limit().tokens\n"
  )
  found = load(tmp_path, source).array_reward(arrays(length_BG=jnp.array([[7, 14]])))
  assert found.reward_BG.tolist() == [[1.0, 2.0]] and found.reward_BG.dtype == jnp.float32
  assert found.valid_BG.tolist() == [[True, True]]


def arrays(**values) -> RewardArrays:
  """With `ended_BG` of the shape of what is given."""
  [(_, shape)] = [(name, value.shape) for name, value in values.items()]
  return RewardArrays(**{name: None for name in ARRAYS} | {"ended_BG": np.ones(shape)} | values)


def test_a_mask_excludes(tmp_path):
  source = "def reward(length_BG):\n  return length_BG * 1.0, length_BG > 3\n"
  found = load(tmp_path, source).array_reward(arrays(length_BG=jnp.array([[2, 4]])))
  assert found.valid_BG.tolist() == [[False, True]]


@pytest.mark.parametrize(
  "source, name, message",
  [
    (
      "def reward(completions): return []",
      "rewards",
      "no function 'rewards'; did you mean 'reward'",
    ),
    ("def f(x): pass\nreward = 3", "reward", r"no function 'reward'.*functions: f\)"),
    ("def reward(completion): return []", "reward", r"\(completion\); did you mean 'completions'"),
    ("def reward(accuracy_BG, color): pass", "reward", "a function of texts has a parameter"),
    ("def reward(**kwargs): pass", "reward", "one of arrays has parameters among tokens_BGT"),
    ("import nothing_of_this_name", "reward", "cannot be imported: ModuleNotFoundError"),
    ("raise SystemExit(1)", "reward", "cannot be imported: SystemExit"),
  ],
)
def test_a_function_that_cannot_be_taken(tmp_path, source, name, message):
  with pytest.raises(UserError, match=message):
    load(tmp_path, source, name)


def test_a_function_of_the_program():
  def reward(completions):
    return [0 / 0]

  def other(completions):
    return [1.0]

  other.__name__ = "reward"
  with given_reward(reward) as spec, pytest.raises(UserError, match="ZeroDivisionError in line"):
    found = load_custom_reward(spec)
    assert spec == "python:reward" and found.of_texts and found.function is reward
    with given_reward(other):
      assert load_custom_reward(spec).sha256 != found.sha256
    assert load_custom_reward(spec).sha256 == found.sha256
    try:
      reward([])
    except ZeroDivisionError as error:
      found.fail(error)
  with pytest.raises(UserError, match="a function of the program that began this run"):
    load_custom_reward(spec)
  with pytest.raises(UserError, match="reward = 3 is no function"), given_reward(3):
    pass


@pytest.mark.parametrize("spec", ["reward", "rewards.py", "rewards.py:", ":f", "rewards.py:f()"])
def test_a_place_that_is_none(spec):
  with pytest.raises(UserError, match="must be FILE.py:FUNCTION"):
    load_custom_reward(spec)


def test_a_file_that_is_not_there(tmp_path):
  with pytest.raises(UserError, match="none.py cannot be read: No such file"):
    load_custom_reward(f"{tmp_path / 'none.py'}:reward")


@pytest.mark.parametrize(
  "body, message",
  [
    (
      "return accuracy_BG.mean()",
      r"its reward is of shape \(\), .* \[images, captions\] = \(2, 3\)",
    ),
    ("return 1.0", "its reward is 1.0, and must be an array"),
    ("return accuracy_BG, accuracy_BG[0]", r"its mask is of shape \(3,\)"),
    (
      "return accuracy_BG if accuracy_BG.sum() > 1 else 0 * accuracy_BG",
      "raised TracerBoolConversionError in line 2.* no `if` on a value",
    ),
    ("return numpy.asarray(accuracy_BG)", "raised NameError in line 2"),
    ("return {}['color']", "raised KeyError in line 2: 'color'"),
  ],
)
def test_a_function_of_arrays_is_tried_on_shapes(tmp_path, body, message):
  custom = load(tmp_path, f"def reward(accuracy_BG):\n  {body}\n")
  with pytest.raises(UserError, match=message):
    custom.check_shapes(**SIZES)


def test_every_array_has_a_shape(tmp_path):
  custom = load(
    tmp_path, f"def reward({', '.join(ARRAYS)}):\n  return accuracy_BG + kind_BGK.sum(-1)\n"
  )
  custom.check_shapes(**SIZES)


def test_what_only_a_judge_gives_is_refused_without_one(tmp_path):
  load(tmp_path, "def reward(tokens_BGT, length_BG, ended_BG): pass").check_unjudged()
  custom = load(tmp_path, "def reward(accuracy_BG, length_BG, kind_BGK): pass")
  with pytest.raises(UserError, match="wants accuracy_BG, kind_BGK, which only a judge gives"):
    custom.check_unjudged()


def test_a_judge_or_a_function_must_be_there(tmp_path, caplog):
  """Without a judge there is no gate and no filter, and no question is asked."""
  config = {
    "policy": {"checkpoint": "x"},
    "data": {"train": "a", "eval": "b", "batch_size": 4},
    "gate": {"ideal": "{color}"},
    "question_filter": {"informed": ("{color}",)},
    "rollout": {"group_size": 2, "sampling": {"max_tokens": 4}},
    "train": {"steps": 1},
  }
  with pytest.raises(ValueError, match=r"neither a judge nor a reward.*judge.source.*custom"):
    read_settings(config)
  with caplog.at_level("INFO", "caprl_jax"):
    settings = read_settings(config | {"reward": {"custom": "own.py:f"}})
  assert "no judge is named: reward.custom scores captions" in caplog.text
  assert settings.data.questions == 0 and settings.gate.ideal is None
  assert settings.question_filter.informed == () and settings.step.reward.accuracy == 0
  assert not settings.judge.named and settings.judge.name == "none"
  with pytest.raises(ValueError, match="questions = 0 and batch_size = 4 must be at least 1"):
    read_settings(config | {"judge": {"source": "x"}})
