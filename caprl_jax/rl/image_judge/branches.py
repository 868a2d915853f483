"""Images, captions -> the judge's state after each caption, which scores or a text go on from."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import Prefix
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.policy import Policy, last_hidden
from caprl_jax.rl.judge import JudgeIds
from caprl_jax.types import Array, JudgePrompt, Params, Sight


@flax.struct.dataclass
class ImageJudge:
  """The judge as the stage needs it. Of `prompt` it reads `tail_L`, what follows a caption, and
  `letter_A`, the scores, or `words`, what it may write."""

  model: Policy = flax.struct.field(pytree_node=False)
  params: Params
  prompt: JudgePrompt

  @property
  def head_VD(self) -> Array:
    """The unembedding."""
    return head_matrix(self.model.cfg.text, self.params["language_model"])

  def run(self, method: str, *inputs: Any) -> Any:
    """A method of the model with the judge's parameters."""
    return self.model.apply({"params": self.params}, *inputs, method=method)


@flax.struct.dataclass
class Read:
  """What was read of each caption, N = B * G rows."""

  hidden_ND: Array  # predicts what follows
  next_position_N: Array
  prefixes: tuple[Prefix, ...]  # the image's with the prompt (B rows), the caption's with its tail


def read_captions(judge: ImageJudge, captions: JudgeIds, sight: Sight) -> Read:
  """Runs each image with the prompt once, and each caption of its group after it, with what follows
  the caption in the prompt.

  Args:
    captions: [B, G, T].
    sight: B images.
  """
  B, G, T = captions.tokens_BGT.shape
  _, prefix = judge.run("prefill", sight.images, sight.prompts)
  tail_NL = jnp.broadcast_to(judge.prompt.tail_L, (B * G, judge.prompt.tail_L.shape[0]))
  tokens_NL = jnp.concatenate([captions.tokens_BGT.reshape(B * G, T), tail_NL], axis=1)
  keep_NT = captions.keep_BGT.reshape(B * G, T)
  valid_NL = jnp.concatenate([keep_NT, jnp.ones_like(tail_NL, bool)], axis=1)
  start_N = jnp.repeat(sight.prompts.next_position_B, G)
  position_NL = jnp.maximum(start_N[:, None] + jnp.cumsum(valid_NL, axis=1) - 1, 0)
  hidden_NLD, own = judge.run("extend", tokens_NL, position_NL, valid_NL, (prefix,))
  return Read(last_hidden(hidden_NLD, valid_NL), start_N + valid_NL.sum(1), (prefix, own))


def row_keys(key: Array, captions: JudgeIds) -> Array:
  """A key a caption, [B, G], by its place in the batch: it draws the same in whatever pieces the
  batch is cut."""
  B, G, _ = captions.tokens_BGT.shape
  fold = jax.vmap(lambda row: jax.random.fold_in(key, row))
  return fold(jnp.arange(B * G)).reshape(B, G)
