"""A run whose captioner has rounded weights -> how much these change its logits.

The captioner with the weights of its checkpoint need not fit into memory: it is run layer by layer,
each read when its turn comes.
"""

import dataclasses
import functools
import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.data.batches import eval_batches
from caprl_jax.data.usable_rows import NextUsable
from caprl_jax.harness.setup import Run
from caprl_jax.hub.load import init_policy
from caprl_jax.hub.weights import layer_from_tensors
from caprl_jax.models.decoder import DecoderConfig, head_matrix, run_layer
from caprl_jax.models.layers import RMSNorm
from caprl_jax.models.policy import Policy
from caprl_jax.progress import going_on
from caprl_jax.types import Batch, Params

log = logging.getLogger("caprl_jax.harness.training.rounding")

IMAGES, TOKENS = 4, 32  # that are compared: at least, and at most of each


def rounding_effect(made: Run) -> dict[str, float]:
  """How far the logits of the rounded captioner, whose adapters still add nothing, are from its
  checkpoint's, at the text tokens of a few held-out prompts; said in the log. Call under
  `jax.set_mesh`.

  Returns:
    `kl`: KL(checkpoint || rounded) of the next token, the mean in nats; `other_token`: the share of
    tokens after which another token is the likeliest; `logits_rms` and `logits_std`: the root mean
    square of the logits' difference, and their standard deviation, each token's mean aside.
  """
  assert made.policy.stored is not None, "nothing is rounded"
  batch, where_BL = _prompts(made)
  policy = dataclasses.replace(made.policy.model.cfg, text=_plain(made.policy.model.cfg.text))
  with going_on("comparing the rounded captioner's logits with its checkpoint's"):
    given = _embed(made.policy.params, batch, made.policy.model)
    rounded_BPD = _hidden(made.policy.params, given, batch, made.policy.model)
    whole_BPD = _layer_by_layer(made, policy.text, given, batch)
  figures = _compare(made.policy.params, whole_BPD, rounded_BPD, where_BL, policy.text)
  found = {name: float(value) for name, value in jax.device_get(figures).items()}
  log.info(
    "%s base weights: at %d tokens the logits differ by %.3g (root mean square; their deviation is "
    "%.3g), KL %.3g nats, another token is the likeliest after %.1f%%",
    made.settings.policy.lora.base_weights,
    where_BL.size,
    found["logits_rms"],
    found["logits_std"],
    found["kl"],
    100 * found["other_token"],
  )
  return found


def _plain(cfg: DecoderConfig) -> DecoderConfig:
  return dataclasses.replace(cfg, lora=None, remat=False)


def _prompts(made: Run) -> tuple[Batch, np.ndarray]:
  """A batch of held-out rows, and of each the places of its text's last tokens [B, L]."""
  parts = sharding.batch_parts(made.mesh)
  size = parts * -(-IMAGES // parts)
  example = NextUsable(made.eval.example, made.eval_rows, made.bad)
  share = sharding.batch_share(made.mesh, size).tolist()
  batches = eval_batches(example, len(made.eval_rows), size, made.settings.seed, share)
  batch = sharding.put_batch(next(iter(batches))[0], made.mesh)
  prompts = batch.prompts
  tokens_BP, valid_BP = sharding.to_host((prompts.tokens_BP, prompts.valid_BP))
  text_BP = valid_BP & (tokens_BP != made.policy.model.cfg.image_token)
  count = min(TOKENS, text_BP.sum(1).min())
  return batch, np.stack([np.flatnonzero(text_P)[-count:] for text_P in text_BP])


@functools.partial(jax.jit, static_argnums=2)
def _embed(params: Params, batch: Batch, policy: Policy) -> Any:
  return policy.apply({"params": params}, batch.images, batch.prompts, method="embed")


@functools.partial(jax.jit, static_argnums=3)
def _hidden(params: Params, given: Any, batch: Batch, policy: Policy) -> jax.Array:
  x_BPD, position, deep_XBPD = given

  def run(model: Policy) -> jax.Array:
    valid_BP = batch.prompts.valid_BP
    return model.language_model(x_BPD, position, valid_BP, (), deep_XBPD)[0]

  out: Any = policy.apply({"params": params}, method=run)
  return out


def _layer_by_layer(made: Run, text: DecoderConfig, given: Any, batch: Batch) -> jax.Array:
  """Hidden states [B, P, D] of the captioner with its checkpoint's weights."""
  stored, source = made.policy.stored, made.settings.policy.checkpoint
  assert stored is not None
  policy = dataclasses.replace(made.policy.model.cfg, text=text)
  boxed = sharding.abstract_params(lambda: init_policy(policy)(jax.random.key(0)))
  boxed = {"language_model": {"layers": boxed["language_model"]["layers"]}}
  places = jax.tree.map(
    lambda x, place: sharding.fitted(place, x.shape[1:], without=0),
    nn.unbox(boxed),
    sharding.param_shardings(boxed, made.mesh),
  )
  layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], stored.dtype), nn.unbox(boxed))
  x_BPD = given[0]
  for number in range(text.num_layers):
    read = layer_from_tensors(layer, stored.tensors, stored.keys, number, source, places)
    read = read["language_model"]["layers"]
    x_BPD = _run_layer(read, jnp.int32(number), x_BPD, given, batch.prompts.valid_BP, text)
    x_BPD.block_until_ready()  # or the next layer is read into memory before this one is free
  return _norm(made.policy.params["language_model"]["norm"], x_BPD, text)


@functools.partial(jax.jit, static_argnums=5)
def _run_layer(
  params: Params,
  number: jax.Array,
  x_BPD: jax.Array,
  given: Any,
  valid_BP: jax.Array,
  text: DecoderConfig,
) -> jax.Array:
  _, position, deep_XBPD = given
  return run_layer(text, params, number, x_BPD, position, valid_BP, deep_XBPD)


@functools.partial(jax.jit, static_argnums=2)
def _norm(params: Params, x_BPD: jax.Array, text: DecoderConfig) -> jax.Array:
  out: Any = RMSNorm(text.rms_norm_eps).apply({"params": params}, x_BPD)
  return out


@functools.partial(jax.jit, static_argnums=4)
def _compare(
  params: Params, whole_BPD: jax.Array, rounded_BPD: jax.Array, where_BL: Any, text: DecoderConfig
) -> dict[str, jax.Array]:
  """The figures of `rounding_effect`."""
  head_VD = sharding.gathered_head(head_matrix(text, params["language_model"]))

  def logits(hidden_BPD: jax.Array) -> jax.Array:
    hidden_BLD = jnp.take_along_axis(hidden_BPD, where_BL[..., None], axis=1)
    logits_BLV = jnp.einsum(
      "bld,vd->blv",
      hidden_BLD,
      head_VD.astype(hidden_BLD.dtype),
      preferred_element_type=jnp.float32,
    )
    return logits_BLV - logits_BLV.mean(-1, keepdims=True)

  whole_BLV, rounded_BLV = logits(whole_BPD), logits(rounded_BPD)
  whole_logp, rounded_logp = (jax.nn.log_softmax(x) for x in (whole_BLV, rounded_BLV))
  kl_BL = (jnp.exp(whole_logp) * (whole_logp - rounded_logp)).sum(-1)
  return {
    "kl": kl_BL.mean(),
    "other_token": (whole_BLV.argmax(-1) != rounded_BLV.argmax(-1)).mean(),
    "logits_rms": jnp.sqrt(jnp.square(whole_BLV - rounded_BLV).mean()),
    "logits_std": jnp.sqrt(jnp.square(whole_BLV).mean()),
  }
