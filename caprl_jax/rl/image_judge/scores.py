"""Images, captions -> scores as answers: a judge that sees the image, read from logits.

The image and the prompt up to the caption run once per image; each caption of its group branches
from there, with what follows it up to where the score stands. The scores stand in the place of a
question's options (A), the worst first; an image's one question is what its caption is worth.
"""

import jax
import jax.numpy as jnp

from caprl_jax.masked import NEGATIVE
from caprl_jax.models.head import token_logprobs
from caprl_jax.rl.image_judge.branches import ImageJudge, read_captions, row_keys
from caprl_jax.rl.judge import JudgeIds, with_blind
from caprl_jax.rl.judge_protocol import JudgeConfig
from caprl_jax.sharding import join_microbatches, microbatches
from caprl_jax.types import Answers, Array, Sight


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
    return _score(judge, *piece, cfg)

  def ask(captions: JudgeIds) -> Answers:
    batch = (row_keys(key, captions), captions, sight, valid_BK)
    if cfg.microbatches == 1:
      return of_piece(batch)
    return join_microbatches(jax.lax.map(of_piece, microbatches(batch, cfg.microbatches)))

  return with_blind(ask, captions, cfg)


def _score(
  judge: ImageJudge,
  key_BG: Array,
  captions: JudgeIds,
  sight: Sight,
  valid_BK: Array,
  cfg: JudgeConfig,
) -> Answers:
  logp_BGA = _score_logprobs(judge, captions, sight, cfg)
  A = logp_BGA.shape[-1]
  if cfg.reading == "letter_sample":
    draw = jax.vmap(jax.vmap(jax.random.categorical))
    choice_BG = draw(key_BG, logp_BGA / cfg.temperature)
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
  B, G, _ = captions.tokens_BGT.shape
  read = read_captions(judge, captions, sight)
  letter_NA = jnp.broadcast_to(judge.prompt.letter_A, (B * G, judge.prompt.letter_A.shape[0]))
  logp_NA, _ = token_logprobs(
    read.hidden_ND, judge.head_VD, letter_NA, chunk_tokens=cfg.chunk_tokens
  )
  return logp_NA.reshape(B, G, -1)
