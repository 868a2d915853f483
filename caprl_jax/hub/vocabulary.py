"""What a model may write: `types.Vocabulary` of models whose ids no judge reads."""

from collections.abc import Sequence

import jax.numpy as jnp

from caprl_jax.types import Array, Vocabulary


def own_vocabulary(allowed_V: Array, end_ids: Sequence[int]) -> Vocabulary:
  """The vocabulary of a model that writes for itself: none of its ids is one of a judge's.

  Args:
    allowed_V: bool, one per row of the model's embedding: what may be written, ends among it.
    end_ids: what ends a text; with none, all texts are cut.
  """
  no_judge_V = jnp.full(len(allowed_V), -1, jnp.int32)
  return Vocabulary(
    jnp.asarray(allowed_V), no_judge_V, tuple(end_ids), end_ids[0] if end_ids else 0
  )
