"""Name of a published recipe -> the settings of its algorithm.

A preset fills in what a config leaves open: sections judge, rollout, reward, advantage,
policy_update, optimizer; the captioner's prompt, limits of pixels and type of parameters; those of
released code also how batches are made of images (`data`). What the config file or the command line
says stands; an optimizer whose learning rate the file gives, and a captioner whose instruction it
gives, are the file's altogether. Paper and released code differ, so each has its own.
"""

import logging
from typing import Any

import ml_collections

from caprl_jax.json_files import shown

log = logging.getLogger("caprl_jax.config.presets")

_OFFICIAL_JUDGE = dict(
  reading="generate",
  prompt="official",
  abstain="last",
  temperature=0.6,
  max_tokens=10,
  draws=8,
  replacement=True,
  independent=True,
)
_OFFICIAL_DATA = dict(shape_buckets=1)  # a batch is any images
_PROMPT = "Please describe this image in detail."
# 3,136 pixels are 56x56, four tokens. Qwen2.5-VL's own limit is 12.8 million.
_OFFICIAL_POLICY = dict(
  instruction=_PROMPT, param_dtype="float32", min_pixels=3136, max_pixels=1_000_000
)
_SAMPLING = dict(max_tokens=4096, temperature=1.0)
# 75,285 images x 8 captions are 588 batches of 1,024, times 30 episodes. The release stopped near
# step 1,800, where the rate is still 0.978 of its peak.
_OFFICIAL_OPTIMIZER = dict(
  name="adamw",
  learning_rate=1e-6,
  schedule="cosine",
  schedule_steps=17_640,
  warmup_steps=20,
  warmup_from_zero=True,
  final_fraction=0.1,
  b1=0.9,
  b2=0.95,
  weight_decay=0.0,
  clip_norm=1.0,
)

PRESETS = {
  # The released launch script, reward server and OpenRLHF fork of CapRL-3B: no shuffling, no KL,
  # REINFORCE with a leave-one-out baseline, whitened over the batch, accuracy times two (which
  # the whitening undoes), a token mean within each micro-batch of 4 captions.
  "official_caprl_3b": dict(
    judge=dict(_OFFICIAL_JUDGE, shuffle=False, abstain_letter="next"),
    rollout=dict(group_size=8, sampling=_SAMPLING, end_cut=True),
    reward=dict(accuracy=2.0),
    advantage=dict(estimator="rloo", whiten="released"),
    policy_update=dict(
      loss=dict(surrogate="reinforce", aggregation="set_token_mean", set_captions=4, kl=0.0)
    ),
    optimizer=_OFFICIAL_OPTIMIZER,
    data=_OFFICIAL_DATA,
    policy=_OFFICIAL_POLICY,
  ),
  # The released training script of CapRL++ (verl) for images: options shuffled with "F) Can not
  # answer" after them, a length term, the sampler's log-probabilities as the old ones, a mean
  # per caption first.
  "official_caprlpp": dict(
    judge=dict(_OFFICIAL_JUDGE, shuffle=True, abstain_letter="F"),
    rollout=dict(group_size=8, sampling=_SAMPLING),
    reward=dict(accuracy=1.0, length=0.2, length_full_tokens=2048, length_zero_tokens=3072),
    advantage=dict(estimator="rloo"),
    policy_update=dict(
      loss=dict(
        surrogate="clip",
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,  # verl's default; it cuts nothing while one step follows one rollout
        aggregation="sequence_mean",
        kl=0.0,
      )
    ),
    # Betas and weight decay are verl's defaults, which the script leaves alone.
    optimizer=dict(
      name="adamw",
      learning_rate=1e-5,
      schedule="constant",
      warmup_steps=20,
      warmup_from_zero=True,
      b1=0.9,
      b2=0.999,
      weight_decay=0.01,
      clip_norm=1.0,
      moment_dtype="bfloat16",  # torch's are of the parameters' type
    ),
    data=_OFFICIAL_DATA,
    # verl cuts the data's "<image> Please ..." at the marker and leaves the space. The script sets
    # no limits of pixels: the checkpoint's are in force.
    policy=dict(
      instruction=f" {_PROMPT}", param_dtype="bfloat16", min_pixels=None, max_pixels=None
    ),
  ),
  # What arXiv 2509.22647 describes: shuffled options, GRPO with its KL. It prints no G, N, KL
  # weight, clip range or learning rate: 8 and 8 are the released code's, 0.04 and 0.2 those of
  # GRPO (arXiv 2402.03300), whose aggregation it is too.
  "paper": dict(
    judge=dict(_OFFICIAL_JUDGE, shuffle=True, abstain_letter="F"),
    rollout=dict(group_size=8, sampling=_SAMPLING),
    reward=dict(accuracy=1.0),
    advantage=dict(estimator="grpo"),
    policy_update=dict(
      loss=dict(
        surrogate="clip",
        clip_low=0.2,
        clip_high=0.2,
        aggregation="sequence_mean",
        kl=0.04,
        kl_estimator="k3",
        kl_in="loss",
      )
    ),
    optimizer=_OFFICIAL_OPTIMIZER,
    policy=_OFFICIAL_POLICY,  # of pixels and types the paper says nothing
  ),
  # Ours: every question once, read from logits over two rotated orders, the same for a group;
  # false statements cost what true ones earn half of; no token of a cut caption is learned from.
  "caprl_jax": dict(
    judge=dict(
      reading="letter_argmax",
      prompt="official",
      abstain="last",
      shuffle=True,
      permutations=2,
      draws=0,
      independent=False,
    ),
    rollout=dict(group_size=8, sampling=_SAMPLING),
    reward=dict(
      accuracy=1.0, misled=0.5, length=0.2, length_full_tokens=2048, length_zero_tokens=3072
    ),
    advantage=dict(estimator="rloo"),
    policy_update=dict(
      loss=dict(
        surrogate="clip",
        clip_low=0.2,
        clip_high=0.28,
        aggregation="token_mean",
        kl=0.0,
        importance="truncate",
        mask_truncated=True,
      )
    ),
    optimizer=dict(
      name="adamw",
      learning_rate=1e-6,
      schedule="cosine",
      warmup_steps=20,
      final_fraction=0.1,
      b1=0.9,
      b2=0.95,
      weight_decay=0.0,
      clip_norm=1.0,
    ),
    policy=_OFFICIAL_POLICY,
  ),
}


# A section that has this key is the config's altogether: a schedule belongs to its rate, and a
# captioner's size of images and type of parameters to the task that its instruction says.
_OWN = (("optimizer", "learning_rate"), ("policy", "instruction"))

_FILLED_BY = "_filled_by_preset"  # an attribute of a config: the preset that was expanded in it

# What of a section is no part of an algorithm, and stays when a preset takes the section's place.
_RESOURCES = {
  "judge": (
    *("source", "endpoint", "dtype", "int8", "attention", "gather_once"),
    *("microbatches", "chunk_tokens", "blind"),
  ),
  "reward": (),
  "advantage": (),
  "policy_update": ("microbatches", "chunk_tokens"),
}


def rename(config: ml_collections.ConfigDict, name: Any) -> None:
  """Gives a config another preset and expands it, in place.

  What a config says beside a preset of its own goes with any preset, and stays. Of a config without
  one, judge protocol, reward, advantage and loss make room for the preset's; sizes, models and
  optimizer stay.

  Raises:
    ValueError: as `expand`.
  """
  own, judge = config.get("preset"), _judge(config)
  with config.unlocked():
    config.preset = name
    if own is None and isinstance(name, str) and name in PRESETS:
      for section, kept in _RESOURCES.items():
        old: Any = config.get(section, {})
        if section != "judge" or not judge.get("sees_image"):
          config[section] = ml_collections.ConfigDict({key: old[key] for key in old if key in kept})
  expand(config)


def expand(config: ml_collections.ConfigDict) -> None:
  """Fills in what `config.preset` says and the config does not, in place; twice is the same as
  once. A judge that sees the images, to which no preset's questions apply, is left as it is.

  Raises:
    ValueError: no such preset; or the config was filled in by another one before.
  """
  name = config.get("preset")
  if name is None:
    return
  if not isinstance(name, str) or name not in PRESETS:
    raise ValueError(f"config.preset = {shown(name)} is none of {sorted(PRESETS)}")
  before = vars(config).get(_FILLED_BY, name)
  if before != name:
    raise ValueError(
      f"config.preset = {name!r}, but the config is filled in with {before!r} already: name the "
      f"preset where the config is loaded, as load_config(FILE, {{'preset': {name!r}}}) or "
      f"--config.preset={name}"
    )
  kept: list[str] = []
  values = dict(PRESETS[name])
  if _judge(config).get("sees_image"):
    del values["judge"]
  for section, key in _OWN:
    own: Any = config.get(section, {})
    if key in own:
      kept += [
        f"{section}.{key} = {own.get(key)!r}"
        for key, value in values.pop(section).items()
        if own.get(key) != value
      ]
  with config.unlocked():
    _fill(config, values, "", kept)
  object.__setattr__(config, _FILLED_BY, name)  # no key of it
  if kept:
    log.info("preset %s, but for what the config says: %s", name, ", ".join(kept))


def _judge(config: ml_collections.ConfigDict) -> Any:
  return config.get("judge", {})


def _fill(config: Any, values: dict, place: str, kept: list[str]) -> None:
  """Sets the keys of `values` that `config` lacks; where it has another value, adds the key's
  dotted name, which begins with `place`, and that value to `kept`."""
  for key, value in values.items():
    if isinstance(value, dict):
      if key not in config:
        config[key] = ml_collections.ConfigDict()
      _fill(config[key], value, f"{place}{key}.", kept)
    elif key not in config:
      config[key] = value
    elif config[key] != value:
      kept.append(f"{place}{key} = {config[key]!r}")
