"""Arrays that lie in the memory of the machine that a device is plugged into."""

from typing import Any

import jax

HOST = "pinned_host"  # jax's name of that memory


def lies_in_host_memory(x: Any) -> bool:
  """Of an array, inside jit or not, or a struct with a sharding."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return x.sharding is not None and x.sharding.memory_kind == HOST
  return jax.typeof(x).memory_space == jax.memory.Space.Host


def on_devices(tree: Any) -> Any:
  """Inside jit: with the arrays of the host's memory brought to the devices, split as they were."""
  bring = lambda x: jax.device_put(x, jax.memory.Space.Device) if lies_in_host_memory(x) else x
  return jax.tree.map(bring, tree)


def where_it_was(tree: Any, before: Any) -> Any:
  """Inside jit: what takes the place of `before`, in the memory in which that lies."""
  back = lambda x, old: jax.device_put(x, jax.memory.Space.Host) if lies_in_host_memory(old) else x
  return jax.tree.map(back, tree, before)
