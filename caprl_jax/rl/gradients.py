"""Losses of microbatches -> one gradient; and an optimizer step that is left out where it is not
finite.

Shared by the CapRL step and supervised training. A loss returns a sum and a count; the division
comes once, at the end, so that the number of microbatches changes nothing but memory.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from caprl_jax import host_memory, sharding
from caprl_jax.types import Array, Params


@flax.struct.dataclass
class TokenNumbers:
  """Statistics over counted tokens, in a form in which microbatches can be joined."""

  tokens: Array  # float32, how many counted
  sums: dict[str, Array] = flax.struct.field(default_factory=dict)
  maxima: dict[str, Array] = flax.struct.field(default_factory=dict)
  minima: dict[str, Array] = flax.struct.field(default_factory=dict)

  def joined(self, other: "TokenNumbers") -> "TokenNumbers":
    """Of both microbatches together."""
    return TokenNumbers(
      self.tokens + other.tokens,
      jax.tree.map(jnp.add, self.sums, other.sums),
      jax.tree.map(jnp.maximum, self.maxima, other.maxima),
      jax.tree.map(jnp.minimum, self.minima, other.minima),
    )

  def means(self) -> dict[str, Array]:
    """The sums, each divided by the number of tokens (at least 1)."""
    tokens = jnp.maximum(self.tokens, 1)
    return {name: value / tokens for name, value in self.sums.items()}


@flax.struct.dataclass
class LossSum:
  """A loss summed over what counts, and the number to divide it by."""

  total: Array  # float32 scalar
  count: Array  # scalar
  numbers: TokenNumbers

  def joined(self, other: "LossSum") -> "LossSum":
    """Of both microbatches together."""
    return LossSum(
      self.total + other.total, self.count + other.count, self.numbers.joined(other.numbers)
    )


@flax.struct.dataclass
class MeanLoss:
  """The mean loss of a whole batch, its gradient, and statistics over its tokens."""

  value: Array  # float32 scalar
  count: Array  # what the sum was divided by
  grads: Params  # float32
  numbers: TokenNumbers


def mean_gradient(
  loss: Callable[..., LossSum],
  params: Params,
  batch: Any,
  microbatches: int,
) -> MeanLoss:
  """The gradient of the mean loss over a batch, computed in `microbatches` pieces of it.

  Args:
    loss: (params, piece of the batch) -> its LossSum; differentiable in `params`.
    batch: a pytree whose arrays have the images (or rows) on their first axis.
  """

  def of_piece(piece: Any) -> tuple[LossSum, Params]:
    def total_of(params: Params) -> tuple[Array, LossSum]:
      out = loss(params, piece)
      return out.total, out

    (_, out), grads = jax.value_and_grad(total_of, has_aux=True)(params)
    return out, jax.tree.map(lambda x: x.astype(jnp.float32), grads)

  def add(carry: tuple[LossSum, Params], piece: Any) -> tuple[tuple[LossSum, Params], None]:
    out, grads = of_piece(piece)
    return (carry[0].joined(out), jax.tree.map(jnp.add, carry[1], grads)), None

  if microbatches == 1:
    out, grads = of_piece(batch)
  else:
    pieces = sharding.microbatches(batch, microbatches)
    # From zeros rather than from the first piece, or the model would be compiled twice.
    nothing = _nothing(*jax.eval_shape(of_piece, jax.tree.map(lambda x: x[0], pieces)))
    (out, grads), _ = jax.lax.scan(add, nothing, pieces)
  divisor = jnp.maximum(out.count, 1)
  return MeanLoss(
    out.total / divisor, out.count, jax.tree.map(lambda g: g / divisor, grads), out.numbers
  )


def _nothing(out: LossSum, grads: Params) -> tuple[LossSum, Params]:
  """What leaves a microbatch's sums and gradient as they are when joined with it; of their
  shapes."""

  def full(tree: Any, value: float) -> Any:
    return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), tree)

  numbers = full(out.numbers, 0)
  numbers = dataclasses.replace(
    numbers,
    maxima=full(out.numbers.maxima, -jnp.inf),
    minima=full(out.numbers.minima, jnp.inf),
  )
  return dataclasses.replace(full(out, 0), numbers=numbers), full(grads, 0)


@flax.struct.dataclass
class Stepped:
  """What one optimizer step left."""

  params: Params
  opt_state: Any
  grad_norm: Array  # float32, before clipping
  nonfinite: Array  # float32, 1 where loss or gradient was not finite and nothing was changed


def guarded_step(
  tx: optax.GradientTransformation, loss: Array, grads: Params, params: Params, opt_state: Any
) -> Stepped:
  """One optimizer step. Where loss or gradient is not finite, parameters and optimizer state stay
  as they were: such a step must not spoil what the last checkpoint is made from. Moments that lie
  in the host's memory come to the devices for it, and go back."""
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(norm) & jnp.isfinite(loss)
  grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
  before = opt_state
  if any(map(host_memory.lies_in_host_memory, jax.tree.leaves(opt_state))):
    # Not before the gradient is whole: while it is made, the devices need their memory.
    opt_state, norm = jax.lax.optimization_barrier((opt_state, norm))
  opt_state = host_memory.on_devices(opt_state)
  updates, new_opt_state = tx.update(grads, opt_state, params)

  def keep(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

  return Stepped(
    keep(optax.apply_updates(params, updates), params),
    host_memory.where_it_was(keep(new_opt_state, opt_state), before),
    norm,
    1.0 - finite,
  )
