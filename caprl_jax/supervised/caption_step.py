"""Images with given captions -> new state: the supervised warm start."""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
import optax

from caprl_jax.masked import masked_sum
from caprl_jax.models.head import negative_log_likelihood
from caprl_jax.models.policy import Policy
from caprl_jax.rl.gradients import LossSum, TokenNumbers, guarded_step, mean_gradient
from caprl_jax.rl.rollout import caption_logprobs, caption_states, states_loss
from caprl_jax.rl.step_metrics import batch_metrics
from caprl_jax.types import Array, Batch, Captions, Params, TrainState, Vocabulary


@flax.struct.dataclass
class SFTExample:
  """Images and prompts (a `Batch` without questions) with one caption each."""

  batch: Batch
  tokens: Any  # int32 [B, T], an array of numpy or of jax
  valid: Any  # bool [B, T], the caption's tokens and its end token

  def captions(self) -> Captions:
    """The same as groups of one, [B, 1, T]."""
    tokens_BGT, valid_BGT = self.tokens[:, None], self.valid[:, None]
    return Captions(
      tokens_BGT, jnp.zeros(tokens_BGT.shape), valid_BGT, jnp.ones(tokens_BGT.shape[:2], bool)
    )


def caption_scores(
  policy: Policy, params: Params, example: SFTExample, vocabulary: Vocabulary
) -> Array:
  """Log-probability of each whole caption, float32 [B]."""
  captions = example.captions()
  logp_BGT, _ = caption_logprobs(
    policy, params, example.batch, captions, vocabulary=vocabulary, temperature=1.0
  )
  return masked_sum(logp_BGT, captions.valid_BGT, axis=-1)[:, 0]


def sft_step(
  state: TrainState,
  example: SFTExample,
  *,
  policy: Policy,
  tx: optax.GradientTransformation,
  vocabulary: Vocabulary,
) -> tuple[TrainState, dict[str, Array], None]:
  """One step of next-token prediction, mean over the captions' tokens. Returns the new state,
  metrics, and no samples."""

  def loss(params: Params, example: SFTExample) -> LossSum:
    captions = example.captions()
    states = caption_states(policy, params, example.batch, captions)
    scored, count = (policy, params, states, captions), captions.valid_BGT.sum()
    total, _, _ = states_loss(
      *scored, captions.valid_BGT, negative_log_likelihood, vocabulary=vocabulary
    )
    return LossSum(total, count, TokenNumbers(count.astype(jnp.float32)))

  mean = mean_gradient(loss, state.params, example, 1)
  stepped = guarded_step(tx, mean.value, mean.grads, state.params, state.opt_state)
  state = dataclasses.replace(
    state, step=state.step + 1, params=stepped.params, opt_state=stepped.opt_state
  )
  metrics = {
    **batch_metrics(example.batch),
    "update/loss": mean.value,
    "update/grad_norm": stepped.grad_norm,
    "update/nonfinite": stepped.nonfinite,
  }
  return state, metrics, None
