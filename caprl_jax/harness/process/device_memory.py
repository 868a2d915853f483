"""What a run keeps on its devices, by kind -> what is said where they are full."""

from collections.abc import Iterable, Mapping
from typing import Any

from caprl_jax.json_files import cut

GIB = 1 << 30

# Keys, and what they do for memory.
KNOBS = (
  ("policy_update.microbatches", "twice as many halve what the update computes and keeps"),
  ("policy.remat=True", "the update computes activations twice and keeps few of them"),
  ("judge.microbatches", "twice as many halve what the judge computes and keeps"),
  ("judge.gather_once=False", "a judge split over mesh.fsdp stays split while it is asked; slower"),
  ("rollout.sampling.chunks", "twice as many halve the caches of the captions that end last"),
  ("rollout.sampling.max_tokens", "caches and activations of captions are in proportion to it"),
  ("data.batch_size, rollout.group_size", "all that is no parameter is in proportion to both"),
  ("policy.max_pixels", "tokens per image are in proportion to it"),
  ("policy.trainable=lora", "no gradient and no moments of the model's own parameters"),
  ("policy.lora.base_weights=nf4", "with adapters: the decoder's matrices in 4 bits, not in 16"),
  ("optimizer.moment_dtype=bfloat16", "the first moments take half"),
  ("optimizer.moment_memory=host", "the moments lie in the host's memory but during updates"),
  ("mesh.fsdp", "parameters and moments are split over so many devices; more chips help likewise"),
)

_held: dict[str, int] = {}  # bytes on one device


def hold(kind: str, leaves: Iterable[Any]) -> None:
  """Takes note of arrays that stay on the devices, in place of what was noted of that kind. What
  lies in the host's memory does not count.

  Args:
    leaves: arrays of jax.
  """
  from caprl_jax.host_memory import lies_in_host_memory  # jax's; --help does without

  on_devices = (x for x in leaves if x.addressable_shards and not lies_in_host_memory(x))
  shards = (x.addressable_shards[0].data for x in on_devices)
  hold_bytes(kind, sum(x.size * x.dtype.itemsize for x in shards))


def hold_bytes(kind: str, count: int) -> None:
  """As `hold`: of what is only planned. count: bytes on one device."""
  _held.pop(kind, None)
  if count:
    _held[kind] = count


def hold_planned(kinds: Mapping[str, int], devices: int) -> None:
  """As `hold_bytes`. kinds: bytes by kind, on all devices together."""
  for kind, count in kinds.items():
    hold_bytes(kind, count // devices)


def what_is_full(error: BaseException) -> str:
  """What a person can read, and do, where XLA says that memory does not suffice."""
  first = str(error).partition("\n")[0]
  lines = [f"an accelerator's memory does not suffice ({cut(first, 300)})."]
  if _held:
    kinds = sorted(_held.items(), key=lambda item: -item[1])
    sizes = ", ".join(f"{kind} {count / GIB:.2f} GiB" for kind, count in kinds)
    lines.append(f"On each device lie: {sizes}; what programs compute comes on top.")
  lines.append("What takes less (--config.mode=plan says before a run what fits):")
  return "\n".join([*lines, knobs()])


def knobs() -> str:
  """`KNOBS`, a line each."""
  return "\n".join(f"  {key}: {effect}" for key, effect in KNOBS)
