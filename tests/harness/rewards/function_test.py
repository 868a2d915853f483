"""`reward.custom` -> a function of arrays or of texts, and what is said of one that is neither."""

import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.errors import UserError
from caprl_jax.harness.rewards.function import ARRAYS, load_custom_reward
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
