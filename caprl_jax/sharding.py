"""Mesh, the table from logical to mesh axes, shardings of a tree. The only module that spells a
mesh axis.

Mesh axes: `data` replicates parameters, `fsdp` shards them over their width and is gathered on use,
`tensor` splits heads, MLPs and vocabulary. A batch is split over `data` and `fsdp` together.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils

from caprl_jax.host_memory import HOST

MESH_AXES = ("data", "fsdp", "tensor")
RULES = (
  ("vocab", "tensor"),
  ("embed", "fsdp"),
  ("vision_embed", "fsdp"),
  ("mlp", "tensor"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("norm", None),
  ("layers", None),
)
P = jax.sharding.PartitionSpec

MomentMemory = Literal["device", "host"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1, at most once, takes what is left.

  data: devices that hold the same parameters and share the batch.
  fsdp: devices that share the batch and the parameters.
  tensor: devices that share each layer's matrices.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


def mesh_sizes(cfg: MeshConfig, count: int) -> tuple[int, int, int]:
  """Devices along each axis of a mesh of `count`. Raises ValueError when the sizes do not multiply
  to that."""
  sizes = [cfg.data, cfg.fsdp, cfg.tensor]
  known = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise ValueError(
      f"config.mesh {dict(zip(MESH_AXES, sizes))}: sizes are positive, and at most one is -1"
    )
  if -1 in sizes and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  if -1 in sizes or math.prod(sizes) != count:
    raise ValueError(
      f"config.mesh {dict(zip(MESH_AXES, sizes))} does not multiply to the {count} devices here"
    )
  return sizes[0], sizes[1], sizes[2]


def make_mesh(cfg: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
  """A mesh over all devices. Raises ValueError as `mesh_sizes`."""
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(cfg, len(devices))
  kinds = (jax.sharding.AxisType.Auto,) * 3
  if devices[0].platform == "tpu":  # orders devices by the torus they sit on
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
      return jax.sharding.Mesh(_across_slices(sizes, devices), MESH_AXES, axis_types=kinds)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=kinds, devices=devices)
  return jax.sharding.Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=kinds)


def abstract_mesh(cfg: MeshConfig, count: int) -> Any:
  """A mesh of `count` devices that need not exist, for the shapes of what lies on each. Raises
  ValueError as `mesh_sizes`."""
  kinds = (jax.sharding.AxisType.Auto,) * 3
  return jax.sharding.AbstractMesh(mesh_sizes(cfg, count), MESH_AXES, axis_types=kinds)


def _across_slices(sizes: tuple[int, int, int], devices: list) -> np.ndarray:
  """Devices of several TPU slices, ordered within each by its torus. Slices are joined by a slower
  network, which only the axis `data` crosses: only sums of gradients go over it.

  Raises ValueError where that axis cannot be split over the slices.
  """
  slices = len({device.slice_index for device in devices})
  if sizes[0] % slices:
    raise ValueError(
      f"config.mesh.data = {sizes[0]}, and the devices are {slices} slices, which only this axis "
      f"may cross; make it a multiple of {slices}"
    )
  return mesh_utils.create_hybrid_device_mesh(
    [sizes[0] // slices, *sizes[1:]],
    [slices, 1, 1],
    devices,
    allow_split_physical_axes="v5 lite" in devices[0].device_kind.lower(),  # as jax.make_mesh does
  )


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  """A mesh of this process's devices, for work that processes do apart: the same one where there is
  one process. Parameters are split over all of its devices."""
  if jax.process_count() == 1:
    return mesh
  return make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  return jax.sharding.NamedSharding(mesh, P())


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The first axis of every array of a batch over `data` and `fsdp`."""
  return jax.sharding.NamedSharding(mesh, P(("data", "fsdp")))


def cache_sharding(mesh: jax.sharding.Mesh, kv_heads: int) -> jax.sharding.NamedSharding:
  """Keys or values [layers, rows, slots, heads, width]: rows as a batch lies, heads over `tensor`
  where it divides them."""
  size = mesh.shape["tensor"]
  heads = "tensor" if size > 1 and kv_heads % size == 0 else None
  return jax.sharding.NamedSharding(mesh, P(None, ("data", "fsdp"), None, heads))


def batch_parts(mesh: jax.sharding.Mesh) -> int:
  """Into how many parts a batch is split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def _constrain(tree: Any, spec: P) -> Any:
  """Inside jit: every array lies as `spec` says, where there is a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)


def microbatches(tree: Any, count: int) -> Any:
  """[B, ...] -> [count, B / count, ...]; a microbatch is every count-th row, so that each device's
  rows stay on it.
  """
  cut = lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
  return _constrain(jax.tree.map(cut, tree), P(None, ("data", "fsdp")))


def split_over_batch(tree: Any) -> Any:
  """Inside jit: the first axis of every array over `data` and `fsdp`, as a batch lies."""
  return _constrain(tree, P(("data", "fsdp")))


def over_batch(tree: Any, axis: int) -> Any:
  """Inside jit: that axis of every array over `data` and `fsdp` where it can be split evenly; how
  the others lie is left to the compiler."""
  shards = batch_shards()

  def one(x: jax.Array) -> jax.Array:
    if shards == 1 or x.shape[axis] % shards:
      return x
    spec: list = [P.UNCONSTRAINED] * x.ndim
    spec[axis] = ("data", "fsdp")
    return jax.lax.with_sharding_constraint(x, P(*spec))

  return jax.tree.map(one, tree)


def batch_shards() -> int:
  """Inside jit: how many parts a batch is split into; 1 where there is no mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


_ROLES = {"rows": ("data", "fsdp"), "heads": ("tensor",)}  # of axes, in `on_each_device`


def even_parts(rows: int, heads: int) -> tuple[int, int]:
  """Inside jit: into how many parts `on_each_device` splits so many rows and heads; 1 where they
  cannot be split evenly."""
  parts = _role_parts()
  return tuple(parts[r] if n % parts[r] == 0 else 1 for r, n in (("rows", rows), ("heads", heads)))


def _role_parts() -> dict[str, int]:
  mesh = jax.sharding.get_abstract_mesh()
  return {r: 1 if mesh.empty else math.prod(mesh.shape[a] for a in _ROLES[r]) for r in _ROLES}


def on_each_device(run: Callable[..., Any], given: tuple, lie: tuple, made: Any) -> Any:
  """Inside jit: `run` of each device's part of arrays, for what the compiler cannot split.

  Args:
    lie: as `given`, with the roles of each array's axes in its place: "rows" are split over `data`
      and `fsdp`, "heads" over `tensor`, None is whole. A role is split only where all axes that
      have it can be split evenly; else all of its devices compute the same.
    made: the same of what `run` returns.
  """
  parts = _role_parts()
  if all(count == 1 for count in parts.values()):
    return run(*given)
  is_roles = lambda x: isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)
  roles, arrays = jax.tree.leaves(lie, is_leaf=is_roles), jax.tree.leaves(given)
  sizes = [(r, n) for one, x in zip(roles, arrays, strict=True) for r, n in zip(one, x.shape)]
  split = {r: _ROLES[r] for r in parts if not any(n % parts[r] for role, n in sizes if role == r)}
  spec = lambda one: P(*(split.get(role) for role in one))
  specs = jax.tree.map(spec, (lie, made), is_leaf=is_roles)
  return jax.shard_map(run, in_specs=specs[0], out_specs=specs[1], check_vma=False)(*given)


def pad_shares(tree: Any, rows: int) -> Any:
  """Inside jit: each device's rows of every array, zeros behind them up to `rows`."""

  def one(x: jax.Array) -> jax.Array:
    shards = 1 if len(x) % batch_shards() else batch_shards()
    x = x.reshape(shards, -1, *x.shape[1:])
    x = jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(-1, *x.shape[2:])

  return split_over_batch(jax.tree.map(one, tree))


def cut_shares(tree: Any, count: int) -> Any:
  """The inverse of `pad_shares` for `count` rows in all."""
  shards = 1 if count % batch_shards() else batch_shards()
  cut = lambda x: x.reshape(shards, -1, *x.shape[1:])[:, : count // shards]
  return split_over_batch(jax.tree.map(lambda x: cut(x).reshape(count, *x.shape[1:]), tree))


def split_chunks(tree: Any, rows: int, shards: int) -> Any:
  """Cuts arrays into chunks for a loop: [M, ...] -> [chunks, shards * rows, ...], zeros at the end.

  Every chunk takes `rows` rows from each of the `shards` parts of the batch, so every device has
  its own rows in every chunk. Cut in order, a chunk would be the rows of one device alone, and all
  devices would compute it.
  """

  def cut(x):
    x = x.reshape(shards, -1, *x.shape[1:])
    chunks = -(-x.shape[1] // rows)
    x = jnp.pad(x, ((0, 0), (0, chunks * rows - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return jnp.swapaxes(x.reshape(shards, chunks, rows, *x.shape[2:]), 0, 1).reshape(
      chunks, -1, *x.shape[2:]
    )

  made = jax.tree.map(cut, tree)
  return _constrain(made, P(None, ("data", "fsdp"))) if shards > 1 else made


def join_chunks(tree: Any, count: int, shards: int) -> Any:
  """The inverse of `split_chunks` for `count` rows."""

  def join(x):
    x = jnp.swapaxes(x.reshape(x.shape[0], shards, -1, *x.shape[2:]), 0, 1)
    return x.reshape(shards, -1, *x.shape[3:])[:, : count // shards].reshape(count, *x.shape[3:])

  return jax.tree.map(join, tree)


def gathered_head(head_VD: jax.Array) -> jax.Array:
  """Inside jit: an unembedding that is not split along its width, gathered once for all chunks.

  Were it split along the width, each device's product with it would be a partial sum of the logits,
  and the logits, the largest arrays of the program, would be added up over devices.
  """
  return _constrain(head_VD, P("tensor"))


def join_microbatches(tree: Any) -> Any:
  """The inverse of `microbatches`."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def gathered(shardings: Any) -> Any:
  """Shardings of parameters that many short programs use in a row, as decoding does: not split over
  `fsdp`, which would be gathered anew for each token."""

  def one(s):
    return jax.sharding.NamedSharding(
      s.mesh, P(*(None if axis == "fsdp" else axis for axis in s.spec))
    )

  return jax.tree.map(one, shardings)


def of_columns(kernel: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
  """Of one number for each column of a kernel [..., in, out] that lies so."""
  return jax.sharding.NamedSharding(kernel.mesh, P(*kernel.spec[:-2], kernel.spec[-1]))


def splits_parameters(mesh: jax.sharding.Mesh) -> bool:
  """Whether parameters are split along an axis that is gathered on use."""
  return mesh.shape["fsdp"] > 1


def check_batch_size(
  batch_size: int, mesh: jax.sharding.Mesh, name: str, pieces: dict[str, int] | None = None
) -> None:
  """Raises ValueError when a batch cannot be split evenly over the mesh, or the microbatches it is
  cut into cannot, which every device would then compute whole.

  `pieces`: names of settings, and into how many pieces each cuts the batch.
  """
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % parts:
    raise ValueError(
      f"{name} = {batch_size} images cannot be split over data x fsdp = {parts} "
      f"devices; use a multiple of {parts}"
    )
  count = math.prod((pieces or {}).values())
  if batch_size % (parts * count):
    named = " x ".join(f"{key} = {value}" for key, value in (pieces or {}).items() if value > 1)
    raise ValueError(
      f"{named} cuts {name} = {batch_size} into pieces of {batch_size / count:g} images, which "
      f"cannot be split over data x fsdp = {parts} devices: use a number of pieces that divides "
      f"{batch_size // parts}"
    )


def abstract_params(init: Callable[[], Any]) -> Any:
  """The parameters' shapes, boxed with their logical axes, without any memory. `init` returns flax
  variables.
  """
  return jax.eval_shape(init)["params"]


def param_shardings(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
  """Shardings of a boxed tree by `RULES`; an axis that its mesh axis does not divide, or that has
  one device, stays whole."""
  rules = dict(RULES)

  def one(leaf):
    names = leaf.names if isinstance(leaf, nn.Partitioned) else ()
    shape = nn.unbox(leaf).shape
    axes = [rules[name] if name is not None else None for name in names]
    used = [a for a in axes if a is not None]
    if len(used) != len(set(used)):
      raise ValueError(f"logical axes {names} put two dimensions on one mesh axis: {axes}")
    return fitted(jax.sharding.NamedSharding(mesh, P(*axes)), shape)

  return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def fitted(place: Any, shape: tuple[int, ...], without: int | None = None) -> Any:
  """A NamedSharding for an array of this shape, but for its axis `without`; an axis that its mesh
  axis does not divide, or that has one device, is whole."""
  axes, sizes = list(place.spec), place.mesh.shape
  if without is not None:
    del axes[without]
  axes = [a if a and sizes[a] > 1 and n % sizes[a] == 0 else None for a, n in zip(axes, shape)]
  return jax.sharding.NamedSharding(place.mesh, P(*axes))


def optimizer_shardings(
  tx: optax.GradientTransformation,
  params: Any,
  shardings: Any,
  mesh: jax.sharding.Mesh,
  memory: MomentMemory = "device",
) -> Any:
  """Shardings of the optimizer's state: what lies at a parameter's path and has its shape lies
  where it lies, or beside it in the host's memory; the rest (counts, Adafactor's vectors) is
  replicated on the devices."""
  shapes = dict(jax.tree_util.tree_leaves_with_path(params))
  if memory == "host":
    shardings = jax.tree.map(lambda s: s.with_memory_kind(HOST), shardings)
  places = dict(jax.tree_util.tree_leaves_with_path(shardings))

  def place(path, x):
    for start in range(len(path)):  # a state holds trees like `params`, somewhere
      found = shapes.get(path[start:])
      if found is not None and found.shape == x.shape:
        return places[path[start:]]
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))


def batch_share(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
  """Places in a batch that lie on this process's devices, ascending. Processes overlap where
  `tensor` spans them.
  """
  places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in places]))


def check_images_apart(mesh: jax.sharding.Mesh, what: str) -> None:
  """Raises ValueError where several processes make the same images of a batch: what each of them
  finds out by itself, of a server or a function, need not be the same. `what`: says what that is.
  """
  parts = mesh.devices.reshape(-1, mesh.shape["tensor"])
  if any(len({device.process_index for device in part}) > 1 for part in parts):
    raise ValueError(
      f"mesh.tensor = {mesh.shape['tensor']} spans processes, and {what} is asked by each process "
      "for its own images; use a mesh.tensor that a process has devices for"
    )


def put_batch(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """This process's share of a batch (`batch_share`), as numpy, -> global device arrays split over
  the batch axis.
  """
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  here = batch_share(mesh, parts).tolist()  # a batch of `parts` rows has one a part

  def put(x):
    x = np.asarray(x)
    rows = len(x) // len(here)

    def part(index):
      first = here.index((index[0].start or 0) // rows) * rows
      return x[first : first + rows]

    return jax.make_array_from_callback((rows * parts, *x.shape[1:]), batch_sharding(mesh), part)

  return jax.tree.map(put, tree)


def own_rows(tree: Any) -> Any:
  """Arrays of a batch on the devices -> this process's share of their rows (`batch_share`), as
  numpy: the inverse of `put_batch`."""

  def get(x):
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

  return jax.tree.map(get, tree)


def to_host(tree: Any) -> Any:
  """Arrays as numpy, whole on every process. Where there are several, all of them must call it."""
  split = lambda x: (
    isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
  )
  return jax.device_get(
    jax.tree.map(lambda x: _replicate(x.sharding.mesh)(x) if split(x) else x, tree)
  )


@functools.cache
def _replicate(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))
