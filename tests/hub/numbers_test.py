"""Sizes in config.json that cannot be sizes are named, with their place."""

import pytest

from caprl_jax.hub.folders.numbers import check_numbers

GOOD = {
  "model_type": "qwen2_5_vl",
  "image_token_id": 7,
  "text_config": {"hidden_size": 16, "num_hidden_layers": 2, "head_dim": None, "rope_theta": 1e4},
  "vision_config": {"depth": 2, "patch_size": [14, 14], "fullatt_block_indexes": [], "else": "x"},
}


def test_good_ones_pass():
  check_numbers(GOOD, "here")


@pytest.mark.parametrize(
  "section, key, value, wanted",
  [
    ("text_config", "hidden_size", "16", "a whole number from 1 to 2,147,483,647"),
    ("text_config", "hidden_size", 16.0, "a whole number"),
    ("text_config", "hidden_size", True, "a whole number"),
    ("text_config", "hidden_size", 0, "a whole number"),
    ("text_config", "hidden_size", 2**63, "a whole number"),
    ("text_config", "num_hidden_layers", 10**6, "a whole number from 1 to 1,000"),
    ("text_config", "rope_theta", float("inf"), "a number above 0"),
    ("text_config", "rope_theta", [1e4], "a number above 0"),
    ("vision_config", "patch_size", [14, 14, 14], "a whole number"),
    ("vision_config", "fullatt_block_indexes", [-1], "a list of whole numbers"),
    ("vision_config", "fullatt_block_indexes", 3, "a list of whole numbers"),
    (None, "image_token_id", None, None),
    (None, "image_token_id", "<image>", "the id of a token"),
  ],
)
def test_others_are_named(section, key, value, wanted):
  config = {name: dict(v) if isinstance(v, dict) else v for name, v in GOOD.items()}
  (config[section] if section else config)[key] = value
  if wanted is None:
    check_numbers(config, "here")
    return
  place = f"{section}.{key}" if section else key
  with pytest.raises(ValueError, match=f"^here: {place} = .* in config.json must be {wanted}"):
    check_numbers(config, "here")
