"""The section `pretrain_policy` -> the captioner that pretraining begins with."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from caprl_jax.data.readers.conversations import Example, conversation_of
from caprl_jax.harness.sections import PolicySection
from caprl_jax.hub.compose import compose_policy, with_tower
from caprl_jax.hub.load import Loaded, with_pixel_limits
from caprl_jax.hub.new_policy import policy_from_architecture, shared_tokenizer
from caprl_jax.models.policy import Policy, PolicyConfig, Remat, check_pixel_limits

log = logging.getLogger("caprl_jax.modes.pretrain.policy")

# A compact vocabulary can say it whether or not a stage asks it: mode `caption` does.
DEFAULT_INSTRUCTION = "Please describe this image in detail."


@dataclasses.dataclass(frozen=True)
class PretrainPolicyConfig:
  """The section `pretrain_policy`, one of: a whole captioner (`checkpoint`); the tower of one, a
  text-only model and a new projector (`vision` and `language`); a new model (`architecture`,
  `preprocessor`, `tokenizer`), with the tower of `vision` if that is set.

  checkpoint: a whole captioner.
  vision: the captioner whose tower is taken.
  language: a text-only model (directory, hub name, .gguf, `package:NAME`), or a captioner, whose
    decoder it is.
  architecture: config.json of a new model, as in mode `sft`.
  preprocessor: preprocessor_config.json of a new model.
  tokenizer: model whose tokens a new one shares.
  compact: a new model keeps only the tokens that the stages' data, the questions of
    `pretrain.eval` and `texts` need.
  texts: further texts whose tokens are kept.
  dtype: of activations.
  param_dtype: of parameters (float32 with bfloat16 activations are master weights).
  remat: compute activations of tower and decoder again in the backward pass, which saves memory and
    costs time.
  tower_remat, decoder_remat: the same for one of the two; None: as `remat`.
  min_pixels, max_pixels: in place of the model's own limits on image size; written with it.
  """

  checkpoint: str | None = None
  vision: str | None = None
  language: str | None = None
  architecture: dict | None = None
  preprocessor: dict | None = None
  tokenizer: str | None = None
  compact: bool = True
  texts: tuple[str, ...] = ()
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: bool = False
  tower_remat: bool | None = None
  decoder_remat: bool | None = None
  min_pixels: int | None = None
  max_pixels: int | None = None

  def __post_init__(self):
    check_pixel_limits(self.min_pixels, self.max_pixels)
    keys = ("checkpoint", "vision", "language", "architecture", "tokenizer")
    given = [key for key in keys if getattr(self, key) is not None]
    ways = (keys[:1], keys[1:3], keys[3:], (keys[1], *keys[3:]))
    if tuple(given) not in ways:
      raise ValueError(
        f"{', '.join(given) or 'nothing'} is set; set checkpoint, vision and "
        "language, or architecture and tokenizer (and vision)"
      )


def make_model(section: PretrainPolicyConfig, texts: Sequence[str], seed: int, mesh) -> Loaded:
  """The captioner that the first stage begins with. `texts`: what a compact vocabulary has to
  say.
  """
  return with_pixel_limits(
    _make_model(section, texts, seed, mesh), section.min_pixels, section.max_pixels
  )


def _make_model(section: PretrainPolicyConfig, texts: Sequence[str], seed: int, mesh) -> Loaded:
  dtype, param_dtype = jnp.dtype(section.dtype), jnp.dtype(section.param_dtype)
  remat = Remat.of(section.remat, section.tower_remat, section.decoder_remat)
  options = (mesh, dtype, param_dtype, remat)
  if section.checkpoint is not None:
    asked = dict(dtype=section.dtype, param_dtype=section.param_dtype)
    asked |= dict(tower_remat=remat.tower, decoder_remat=remat.decoder)
    return PolicySection(section.checkpoint, **asked).load(mesh)
  if section.language is not None:
    return compose_policy(section.vision, section.language, jax.random.key(seed), *options)
  needed = [*section.texts, *texts] if section.compact else None
  tokenizer = shared_tokenizer(section.tokenizer, needed, DEFAULT_INSTRUCTION)
  made = policy_from_architecture(
    section.architecture, section.preprocessor, tokenizer, seed=seed, mesh=mesh
  )
  cfg = PolicyConfig.from_hf(made.config, made.preprocessor, dtype=dtype, remat=remat)
  params = jax.tree.map(lambda x: x.astype(param_dtype), made.params)
  made = dataclasses.replace(made, model=Policy(cfg), params=params)
  return with_tower(made, section.vision) if section.vision else made


def texts_of(examples: Sequence[Example]) -> list[str]:
  """All that is said in examples, in one order of the options."""
  return list(
    dict.fromkeys(turn.text for example in examples for turn in conversation_of(example).turns)
  )


def begin(
  section: PretrainPolicyConfig,
  data: Mapping[str, list[Example]],
  asked: Sequence[Example],
  seed: int,
  mesh,
  folder: pathlib.Path | None,
) -> Loaded:
  """The model that a finished stage wrote into `folder`, or the one that the first stage begins
  with.

  Args:
    data: examples of each stage; with `asked`, the evaluation's questions, they say what a compact
      vocabulary needs.
  """
  if folder is not None:
    written = dict(vision=None, language=None, architecture=None, preprocessor=None, tokenizer=None)
    return make_model(
      dataclasses.replace(section, checkpoint=str(folder), **written), [], seed, mesh
    )
  texts: list[str] = []
  if section.tokenizer and section.compact:
    texts = texts_of([example for examples in [*data.values(), asked] for example in examples])
  policy = make_model(section, texts, seed, mesh)
  log.info(
    "%.2fM parameters, vocabulary %d",
    sum(x.size for x in jax.tree.leaves(policy.params)) / 1e6,
    policy.model.cfg.text.vocab_size,
  )
  return policy
