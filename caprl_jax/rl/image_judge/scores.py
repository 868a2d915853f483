"""Images, captions -> scores as answers: a judge that sees the image, read from logits.

The image and the prompt up to the caption run once per image; each caption of its group branches
from there, with what follows it up to where the score stands. The scores stand in the place of a
question's options (A), the worst first; an image's one question is what its caption is worth.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.masked import NEGATIVE
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.head import token_logprobs
from caprl_jax.models.policy import Policy, last_hidden
from caprl_jax.rl.judge import JudgeIds, with_blind
from caprl_jax.rl.judge_protocol import JudgeConfig
from caprl_jax.sharding import join_microbatches, microbatches
from caprl_jax.types import Answers, Array, JudgePrompt, Params, Sight


@flax.struct.dataclass
class ImageJudge:
  """The judge as the stage needs it. Of `prompt` it reads `tail_L`, what follows a caption, and
  `letter_A`, the scores."""

  model: Policy = flax.struct.field(pytree_node=False)
  params: Params
  prompt: JudgePrompt

  def run(self, method: str, *inputs: Any) -> Any:
    """A method of the model with the judge's parameters."""
    return self.model.apply({"params": self.params}, *inputs, method=method)


def score_with_images(
  judge: ImageJudge,
  captions: JudgeIds,
  sight: Sight,
  valid_BK: Array,
  key: Array,
  cfg: JudgeConfig,
) -> Answers:
  """Scores every caption with its image, in `cfg.microbatches` pieces of the batch. With
  `cfg.blind` an empty caption is scored too.

  Args:
    sight: each image with the judge's prompt, up to the caption.
    valid_BK: bool, which of an image's questions exist; each is answered by the same score.
  """

  def of_piece(piece: tuple[Array, JudgeIds, Sight, Array]) -> Answers:
    number, captions, sight, valid_BK = piece
    return _score(judge, captions, sight, valid_BK, jax.random.fold_in(key, number), cfg)

  def ask(captions: JudgeIds) -> Answers:
    if cfg.microbatches == 1:
      return _score(judge, captions, sight, valid_BK, key, cfg)
    pieces = microbatches((captions, sight, valid_BK), cfg.microbatches)
    return join_microbatches(jax.lax.map(of_piece, (jnp.arange(cfg.microbatches), *pieces)))

  return with_blind(ask, captions, cfg)


def _score(
  judge: ImageJudge,
  captions: JudgeIds,
  sight: Sight,
  valid_BK: Array,
  key: Array,
  cfg: JudgeConfig,
) -> Answers:
  logp_BGA = _score_logprobs(judge, captions, sight, cfg)
  A = logp_BGA.shape[-1]
  if cfg.reading == "letter_sample":
    choice_BG = jax.random.categorical(key, logp_BGA / cfg.temperature)
  else:
    choice_BG = jnp.argmax(logp_BGA, axis=-1)
  worth_A = jnp.arange(A) / (A - 1)
  credit_BG = worth_A[choice_BG]
  if cfg.reading == "letter_prob":
    credit_BG = jax.nn.softmax(jnp.maximum(logp_BGA, NEGATIVE), axis=-1) @ worth_A

  def for_each(x_BG: Array) -> Array:
    return jnp.broadcast_to(x_BG[:, :, None], (*x_BG.shape[:2], valid_BK.shape[1]))

  asked_BGK = jnp.broadcast_to(valid_BK[:, None], for_each(choice_BG).shape)
  valid_BGK = asked_BGK & for_each(jnp.isfinite(logp_BGA).all(-1))
  choice_BGK = jnp.where(valid_BGK, for_each(choice_BG), -1).astype(jnp.int32)
  credit_BGK = jnp.where(valid_BGK, for_each(credit_BG), 0.0).astype(jnp.float32)
  question_BGK = jnp.broadcast_to(jnp.arange(valid_BK.shape[1]), choice_BGK.shape)
  score_BGKA = jnp.broadcast_to(logp_BGA[:, :, None], (*choice_BGK.shape, A))
  return Answers(
    choice_BGK,
    valid_BGK & (choice_BGK == A - 1),
    credit_BGK,
    jnp.zeros_like(credit_BGK),
    asked_BGK,
    valid_BGK,
    question_BGK,
    score_BGKA,
  )


def _score_logprobs(judge: ImageJudge, captions: JudgeIds, sight: Sight, cfg: JudgeConfig) -> Array:
  """Log-probability of each score after each caption, float32 [B, G, A]."""
  B, G, T = captions.tokens_BGT.shape
  _, prefix = judge.run("prefill", sight.images, sight.prompts)
  tail_NL = jnp.broadcast_to(judge.prompt.tail_L, (B * G, judge.prompt.tail_L.shape[0]))
  tokens_NL = jnp.concatenate([captions.tokens_BGT.reshape(B * G, T), tail_NL], axis=1)
  keep_NT = captions.keep_BGT.reshape(B * G, T)
  valid_NL = jnp.concatenate([keep_NT, jnp.ones_like(tail_NL, bool)], axis=1)
  start_N = jnp.repeat(sight.prompts.next_position_B, G)
  position_NL = jnp.maximum(start_N[:, None] + jnp.cumsum(valid_NL, axis=1) - 1, 0)
  hidden_NLD, _ = judge.run("extend", tokens_NL, position_NL, valid_NL, (prefix,))
  letter_NA = jnp.broadcast_to(judge.prompt.letter_A, (B * G, judge.prompt.letter_A.shape[0]))
  logp_NA, _ = token_logprobs(
    last_hidden(hidden_NLD, valid_NL),
    head_matrix(judge.model.cfg.text, judge.params["language_model"]),
    letter_NA,
    chunk_tokens=cfg.chunk_tokens,
  )
  return logp_NA.reshape(B, G, -1)
