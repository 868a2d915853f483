"""A config's step on a mesh -> what lies on one chip, by kind.

Arguments (parameters, moments, judge, ...) are exact: shapes and shardings say them. Temporaries
are formulas: arrays that a stage must have at once, as often as the programs compiled so far had
them. Against those (tests/modes/plan/memory_test.py, benchmarks/LOG.md) they are no more than
`ERROR` too small and `MUCH` too large; other models, meshes and GPUs were not compared.
"""

import dataclasses
import math
from typing import Any, cast

import flax.linen as nn
import jax

from caprl_jax import host_memory, sharding
from caprl_jax.harness.settings import Settings
from caprl_jax.harness.training.state import abstract_state, make_optimizer
from caprl_jax.models.attention import QUERY_CHUNK
from caprl_jax.models.decoder import DecoderConfig
from caprl_jax.models.head import chunk_rows
from caprl_jax.models.policy import PolicyConfig
from caprl_jax.models.trainable import split_params, trainable_filter
from caprl_jax.modes.plan import cuts
from caprl_jax.modes.plan.abstract import (
  abstract_batch,
  placed_parameters,
  policy_parameters,
  rounded,
)
from caprl_jax.modes.plan.arithmetic import (
  Asked,
  Step,
  layer_weights,
  matrix_bytes,
  slot_bytes,
  widened_bytes,
)
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.modes.plan.shapes import Shapes, item_bytes
from caprl_jax.rl import sampling

ERROR, MUCH = 0.15, 0.45  # of the temporaries: too small, too large


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one chip.

  arguments: what lies there between steps, by kind; exact.
  stages: what each stage needs besides, by stage and then by kind; estimated. They follow one
    another, so that the largest counts.
  host: of what lies in its host's memory in its stead: the moments.
  """

  arguments: dict[str, float]
  stages: dict[str, dict[str, float]]
  host: float = 0.0

  @property
  def temporaries(self) -> float:
    return max(sum(kinds.values()) for kinds in self.stages.values())

  @property
  def total(self) -> float:
    return sum(self.arguments.values()) + self.temporaries

  @property
  def careful(self) -> float:
    """The total where the estimate is as much too small as it is known to be at worst."""
    return self.total + ERROR * self.temporaries


def on_one(tree: Any) -> int:
  """Bytes of a tree of structs on each device."""
  return sum(
    x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
  )


def estimate(
  settings: Settings, shapes: Shapes, step: Step, mesh: cuts.Mesh, arguments: "Arguments"
) -> Memory:
  """What the step takes on each chip of a mesh."""
  sizes = _Sizes(settings, shapes, step, mesh, arguments.gradient, arguments.host)
  stages = {"rollout": sizes.rollout()}
  if step.asked is not None:
    stages["judge"] = sizes.judge(step.asked)
  stages["update"] = sizes.update()
  return Memory(arguments.kinds, stages, arguments.host)


@dataclasses.dataclass(frozen=True)
class Arguments:
  """Bytes on one chip of what lies there between steps, by kind, and of a float32 gradient; and in
  its host's memory."""

  kinds: dict[str, float]
  gradient: int
  host: float


def arguments(settings: Settings, plan: PlanConfig, shapes: Shapes, mesh: cuts.Mesh) -> Arguments:
  """What a step is given, as its shapes and shardings say."""
  devices = sharding.abstract_mesh(sharding.MeshConfig(*dataclasses.astuple(mesh)), mesh.chips)
  section = settings.policy
  params, places = policy_parameters(section, shapes.policy_params, devices)
  kind = trainable_filter(section.trainable, shapes.policy.family)
  (chosen, base), chosen_places = split_params(params, kind), split_params(places, kind)[0]
  tx, memory = make_optimizer(settings)[0], settings.optimizer.moment_memory
  state = abstract_state(chosen, tx, chosen_places, devices, memory)
  host = on_one([x for x in jax.tree.leaves(state.opt_state) if host_memory.lies_in_host_memory(x)])
  judge = None
  if shapes.judge is not None:
    judge, _ = placed_parameters(shapes.judge_params, settings.judge.dtype, devices)
    if settings.judge.int8:
      judge = rounded(judge)
  batch = abstract_batch(settings, plan, shapes.policy, shapes.judge, devices)
  trained = on_one(state.params)
  found = {
    "policy, trained": trained,
    "policy, frozen": on_one(base),
    "optimizer": on_one(state.opt_state) - host,
    "judge": on_one(judge),
    "reference": trained if settings.step.update.loss.has_kl else 0,
    "batch": on_one(batch),
  }
  gradient = trained * 4 // item_bytes(section.param_dtype)
  kinds = {kind: float(count) for kind, count in found.items() if count}
  return Arguments(kinds, gradient, float(host))


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """What the formulas read. All of them: bytes on one chip, by kind."""

  settings: Settings
  shapes: Shapes
  step: Step
  mesh: cuts.Mesh
  gradient: int
  host: float

  @property
  def item(self) -> int:
    """Bytes of an activation."""
    return item_bytes(self.settings.policy.dtype)

  def slot(self, cfg: DecoderConfig) -> float:
    """A token's keys and values; heads that `tensor` does not divide are whole on each chip."""
    split = self.mesh.tensor if cfg.num_kv_heads % self.mesh.tensor == 0 else 1
    return slot_bytes(cfg) * self.item / 2 / split

  def head(self, cfg: DecoderConfig, item: float) -> float:
    """The unembedding, gathered along its width."""
    return cfg.vocab_size * cfg.hidden_size * item / self.mesh.tensor

  def logits(self, cfg: DecoderConfig, tokens: float) -> float:
    """Of so many tokens, float32."""
    return tokens * cfg.vocab_size * 4 / self.mesh.tensor

  def scores(self, heads: int, rows: float, queries: int, keys: float) -> float:
    """Attention's, float32, for as many queries as are taken at once."""
    return rows * heads / self.mesh.tensor * min(queries, QUERY_CHUNK) * keys * 4

  def inner(self, width: int, tokens: float, item: float) -> float:
    """Between an MLP's matrices: two inputs and their product."""
    return 3 * tokens * width / self.mesh.tensor * item

  def widened(self) -> dict[str, float]:
    """A layer's matrices while it runs, where they are stored in 8 or 4 bits."""
    count = widened_bytes(self.step.text) * self.item / 2 / self.mesh.tensor
    return {"widened weights": count} if count else {}

  def kept(self, cfg: Any, layers: int, tokens: float, again: bool) -> float:
    """Activations of all layers that a backward pass reads. again: the others are made again."""
    if again:
      return layers * tokens * cfg.hidden_size * self.item
    each = 8 * cfg.hidden_size + 3 * cfg.intermediate_size / self.mesh.tensor
    return layers * tokens * each * self.item

  # ---- the stages ----

  def rollout(self) -> dict[str, float]:
    """The larger of encoding (prompts and images) and of decoding."""
    step, cfg, sampled = self.step, self.step.text, self.settings.step.rollout.sampling
    share = step.images / self.mesh.parts
    rows, slot = round(share * step.length_BG.shape[1]), self.slot(cfg)
    moved = self.mesh.fsdp > 1 or self.settings.policy.param_dtype != self.settings.policy.dtype
    rounded = self.settings.step.rollout.weights == "int8"
    matrices = layer_weights(cfg) * (1 if rounded else self.item) / self.mesh.tensor
    if widened_bytes(cfg):  # codes are not cast
      matrices = matrix_bytes(cfg) / self.mesh.tensor * (self.mesh.fsdp > 1)
    head = self.head(cfg, self.item) * (1 if cfg.tie_embeddings else 2)
    weights = matrices * (moved or rounded) + head * moved
    trunk, chunks = sampling.cache_stages(sampled.max_tokens)
    prefix = share * step.prompt * slot
    caches = rows * trunk[-1] * slot * (1 if chunks else 2)
    if chunks:  # the loops in a chunk hold its caches several times
      chunk = cuts.chunk_rows(rows, sampled.chunks)
      caches += 4 * chunk * sampled.max_tokens * slot
      prefix += 3 * chunk * step.prompt * slot
    decode = {
      "weights": weights,
      **self.widened(),
      "prompts": prefix,
      "decode caches": caches,
      "logits": 3 * self.logits(cfg, rows),
    }
    images = cuts.prefill_images(max(round(share), 1), step.tower.patches)
    encode = {
      "weights": weights,
      **self.widened(),
      "prompts": share * step.prompt * slot,
      "activations": self._encoding(self.shapes.policy, step.tower.patches, step.prompt, images),
    }
    return max(decode, encode, key=_total)

  def _encoding(self, cfg: PolicyConfig, patches: int, prompt: int, images: int) -> float:
    """One layer's work on so many images at once, in the tower or in the decoder."""
    vision: Any = cfg.vision
    tower = 2.5 * self.scores(vision.num_heads, images, patches, patches)
    tower = max(tower, self.inner(vision.intermediate_size, images * patches, self.item))
    decoder = 2.5 * self.scores(cfg.text.num_heads, images, prompt, prompt)
    return max(tower, decoder, self.inner(cfg.text.intermediate_size, images * prompt, self.item))

  def judge(self, asked: Asked) -> dict[str, float]:
    """One piece of the captions, and what is asked about each."""
    step, cfg = self.step, self.step.judge
    limit = self.settings.step.rollout.sampling.max_tokens
    assert cfg is not None
    weights = self._judge_weights(cfg)
    if isinstance(self.shapes.judge, PolicyConfig):
      return weights | self._image_judge(self.shapes.judge, asked, limit)
    cut = cuts.judged(
      step.length_BG, limit, self.mesh.parts, self.settings.step.judge.microbatches, asked.blind
    )
    runs = cut.rows * asked.questions
    keys = asked.head + limit + asked.tokens
    scores = self.scores(cfg.num_heads, runs, asked.tokens, keys)
    options = runs * asked.branches
    after = self.scores(cfg.num_heads, options, asked.branch_tokens, keys + asked.branch_tokens)
    tokens = max(runs * asked.tokens, options * asked.branch_tokens)
    beside = 1.2 if weights else 1.9  # or what is gathered anew lies beside the scores
    left = runs * asked.tokens if asked.answer_tokens or asked.branches else 0
    return weights | {
      "captions' keys": (cut.rows * limit + left) * self.slot(cfg),
      "activations": max(beside * max(scores, after), self.inner(cfg.intermediate_size, tokens, 4)),
      "logits": 2
      * self.logits(cfg, min(runs * asked.logits, self.settings.step.judge.chunk_tokens)),
    }

  def _judge_weights(self, cfg: DecoderConfig) -> dict[str, float]:
    """The judge's parameters, where they are gathered along `fsdp` before it is asked."""
    section = self.settings.judge
    if self.mesh.fsdp == 1 or not section.gather_once:
      return {}
    item = 1 if section.int8 else item_bytes(section.dtype)
    head = self.head(cfg, item) * (1 if cfg.tie_embeddings else 2)
    tower = 0
    if isinstance(self.shapes.judge, PolicyConfig):
      tower = sum(x.size for x in jax.tree.leaves(nn.unbox(self.shapes.judge_params["visual"])))
    return {"weights": (layer_weights(cfg) + tower) * item / self.mesh.tensor + head}

  def _image_judge(self, cfg: PolicyConfig, asked: Asked, limit: int) -> dict[str, float]:
    """Image and prompt once, and a group's captions, an empty one with them, after each."""
    step = self.step
    assert asked.images is not None
    images = max(step.images / self.mesh.parts / self.settings.step.judge.microbatches, 1)
    captions, tokens = images * (step.length_BG.shape[1] + asked.blind), limit + asked.tokens
    kept = tokens + asked.answer_tokens
    scores = self.scores(cfg.text.num_heads, captions, tokens, asked.head + tokens)
    inner = self.inner(cfg.text.intermediate_size, captions * tokens, self.item)
    encoding = self._encoding(cfg, asked.images.patches, asked.head, round(images))
    return {
      "captions' keys": (images * asked.head + captions * kept) * self.slot(cfg.text),
      "activations": max(1.9 * scores, inner, encoding),
    }

  def update(self) -> dict[str, float]:
    """The larger of the unembedding's backward pass and of the captions'."""
    step, cfg, update = self.step, self.step.text, self.settings.step.update
    limit = self.settings.step.rollout.sampling.max_tokens
    length_BG = step.length_BG[: step.learned]
    pieces = update.minibatches * update.microbatches
    row = cuts.packed(length_BG, limit, self.mesh.parts, pieces, cfg)
    tokens, vision = row.images * row.slots, cast(Any, self.shapes.policy.vision)
    reach = min(limit - 1, row.slots - row.size) if row.in_blocks else 0
    keys = row.images * (reach + row.slots) * self.slot(cfg)
    window = (
      row.images * (reach + row.size) * self.slot(cfg) * 4 / self.item if row.in_blocks else 0
    )
    remat = self.settings.policy.remat_parts
    kept = self.kept(cfg, cfg.num_layers, row.images * step.prompt, remat.decoder)
    if step.trained[0]:
      patches = row.images * step.tower.patches
      kept += self.kept(vision, vision.depth, patches, remat.tower)
    head = self.head(cfg, 4) if step.trained[1] else 0
    size = cfg.vocab_size * cfg.hidden_size
    logits = self.logits(cfg, chunk_rows(tokens, update.chunk_tokens, size))
    exact_kl = 0.0
    if update.loss.kl_is_exact:
      exact_kl = 3 * self.logits(cfg, min(tokens, update.chunk_tokens))
    unembedding = {
      "gradients": self.gradient,
      **self.widened(),
      "unembedding": head + self.head(cfg, self.item),
      "logits": 2.5 * logits + exact_kl,
      "keys and values": keys,
      "activations": kept + 2 * tokens * cfg.hidden_size * self.item,
    }
    scores = max(
      self.scores(vision.num_heads, row.images, 512, step.tower.patches),
      self.scores(cfg.num_heads, row.images, step.prompt, step.prompt),
      self.scores(cfg.num_heads, row.images, row.size, QUERY_CHUNK + reach),
    )
    block = self.kept(cfg, cfg.num_layers, row.images * row.size, remat.decoder)
    captions = {
      "gradients": 5 * self.gradient,
      **self.widened(),
      "unembedding": 2 * head,
      "keys and values": 2 * keys + 3 * window,
      "activations": kept + 2 * block + 4 * scores,
    }
    # Moments from the host's memory, and those that go back to it.
    optimizer = {"gradients": self.gradient, "moments": 2 * self.host} if self.host else {}
    return max(unembedding, captions, optimizer, key=_total)


def _total(kinds: dict[str, float]) -> float:
  return sum(kinds.values())
