"""What a step executes on a mesh, and the seconds that a chip's peaks allow for it.

Nothing of this was measured on an accelerator. The shares of the peaks are what the project aims
at; a run of one's own says more (`train.profile_steps`).
"""

import dataclasses

import numpy as np

from caprl_jax.harness.settings import Settings
from caprl_jax.models.decoder import DecoderConfig
from caprl_jax.modes.plan import cuts
from caprl_jax.modes.plan.arithmetic import (
  Asked,
  Step,
  decoder_flops,
  forward,
  head_flops,
  judge_flops,
  layer_weights,
  learned,
  slot_bytes,
  weight_bytes,
  widened_bytes,
)
from caprl_jax.modes.plan.chips import Chip

# Shares of the peaks that are assumed.
MATRICES, READS, LINKS = 0.4, 0.5, 0.5
HOST_LINK = 10e9  # bytes/s between a chip and its host's memory
LATENCY = 10e-6  # seconds of a sum over the chips that share a layer's matrices
ASSUMED = (
  f"{MATRICES:.0%} of the peak of matrix products, {READS:.0%} of the memory's bandwidth while "
  f"captions are written, {LINKS:.0%} of the links', {LATENCY * 1e6:.0f} microseconds for each "
  "sum over chips then; reading data, evaluations and checkpoints are left out"
)


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of a step on one chip: FLOPs that are executed, bytes that decoding reads, bytes from
  other chips; and the seconds that are predicted for them."""

  flops: float
  read: float
  sent: float
  secs: float


def predict(
  step: Step, settings: Settings, mesh: cuts.Mesh, chip: Chip, host: float = 0.0
) -> dict[str, Stage]:
  """The stages on each chip of a mesh. host: bytes of moments that lie in its host's memory; they
  come and go once in each optimizer step."""
  update = _update(step, settings, mesh, chip)
  moved = 2 * host * settings.step.update.steps / HOST_LINK
  found = {"rollout": _rollout(step, settings, mesh, chip)}
  if step.judge is not None and step.asked is not None:
    found["judge"] = _judge(step, step.judge, step.asked, settings, mesh=mesh, chip=chip)
  return {**found, "update": dataclasses.replace(update, secs=update.secs + moved)}


def _stage(
  chip: Chip, flops: float, sent: float, read: float = 0.0, decoding: float = 0.0
) -> Stage:
  """`decoding`: seconds of a part that has its own roofline."""
  links = sent / (chip.link * LINKS) if sent else 0.0
  return Stage(flops, read, sent, flops / (chip.flops * MATRICES) + links + decoding)


def _gathered(weights: float, mesh: cuts.Mesh) -> float:
  """Bytes that a chip gets from others to have so many bytes of matrices whole along `fsdp`, each
  chip having its part along `tensor`."""
  return weights / mesh.tensor * (mesh.fsdp - 1) / mesh.fsdp


def _summed(activations: float, mesh: cuts.Mesh) -> float:
  """Bytes to add up activations over the chips that share a layer's matrices."""
  return 2 * activations * (mesh.tensor - 1) / mesh.tensor


def _layers_summed(step: Step, tokens: float, mesh: cuts.Mesh) -> float:
  """As `_summed`, twice in each layer of the captioner's decoder."""
  cfg = step.text
  return _summed(2 * cfg.num_layers * tokens * cfg.hidden_size * 2, mesh)


def _rollout(step: Step, settings: Settings, mesh: cuts.Mesh, chip: Chip) -> Stage:
  sampled, text = settings.step.rollout.sampling, step.text
  share = max(step.images // mesh.parts, 1)
  length_BG = step.length_BG[:share]
  loop = cuts.decoding(length_BG, sampled.max_tokens, sampled.chunks)
  rows, slots, rounds, own = (
    np.array(x, float) for x in (loop.rows, loop.slots, loop.rounds, loop.own)
  )
  slot = slot_bytes(text) / mesh.tensor
  prompts = np.where(own > 0, rows, share)
  # Matrices rounded under adapters are widened for each token: written to memory and read again.
  weights = weight_bytes(text, step.layer_item) + 2 * text.num_layers * widened_bytes(text)
  read = weights / mesh.tensor + (rows * slots + prompts * step.prompt) * slot
  one = decoder_flops(text, 1, step.prompt) + head_flops(text, 1)
  products = rows * one / mesh.tensor
  each = np.maximum(read / (chip.bandwidth * READS), products / (chip.flops * MATRICES))
  each += 2 * text.num_layers * LATENCY * (mesh.tensor > 1)
  once = forward(step)
  flops = (once.tower + once.prompt) / mesh.chips
  sent = _gathered(weights, mesh) + _layers_summed(step, share * step.prompt, mesh)
  sent += _layers_summed(step, float((rows * rounds).sum()), mesh)
  found = _stage(chip, flops, sent, float((read * rounds).sum()), float((each * rounds).sum()))
  return dataclasses.replace(found, flops=flops + float((products * rounds).sum()))


def _judge(
  step: Step,
  cfg: DecoderConfig,
  asked: Asked,
  settings: Settings,
  *,
  mesh: cuts.Mesh,
  chip: Chip,
) -> Stage:
  limit = settings.step.rollout.sampling.max_tokens
  micro = settings.step.judge.microbatches
  read = 0.0
  if asked.images:  # captions at the limit's length
    padded = dataclasses.replace(step, length_BG=np.full_like(step.length_BG, limit))
    passes, flops = micro, judge_flops(padded) / mesh.chips
    tokens = limit * step.length_BG.size / mesh.parts
    # Each token that it writes reads its matrices, and what stands before it.
    images = step.images / mesh.parts / micro
    captions = images * (step.length_BG.shape[1] + asked.blind)
    slots = images * asked.head + captions * (limit + asked.tokens + asked.answer_tokens)
    each = (weight_bytes(cfg) + slots * slot_bytes(cfg)) / mesh.tensor
    read = micro * asked.answer_tokens * each
  else:
    cut = cuts.judged(step.length_BG, limit, mesh.parts, micro, asked.blind)
    run = cut.slots * cut.rows * cut.pieces  # a device's captions, with their padding
    more = max(run - step.tokens / mesh.parts, 0.0)
    flops = (judge_flops(step) / mesh.parts + decoder_flops(cfg, more, 0)) / mesh.tensor
    # Each piece: its captions block by block, the questions, and the tokens that are written.
    block = max(limit / 16, 64)
    passes = cut.pieces * (cut.slots / block + 1 + asked.answer_tokens)
    tokens = run + cut.rows * cut.pieces * asked.questions * (asked.tokens + asked.answer_tokens)
  item = 1 if settings.judge.int8 else 2
  passes = 1 if settings.judge.gather_once else passes
  sent = passes * _gathered(layer_weights(cfg) * item, mesh)
  sent += _summed(2 * cfg.num_layers * tokens * cfg.hidden_size * 2, mesh)
  return _stage(chip, flops, sent, read, read / (chip.bandwidth * READS))


def _update(step: Step, settings: Settings, mesh: cuts.Mesh, chip: Chip) -> Stage:
  """Forward, and backward with what it makes again: a layer's activations with `remat`, a block of
  captions always where rows have several."""
  update, limit = settings.step.update, settings.step.rollout.sampling.max_tokens
  pieces = update.minibatches * update.microbatches
  seen = learned(step)
  once, (tower, decoder) = forward(seen), step.trained
  row = cuts.packed(seen.length_BG, limit, mesh.parts, pieces, step.text)
  remat, backward = settings.policy.remat_parts, 2 if decoder else 1
  again = int(remat.decoder)
  blocks = row.blocks if row.in_blocks else 1.0
  # A row's tokens are as many as its blocks have.
  run = blocks * row.size * row.images * pieces if row.in_blocks else row.slots * seen.images
  captions = once.captions / mesh.parts + decoder_flops(
    step.text, max(run - (seen.tokens - seen.length_BG.size) / mesh.parts, 0.0), 0
  )
  flops = (
    once.tower / mesh.parts * ((3 + remat.tower) if tower else 1)
    + once.prompt / mesh.parts * (1 + again + backward)
    + captions * (1 + again + backward + row.in_blocks)
    + once.head / mesh.parts * (1 + backward + (not update.loss.by_token))
  ) / mesh.tensor
  passes = 1 + again + 1  # of gathering: forward, again, backward
  layers = pieces * (passes + blocks * (passes + row.in_blocks))
  gradients = pieces * (1 + blocks) if decoder else 0  # float32, scattered
  sent = _gathered(2.0 * layer_weights(step.text), mesh) * (layers + 2 * gradients)
  tokens = pieces * row.images * step.prompt + run
  sent += _layers_summed(step, tokens, mesh) * (2 + again)
  kl = 1 + settings.step.update.loss.has_kl / (1 + again + backward)  # the reference's pass
  return _stage(chip, flops * kl * update.epochs, sent * kl * update.epochs)
