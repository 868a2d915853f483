"""What a config asks for, a model's sizes, the platform -> how the model attends.

The kernels (`kernels/`) had no TPU and no GPU to run on when they were written: they were compiled
for TPUs, lowered for GPUs and interpreted on CPUs. So `auto` tries them on the chip it is on, and
takes them where they give what XLA gives.
"""

import dataclasses
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.models.attention import AttentionKind, OwnTokens, attend
from caprl_jax.models.decoder import DecoderConfig
from caprl_jax.models.policy import PolicyConfig

Array = jax.Array
Config = TypeVar("Config", PolicyConfig, DecoderConfig)
AttentionChoice = Literal["xla", "auto", "kernel"]
MOST_WIDTH = 256  # of a head
MOST_SHARING = 2048  # of the query heads that share a key head, side by side
_KINDS: dict[str, AttentionKind] = {"tpu": "tpu", "gpu": "gpu", "cpu": "interpreted"}
# Of the largest number. Two neighbours in bfloat16 are 0.004 to 0.008 of themselves apart.
CLOSE = 0.03


@dataclasses.dataclass(frozen=True)
class Heads:
  """Of one kind of attention. part: names it in messages."""

  part: str
  query: int
  key: int
  width: int

  @property
  def problem(self) -> str:
    """Why the kernels do not take it; "" where they do."""
    said = f"the {self.part} has {self.query} query heads on {self.key} key heads of {self.width}"
    if self.width > MOST_WIDTH or self.width % 8:
      return f"{said}, and a head must be a multiple of 8 wide, and at most {MOST_WIDTH}"
    if self.query // self.key * max(self.width, 128) > MOST_SHARING:
      return f"{said}, and those that share a key head must be {MOST_SHARING} wide together at most"
    return ""


def heads_of(cfg: PolicyConfig | DecoderConfig) -> list[Heads]:
  """The kinds of attention in a model."""
  text = cfg.text if isinstance(cfg, PolicyConfig) else cfg
  found = [Heads("decoder", text.num_heads, text.num_kv_heads, text.head_dim)]
  if isinstance(cfg, PolicyConfig):
    vision = cfg.vision
    found.append(Heads("tower", vision.num_heads, vision.num_heads, vision.head_dim))
  return found


def choose_attention(
  cfg: Config, wanted: AttentionChoice, platform: str, name: str
) -> tuple[Config, str]:
  """The config with the attention that is asked for, and what must be said about it: "" where
  nothing must.

  Args:
    wanted: `kernel`: the platform's kernels; `auto`: those, where the chip gives with them what it
      gives without, else XLA.
    platform: of the devices that the model is for, as jax names it. That they are here is not
      needed.
    name: of the model, for messages.

  Raises:
    ValueError: `kernel`, and there are none for the model's heads or for the platform.
  """
  problem = next(filter(None, (heads.problem for heads in heads_of(cfg))), "")
  kind = _KINDS.get(platform)
  if kind is None:
    problem = f"there are kernels for {', '.join(_KINDS)}, and the devices here are {platform}"
  if wanted == "kernel":
    if problem or kind is None:
      raise ValueError(f"{name}: attention = 'kernel': {problem}; use 'xla'")
    slow = f"{name}: kernels are interpreted on a CPU, which is for tests and very slow"
    return _with_kind(cfg, kind), slow if kind == "interpreted" else ""
  if wanted == "xla" or kind == "interpreted":
    return _with_kind(cfg, "xla"), ""
  if not problem and jax.default_backend() == platform:
    problem = _not_close(cfg, kind)
  if problem or kind is None:
    return _with_kind(cfg, "xla"), f"{name}: attention by XLA: {problem}"
  return _with_kind(cfg, kind), f"{name}: attention by kernels"


def _with_kind(cfg: Config, kind: AttentionKind) -> Config:
  if isinstance(cfg, DecoderConfig):
    return dataclasses.replace(cfg, attention=kind)
  vision, text = (dataclasses.replace(part, attention=kind) for part in (cfg.vision, cfg.text))
  return dataclasses.replace(cfg, vision=vision, text=text)


def _not_close(cfg: PolicyConfig | DecoderConfig, kind: AttentionKind) -> str:
  """What is wrong with the kernels on the first device here; "" where nothing is."""
  for heads in heads_of(cfg):
    try:
      apart = difference(heads, kind)
    except Exception as error:  # noqa: BLE001  whatever a compiler raises, there is another way
      return f"they do not compile here ({type(error).__name__}: {str(error)[:200]})"
    if not apart < CLOSE:  # nan is not close
      return (
        f"with the {heads.part}'s heads they are {apart:.2g} away from XLA on this chip, where "
        f"{CLOSE} is the most; please report it with the version of jax"
      )
  return ""


def difference(heads: Heads, kind: AttentionKind) -> float:
  """How far the attention by some kernels and its gradients are from XLA's on the first device
  here, in bfloat16, as a share of the largest number of each array: the largest such share.
  Compared over a prefix that two branches share, with holes, and rows of three segments."""
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])):
    pairs = zip(_tried(heads, kind), _tried(heads, "xla"), strict=True)
    both = ([x.astype(jnp.float32) for x in pair] for pair in pairs)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in both)


def _tried(heads: Heads, kind: AttentionKind) -> list[Array]:
  """What `difference` compares: the output, and gradients."""
  N, R, L, S = 2, 1, 384, 640
  keys = jax.random.split(jax.random.key(0), 6)
  shapes = [(N, L, heads.query), *[(N, L, heads.key)] * 2, *[(R, S, heads.key)] * 2]
  drawn = [
    jax.random.normal(key, (*shape, heads.width), jnp.bfloat16) for key, shape in zip(keys, shapes)
  ]
  valid_RS = jax.random.bernoulli(keys[5], 0.8, (R, S))
  own = OwnTokens(jnp.ones((N, L), bool), jnp.broadcast_to(jnp.arange(L) // 150, (N, L)))

  def run(q: Array, k: Array, v: Array, prefix_k: Array, prefix_v: Array) -> tuple[Array, Array]:
    out = attend(q, (k, v), own, ((prefix_k, prefix_v, valid_RS),), kind)
    return (out.astype(jnp.float32) ** 2).sum(), out

  gradients, out = jax.jit(jax.grad(run, argnums=range(5), has_aux=True))(*drawn)
  return [out, *gradients]
