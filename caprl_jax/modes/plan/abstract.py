"""A training config -> the shapes and places of all that its step takes, without an array."""

import functools
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.harness.sections import PolicySection
from caprl_jax.harness.settings import Settings
from caprl_jax.harness.training.state import rollout_images
from caprl_jax.hub import hub_files
from caprl_jax.hub.load import init_decoder, init_policy
from caprl_jax.hub.opened import read_processor
from caprl_jax.hub.published_configs import CONFIGS
from caprl_jax.inference.image_judge import step_prompt
from caprl_jax.inference.judge import JudgeSection
from caprl_jax.models.attention_choice import choose_attention
from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.families import family_of, is_vision_language
from caprl_jax.models.layers import int8_shardings, to_int8
from caprl_jax.models.policy import Policy, PolicyConfig, limit_pixels
from caprl_jax.models.quantized.codes import quantized_structs
from caprl_jax.models.trainable import merge_trees, split_lora
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.types import (
  Answers,
  Batch,
  Images,
  JudgePrompt,
  OwnReward,
  Prompts,
  Questions,
  Sight,
  Vocabulary,
)

log = logging.getLogger("caprl_jax.modes.plan.abstract")

ANSWER_TOKENS = 32  # between a caption and its score, where the judge sees the image


def read_config(source: str) -> dict:
  """config.json of a checkpoint: a directory's, a published one's, or the hub's. Raises ValueError
  where there is none."""
  path = pathlib.Path(source).expanduser()
  if path.exists() or source.startswith("package:"):
    found = hub_files.resolve_model(source)
    return hub_files.read_config(found) if found.is_dir() else hub_files.read_model(found)[0]
  if source in CONFIGS:
    return CONFIGS[source]
  try:
    return json.loads(
      pathlib.Path(huggingface_hub.hf_hub_download(source, "config.json")).read_text()
    )
  except Exception as error:  # the hub's errors and its HTTP client's have no common base
    raise ValueError(
      f"no config.json for {source!r}: it is no directory, none of "
      f"{sorted(CONFIGS)}, and the Hugging Face hub failed with "
      f"{type(error).__name__}: {error}"
    ) from error


def shallower(config: dict, layers: int | None) -> dict:
  """The same model with fewer layers."""
  if layers is None:
    return config
  cut = lambda c: {
    k: min(v, layers)
    if k in ("num_hidden_layers", "depth")
    else cut(v)
    if isinstance(v, dict)
    else v
    for k, v in c.items()
  }
  new = cut(config)
  vision = new.get("vision_config", {})
  for key in ("deepstack_visual_indexes", "fullatt_block_indexes"):
    if key in vision:
      vision[key] = sorted({min(i, layers - 1) for i in vision[key]})
  return new


def _placed(tree: Any, place) -> Any:
  """Arrays or structs -> structs with a sharding: one for all, or a tree of them."""
  one = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  if isinstance(place, jax.sharding.Sharding):
    return jax.tree.map(lambda x: one(x, place), tree)
  return jax.tree.map(one, tree, place)


def abstract_batch(
  settings: Settings,
  plan: PlanConfig,
  cfg: PolicyConfig,
  judge_cfg: DecoderConfig | PolicyConfig | None,
  mesh: jax.sharding.Mesh,
) -> Batch:
  """A batch's shapes, split over the mesh. There are questions where there is a judge."""
  B, K = rollout_images(settings), settings.data.questions if settings.judge.named else 0
  A, Q, O = plan.options, plan.stem_tokens, plan.option_tokens
  flag = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bool_)
  i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

  def shown(cfg: PolicyConfig, prompt_tokens: int) -> tuple[Images, Prompts]:
    S, I = cfg.vision.pixels.shape(*plan.image)
    P, E = I + prompt_tokens, cfg.vision.in_channels * cfg.vision.pixels.patch_size**2
    patches = jax.ShapeDtypeStruct((B, S, E), jnp.uint8)
    return (
      Images(patches, i32(B, S, 2), flag(B, S), i32(B, I)),
      Prompts(i32(B, P), flag(B, P), i32(B, 3, P), i32(B)),
    )

  batch = Batch(
    *shown(cfg, plan.prompt_tokens),
    Questions(
      stem_BKQ=i32(B, K, Q),
      stem_valid_BKQ=flag(B, K, Q),
      option_BKAO=i32(B, K, A, O),
      option_valid_BKAO=flag(B, K, A, O),
      gold_BK=i32(B, K),
      valid_BK=flag(B, K),
      kind_BK=i32(B, K),
      prior_BKA=jax.ShapeDtypeStruct((B, K, A), jnp.float32),
    ),
    i32(B),
    i32(B, K),
    Sight(*shown(judge_cfg, plan.judge_prompt_tokens))
    if isinstance(judge_cfg, PolicyConfig)
    else None,
  )
  return _placed(batch, sharding.batch_sharding(mesh))


def abstract_answers(settings: Settings, plan: PlanConfig, mesh: jax.sharding.Mesh) -> Answers:
  """Shapes of the answers of a judge that is not on the mesh, split over it."""
  count = settings.step.judge.draws or settings.data.questions
  shape = (rollout_images(settings), settings.step.rollout.group_size, count)
  flag, i32, f32 = (jax.ShapeDtypeStruct(shape, kind) for kind in (bool, jnp.int32, jnp.float32))
  answers = Answers(
    choice_BGK=i32,
    correct_BGK=flag,
    credit_BGK=f32,
    misled_BGK=f32,
    asked_BGK=flag,
    valid_BGK=flag,
    question_BGK=i32,
    score_BGKA=jax.ShapeDtypeStruct((*shape, plan.options), jnp.float32),
  )
  return _placed(answers, sharding.batch_sharding(mesh))


def abstract_reward(settings: Settings, mesh: jax.sharding.Mesh) -> OwnReward:
  """Shapes of what a reward function of one's own gave, split over the mesh."""
  shape = (rollout_images(settings), settings.step.rollout.group_size)
  found = OwnReward(*(jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.float32, bool)))
  return _placed(found, sharding.batch_sharding(mesh))


def model_configs(
  settings: Settings, plan: PlanConfig
) -> tuple[PolicyConfig, DecoderConfig | PolicyConfig | None]:
  """Architectures of captioner and judge, from their config.json alone; None where no judge is on
  the chips (`judge.endpoint`, or none at all). How a captioner cuts images is read from its folder,
  where it has one here."""
  section = settings.policy
  config = shallower(read_config(section.base()), plan.layers)
  here = pathlib.Path(section.base()).expanduser().is_dir()
  cfg = PolicyConfig.from_hf(
    config,
    read_processor(section.base())[1] if here else {},
    dtype=jnp.dtype(section.dtype),
    remat=section.remat_parts,
    lora=section.lora if section.trainable == "lora" else None,
  )
  cfg, notice = limit_pixels(cfg, section.min_pixels, section.max_pixels)
  if notice:
    log.warning("%s", notice)
  platform = "tpu" if plan.topology is not None else jax.default_backend()
  cfg, _ = choose_attention(cfg, section.attention, platform, section.checkpoint)
  if not judge_is_here(settings):
    return cfg, None
  judge_config = shallower(read_config(settings.judge.source), plan.layers)
  if settings.judge.sees_image:
    judge_cfg = PolicyConfig.from_hf(judge_config, {}, dtype=jnp.dtype(settings.judge.dtype))
    judge_cfg = limit_pixels(judge_cfg, None, settings.judge.max_pixels)[0]
  else:
    if is_vision_language(judge_config):
      judge_config = family_of(judge_config).text(judge_config)
    judge_cfg = DecoderConfig.from_hf(judge_config, dtype=jnp.dtype(settings.judge.dtype))
  asked = settings.judge.attention
  judge_cfg, _ = choose_attention(judge_cfg, asked, platform, settings.judge.name)
  return cfg, judge_cfg


def judge_is_here(settings: Settings) -> bool:
  """Whether a judge lies on the chips."""
  return settings.judge.named and settings.judge.endpoint is None


def abstract_parameters(
  init: Callable[[jax.Array], Any], dtype: Any, mesh: jax.sharding.Mesh
) -> tuple[Any, Any]:
  """Shapes of the parameters that `init` makes, in `dtype` and placed on the mesh; and the places
  alone."""
  return placed_parameters(sharding.abstract_params(lambda: init(jax.random.key(0))), dtype, mesh)


def placed_parameters(boxed: Any, dtype: Any, mesh: Any) -> tuple[Any, Any]:
  """As `abstract_parameters`, of shapes that are boxed with their logical axes."""
  places = sharding.param_shardings(boxed, mesh)
  cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), nn.unbox(boxed))
  return _placed(cast, places), places


def policy_parameters(section: PolicySection, boxed: Any, mesh: Any) -> tuple[Any, Any]:
  """As `placed_parameters`, of a captioner: rounded where `lora.base_weights` says so, adapters in
  float32."""
  base = placed_parameters(boxed, section.param_dtype, mesh)[0]
  adapters = placed_parameters(boxed, jnp.float32, mesh)[0]
  params = merge_trees(split_lora(base)[0], split_lora(adapters)[1])
  params = quantized_structs(params, section.lora.base_weights, jnp.dtype(section.param_dtype))
  return params, jax.tree.map(lambda x: x.sharding, params)


def rounded(params: Any) -> Any:
  """Shapes and places of a judge's parameters once `judge.int8` has rounded them."""
  places = int8_shardings(jax.tree.map(lambda x: x.sharding, params))
  return _placed(jax.eval_shape(to_int8, params), places)


def abstract_prompt(
  judge: JudgeSection, judge_rows: int, plan: PlanConfig, place: jax.sharding.Sharding
) -> JudgePrompt:
  """Shapes of the judge's prompt. `judge_rows`: of the judge's embedding."""
  struct = functools.partial(struct_of, place)
  if judge.sees_image:
    tail_L, score_A = struct(ANSWER_TOKENS), struct(len(judge.scores))
    return _placed(step_prompt(tail_L, score_A), place)
  labels = max(plan.options + 1, 6)
  spaced = (struct(judge_rows), struct()) if judge.prompt != "plain" else (None, None)
  writing = (None, None)
  if judge.reading == "generate":
    allowed = struct(judge_rows, dtype=jnp.bool_)
    writing = (struct(judge_rows), Vocabulary(allowed, struct(0), (0,), 0))
  return JudgePrompt(
    struct(plan.judge_prompt_tokens),
    struct(labels, 8),
    struct(labels, 8, dtype=jnp.bool_),
    struct(8),
    struct(labels),
    struct(0 if judge.abstain == "none" else 8),
    *spaced,
    *writing,
  )


def judge_of(
  cfg: DecoderConfig | PolicyConfig,
) -> tuple[Decoder | Policy, DecoderConfig, Callable[[jax.Array], Any]]:
  """The judge's model, the settings of its decoder, and what makes its parameters."""
  if isinstance(cfg, PolicyConfig):
    return Policy(cfg), cfg.text, init_policy(cfg)
  return Decoder(cfg), cfg, init_decoder(cfg)


def struct_of(place: jax.sharding.Sharding, *shape: int, dtype: Any = jnp.int32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
