"""Captions, questions -> answers: the blind judge as one tree of shared prefixes, read from logits.

The prompt's head is run once, each caption once after it, each question once after its caption. Pieces are
spliced by position and mask: a padded or stripped token keeps its slot, is seen by nobody, and counts for no
position. Letters as in `types.py`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from caprl_jax.masked import NEGATIVE, masked_sum
from caprl_jax.models.attention import Prefix
from caprl_jax.models.decoder import Decoder, head_matrix
from caprl_jax.models.head import token_logprobs
from caprl_jax.sharding import join_microbatches, microbatches
from caprl_jax.types import Answers, Array, Captions, JudgePrompt, Params, Questions, Vocabulary


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
  """How answers are read.

  reading: `option_pmi`, the mean log-probability of an option's tokens after the question, minus the same after a
    caption that says nothing (Holtzman et al., arXiv 2104.08315): for small and base models; or the next-token
    distribution over option letters after a prompt that lists permuted options: `letter_argmax`, `letter_prob`
    (the credit is the gold letter's probability) or `letter_sample` at `temperature`.
  margin: an answer must beat the runner-up by more than this, or it counts as none (in nats).
  microbatches: pieces of the batch that are judged one after the other, to save memory.
  """
  reading: Literal["option_pmi", "letter_argmax", "letter_prob", "letter_sample"] = "option_pmi"
  temperature: float = 0.6
  margin: float = 1e-3
  chunk_tokens: int = 1024
  microbatches: int = 1

  def __post_init__(self):
    if self.temperature <= 0 or self.margin < 0:
      raise ValueError(f"temperature = {self.temperature} must be > 0 and margin = {self.margin} >= 0")


def judge_captions(judge: Decoder, params: Params, prompt: JudgePrompt, captions: Captions, questions: Questions,
                   vocabulary: Vocabulary, key: Array, cfg: JudgeConfig) -> Answers:
  """Asks every question of an image about each of its captions; special tokens are stripped first."""
  judge_id_BGT = vocabulary.judge_id_V[captions.tokens_BGT]
  keep_BGT = captions.valid_BGT & (judge_id_BGT >= 0)
  return judge_ids(judge, params, prompt, jnp.maximum(judge_id_BGT, 0), keep_BGT, questions, key, cfg)


def judge_ids(judge: Decoder, params: Params, prompt: JudgePrompt, judge_id_BGT: Array, keep_BGT: Array,
              questions: Questions, key: Array, cfg: JudgeConfig) -> Answers:
  """`answer_questions`, in `cfg.microbatches` pieces."""
  if cfg.microbatches == 1:
    return answer_questions(judge, params, prompt, judge_id_BGT, keep_BGT, questions, key, cfg)

  def some(piece):
    number, ids, keep, questions = piece
    return answer_questions(judge, params, prompt, ids, keep, questions, jax.random.fold_in(key, number), cfg)

  pieces = microbatches((judge_id_BGT, keep_BGT, questions), cfg.microbatches)
  return join_microbatches(jax.lax.map(some, (jnp.arange(cfg.microbatches), *pieces)))


def answer_questions(judge: Decoder, params: Params, prompt: JudgePrompt, caption_BGT: Array, keep_BGT: Array,
                     questions: Questions, key: Array, cfg: JudgeConfig) -> Answers:
  """Answers from captions given as judge token ids.

  Args:
    caption_BGT, keep_BGT: ids and which of them count.
    questions: the same for all captions of an image, and so are the permutations of their options.
    key: consumed by the `letter` readings (permutations, sampling).
  """
  B, G, T = caption_BGT.shape
  B, K, A, O = questions.option_BKAO.shape
  present_BKA = questions.option_valid_BKAO.any(-1)
  head = prompt.head_L[None]
  _, head_prefix = _run(judge, params, head, jnp.ones(head.shape, bool), jnp.zeros(1, jnp.int32), ())
  flat = lambda x: x.reshape(B * G, T)
  start_N = jnp.full(B * G, head.shape[1], jnp.int32)
  _, caption_prefix = _run(judge, params, flat(caption_BGT), flat(keep_BGT), start_N, (head_prefix,))
  prefixes = (head_prefix, caption_prefix)
  after_N = start_N + flat(keep_BGT).sum(1)

  if cfg.reading == "option_pmi":
    score_BGKA = _option_scores(judge, params, questions, prefixes, after_N, G, cfg) - questions.prior_BKA[:, None]
    choice_BGK = _choose(score_BGKA, present_BKA[:, None], cfg.margin)
  else:
    order_key, draw_key = jax.random.split(key)
    order_BKA = draw_orders(order_key, present_BKA)
    slot_BGKA = _letter_logprobs(judge, params, prompt, questions, order_BKA, prefixes, after_N, G, cfg)
    # Slot s shows option order[s]; back to the dataset's order, where the gold index lives.
    back_BKA = jnp.argsort(order_BKA, axis=-1)
    score_BGKA = jnp.take_along_axis(slot_BGKA, back_BKA[:, None], axis=-1)
    choice_BGK = _choose(score_BGKA, present_BKA[:, None], cfg.margin)
    if cfg.reading == "letter_sample":
      logits = jnp.where(present_BKA[:, None], score_BGKA / cfg.temperature, NEGATIVE)
      choice_BGK = jax.random.categorical(draw_key, logits)

  score_BGKA = jnp.where(present_BKA[:, None], score_BGKA, -jnp.inf)
  finite_BGK = jnp.where(present_BKA[:, None], jnp.isfinite(score_BGKA), True).all(-1)
  valid_BGK = finite_BGK & questions.valid_BK[:, None]
  correct_BGK = (choice_BGK == questions.gold_BK[:, None]) & valid_BGK
  credit_BGK = correct_BGK.astype(jnp.float32)
  if cfg.reading == "letter_prob":
    share = jax.nn.softmax(jnp.where(present_BKA[:, None], score_BGKA, NEGATIVE), axis=-1)
    gold = jnp.broadcast_to(questions.gold_BK[:, None, :, None], (B, G, K, 1))
    credit_BGK = jnp.where(valid_BGK, jnp.take_along_axis(share, gold, axis=-1)[..., 0], 0.0)
  return Answers(jnp.where(valid_BGK, choice_BGK, -1), correct_BGK, credit_BGK, valid_BGK, score_BGKA)


def _run(judge, params, tokens_NL, valid_NL, start_N, prefixes) -> tuple[Array, Prefix]:
  """Runs tokens after their prefixes; positions count valid tokens only."""
  position = start_N[:, None] + jnp.cumsum(valid_NL, axis=1) - 1
  embedded = judge.apply({"params": params}, tokens_NL, method="embed")
  return judge.apply({"params": params}, embedded, jnp.maximum(position, 0), valid_NL, prefixes)


def _last(hidden_NLD: Array, valid_NL: Array) -> Array:
  """Hidden state of each row's last valid token (of the first token where none is), [N, D]."""
  order = jnp.where(valid_NL, jnp.arange(valid_NL.shape[1]), 0)
  return jnp.take_along_axis(hidden_NLD, order.max(1)[:, None, None], axis=1)[:, 0]


def _branch(x_BK: Array, G: int) -> Array:
  """[B, K, ...] -> [B * G * K, ...]: every caption of a group gets the image's questions."""
  x = jnp.broadcast_to(x_BK[:, None], (x_BK.shape[0], G, *x_BK.shape[1:]))
  return x.reshape(-1, *x_BK.shape[2:])


def _option_scores(judge, params, questions: Questions, prefixes, after_N, G: int, cfg: JudgeConfig) -> Array:
  """Mean log-probability of each option's tokens after caption and question, [B, G, K, A]."""
  B, K, A, O = questions.option_BKAO.shape
  stem, stem_valid = _branch(questions.stem_BKQ, G), _branch(questions.stem_valid_BKQ, G)
  start = jnp.repeat(after_N, K)
  hidden, stem_prefix = _run(judge, params, stem, stem_valid, start, prefixes)
  option, option_valid = _branch(questions.option_BKAO, G), _branch(questions.option_valid_BKAO, G)
  head_VD = head_matrix(judge.cfg, params)
  # The first token of every option is predicted by the question's last token ...
  logp = token_logprobs(_last(hidden, stem_valid), head_VD, option[:, :, 0], chunk_tokens=cfg.chunk_tokens)[0]
  logp = logp[..., None]  # [N * K, A, 1]
  if O > 1:  # ... the others by the option's own tokens, a branch an option; one-token options cost nothing
    inputs, inputs_valid = (x[:, :, :-1].reshape(-1, O - 1) for x in (option, option_valid))
    begin = jnp.repeat(start + stem_valid.sum(1), A)
    hidden, _ = _run(judge, params, inputs, inputs_valid, begin, (*prefixes, stem_prefix))
    rest, _ = token_logprobs(hidden.reshape(-1, hidden.shape[-1]), head_VD, option[:, :, 1:].reshape(-1, 1),
                             chunk_tokens=cfg.chunk_tokens)
    logp = jnp.concatenate([logp, rest.reshape(*option.shape[:2], O - 1)], axis=-1)
  mean = masked_sum(logp, option_valid, axis=-1) / jnp.maximum(option_valid.sum(-1), 1)
  return mean.reshape(B, G, K, A)


def draw_orders(key: Array, present_BKA: Array) -> Array:
  """For each question a random order of its options, int32 [B, K, A]; absent options come last."""
  rank = jax.random.uniform(key, present_BKA.shape) + jnp.where(present_BKA, 0.0, 2.0)
  return jnp.argsort(rank, axis=-1)


def _letter_logprobs(judge, params, prompt: JudgePrompt, questions: Questions, order_BKA, prefixes, after_N, G: int,
                     cfg: JudgeConfig) -> Array:
  """Log-probability of each slot's letter after a question whose options stand in `order`, [B, G, K, A]."""
  B, K, A, O = questions.option_BKAO.shape
  option = jnp.take_along_axis(questions.option_BKAO, order_BKA[..., None], axis=2)
  option_valid = jnp.take_along_axis(questions.option_valid_BKAO, order_BKA[..., None], axis=2)
  used = option_valid.any(-1, keepdims=True)
  wide = lambda x: jnp.broadcast_to(x, (B, K, A, x.shape[-1]))
  slot = jnp.concatenate([wide(prompt.label_AL[:A]), option, wide(prompt.line_end_L)], axis=-1)
  slot_valid = jnp.concatenate(
      [wide(prompt.label_valid_AL[:A]) & used, option_valid, wide(jnp.ones_like(prompt.line_end_L, bool)) & used], -1)
  tail = jnp.broadcast_to(prompt.tail_L, (B, K, prompt.tail_L.shape[0]))
  tokens = jnp.concatenate([questions.stem_BKQ, slot.reshape(B, K, -1), tail], axis=-1)
  valid = jnp.concatenate([questions.stem_valid_BKQ, slot_valid.reshape(B, K, -1), jnp.ones_like(tail, bool)], axis=-1)
  tokens, valid = _branch(tokens, G), _branch(valid, G)
  hidden, _ = _run(judge, params, tokens, valid, jnp.repeat(after_N, K), prefixes)
  letters = jnp.broadcast_to(prompt.letter_A[:A], (hidden.shape[0], A))
  logp, _ = token_logprobs(_last(hidden, valid), head_matrix(judge.cfg, params), letters,
                           chunk_tokens=cfg.chunk_tokens)
  return logp.reshape(B, G, K, A)


def _choose(score: Array, present: Array, margin: float) -> Array:
  """Index of the best present option; -1 unless it beats the runner-up by more than `margin`."""
  score = jnp.where(present, score, NEGATIVE)
  best = jax.lax.top_k(score, 2)[0]
  return jnp.where(best[..., 0] - best[..., 1] > margin, jnp.argmax(score, axis=-1), -1)
