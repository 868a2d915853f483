"""Captions, questions -> answers: the blind judge as one tree of shared prefixes, read from logits.

The prompt's head is run once, each caption once after it, each question once after its caption.
Pieces are spliced by position and mask: a padded or stripped token keeps its slot, is seen by
nobody, and counts for no position. Letters as in `types.py`; where "can not answer" is an option, A
counts it and it is the last.
"""

import jax
import jax.numpy as jnp

from caprl_jax.masked import NEGATIVE, masked_sum
from caprl_jax.models.attention import Prefix, empty_cache
from caprl_jax.models.decoder import Decoder, head_matrix
from caprl_jax.models.head import token_logprobs
from caprl_jax.rl.judge_protocol import (
  JudgeConfig,
  Sheet,
  answer_by_margin,
  best_and_lead,
  draw_questions,
  present_options,
  take_questions,
)
from caprl_jax.rl.sampling import SamplingConfig, decode
from caprl_jax.sharding import join_microbatches, microbatches
from caprl_jax.types import (
  Answers,
  Array,
  Captions,
  JudgePrompt,
  Params,
  Questions,
  Vocabulary,
)


def judge_captions(
  judge: Decoder,
  params: Params,
  prompt: JudgePrompt,
  captions: Captions,
  questions: Questions,
  vocabulary: Vocabulary,
  key: Array,
  cfg: JudgeConfig,
) -> tuple[Answers, Answers | None]:
  """Asks every caption about its image; special tokens are stripped first, so that no caption can
  close the judge's turn.

  Returns the answers and, with `cfg.blind`, those that an empty caption got (G = 1).
  """
  judge_id_BGT = vocabulary.judge_id_V[captions.tokens_BGT]
  keep_BGT = captions.valid_BGT & (judge_id_BGT >= 0)
  return judge_ids(
    judge, params, prompt, jnp.maximum(judge_id_BGT, 0), keep_BGT, questions, key, cfg
  )


def judge_ids(
  judge: Decoder,
  params: Params,
  prompt: JudgePrompt,
  judge_id_BGT: Array,
  keep_BGT: Array,
  questions: Questions,
  key: Array,
  cfg: JudgeConfig,
) -> tuple[Answers, Answers | None]:
  """As `judge_captions`, from captions in the judge's ids; in `cfg.microbatches` pieces."""
  if cfg.blind:  # the empty caption is a member more of each group
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
    judge_id_BGT, keep_BGT = pad(judge_id_BGT), pad(keep_BGT)
  if cfg.microbatches == 1:
    answers = answer_questions(judge, params, prompt, judge_id_BGT, keep_BGT, questions, key, cfg)
  else:

    def some(piece):
      number, ids, keep, questions = piece
      return answer_questions(
        judge, params, prompt, ids, keep, questions, jax.random.fold_in(key, number), cfg
      )

    pieces = microbatches((judge_id_BGT, keep_BGT, questions), cfg.microbatches)
    answers = join_microbatches(jax.lax.map(some, (jnp.arange(cfg.microbatches), *pieces)))
  if not cfg.blind:
    return answers, None
  return jax.tree.map(lambda x: x[:, :-1], answers), jax.tree.map(lambda x: x[:, -1:], answers)


def answer_questions(
  judge: Decoder,
  params: Params,
  prompt: JudgePrompt,
  caption_BGT: Array,
  keep_BGT: Array,
  questions: Questions,
  key: Array,
  cfg: JudgeConfig,
) -> Answers:
  """Answers from captions given as judge token ids.

  Args:
    caption_BGT, keep_BGT: ids and which of them count.
    questions: of each image. What is presented, and in which order of options, is the same for all
      captions of an image, unless `cfg.independent`.
    key: consumed, by draws, orders and sampling.
  """
  B, G, T = caption_BGT.shape
  if cfg.independent and G > 1:  # every caption is an image of its own
    fold = lambda x: x.reshape(B * G, 1, T)
    wide = jax.tree.map(lambda x: jnp.repeat(x, G, axis=0), questions)
    answers = answer_questions(
      judge, params, prompt, fold(caption_BGT), fold(keep_BGT), wide, key, cfg
    )
    return jax.tree.map(lambda x: x.reshape(B, G, *x.shape[2:]), answers)

  draw_key, order_key, sample_key = jax.random.split(key, 3)
  index_BK, drawn_BK = draw_questions(draw_key, questions.valid_BK, cfg)
  # Where the order is not shuffled, a question drawn again is answered from the same numbers: it is
  # run once.
  run_once = cfg.reading == "option_pmi" or (not cfg.shuffle and cfg.reading != "generate")
  presented = questions if run_once or not cfg.draws else take_questions(questions, index_BK)
  caption_BGT, keep_BGT = _spaced(prompt, caption_BGT, keep_BGT)
  prefixes, after_N = _caption_prefixes(judge, params, prompt, caption_BGT, keep_BGT)

  if cfg.reading == "option_pmi":
    score_BGKA = (
      _option_scores(judge, params, presented, prefixes, after_N, G, cfg)
      - presented.prior_BKA[:, None]
    )
  else:
    sheet = Sheet.of(prompt, presented, order_key, cfg)
    if cfg.reading == "generate":
      choice_BGK, score_BGKA = _written(
        judge, params, prompt, sheet, prefixes, after_N, G, sample_key, cfg
      )
    else:
      score_BGKA = _letter_logprobs(judge, params, prompt, sheet, prefixes, after_N, G, cfg)
  if run_once and cfg.draws:
    score_BGKA = jnp.take_along_axis(score_BGKA, index_BK[:, None, :, None], axis=2)
    presented = take_questions(questions, index_BK)

  present_BGKA = present_options(presented, cfg)[:, None]
  if cfg.reading == "letter_sample":
    choice_BGK = jax.random.categorical(
      sample_key, jnp.where(present_BGKA, score_BGKA / cfg.temperature, NEGATIVE)
    )
  elif cfg.reading != "generate":
    best_BGK, lead_BGK = best_and_lead(jnp.where(present_BGKA, score_BGKA, NEGATIVE))
    choice_BGK = answer_by_margin(best_BGK, lead_BGK, cfg.margin)
  asked_BGK = jnp.broadcast_to(drawn_BK[:, None], choice_BGK.shape)
  index_BGK = jnp.broadcast_to(index_BK[:, None], choice_BGK.shape)
  return _answers(choice_BGK, score_BGKA, present_BGKA, presented, asked_BGK, index_BGK, cfg)


def _answers(
  choice_BGK, score_BGKA, present_BGKA, presented: Questions, asked_BGK, index_BGK, cfg
) -> Answers:
  gold_BGK = presented.gold_BK[:, None]
  score_BGKA = jnp.where(present_BGKA, score_BGKA, -jnp.inf)
  valid_BGK = jnp.where(present_BGKA, jnp.isfinite(score_BGKA), True).all(-1) & asked_BGK
  if cfg.abstain != "none":
    choice_BGK = jnp.where(choice_BGK == score_BGKA.shape[-1] - 1, -1, choice_BGK)
  choice_BGK = jnp.where(valid_BGK, choice_BGK, -1)
  correct_BGK = (choice_BGK == gold_BGK) & valid_BGK
  credit_BGK, misled_BGK = correct_BGK, (choice_BGK >= 0) & ~correct_BGK
  if cfg.reading == "letter_prob":
    share_BGKA = jax.nn.softmax(jnp.where(present_BGKA, score_BGKA, NEGATIVE), axis=-1)
    gold = jnp.broadcast_to(gold_BGK[..., None], (*share_BGKA.shape[:3], 1))
    credit_BGK = jnp.take_along_axis(share_BGKA, gold, axis=-1)[..., 0]
    misled_BGK = 1 - credit_BGK - (share_BGKA[..., -1] if cfg.abstain != "none" else 0)
  number = lambda x: jnp.where(valid_BGK, x.astype(jnp.float32), 0.0)
  return Answers(
    choice_BGK,
    correct_BGK,
    number(credit_BGK),
    number(misled_BGK),
    asked_BGK,
    valid_BGK,
    index_BGK,
    score_BGKA,
  )


def _spaced(prompt: JudgePrompt, caption_BGT, keep_BGT) -> tuple[Array, Array]:
  """Where the prompt puts a space before the caption, its first token becomes the one that has that
  space, as in the joined text; a slot more in front holds a space for those that have none."""
  if prompt.spaced_V is None:
    return caption_BGT, keep_BGT
  T = caption_BGT.shape[-1]
  first_BG1 = jnp.argmax(keep_BGT, axis=-1)[..., None]
  is_first = (jnp.arange(T) == first_BG1) & keep_BGT
  spaced_BGT = jnp.asarray(prompt.spaced_V)[caption_BGT]
  swap = is_first & (spaced_BGT >= 0)
  space = jnp.broadcast_to(prompt.space, (*caption_BGT.shape[:2], 1))
  return (
    jnp.concatenate([space, jnp.where(swap, spaced_BGT, caption_BGT)], axis=-1),
    jnp.concatenate([~swap.any(-1, keepdims=True), keep_BGT], axis=-1),
  )


def _caption_prefixes(judge, params, prompt: JudgePrompt, caption_BGT, keep_BGT):
  """Runs head and captions; their prefixes, and each caption's next position."""
  head = jnp.asarray(prompt.head_L)[None]
  _, head_prefix = _run(
    judge, params, head, jnp.ones(head.shape, bool), jnp.zeros(1, jnp.int32), ()
  )
  flat = lambda x: x.reshape(-1, x.shape[-1])
  caption_NT, keep_NT = flat(caption_BGT), flat(keep_BGT)
  start_N = jnp.full(caption_NT.shape[0], head.shape[1], jnp.int32)
  _, caption_prefix = _run(judge, params, caption_NT, keep_NT, start_N, (head_prefix,))
  return (head_prefix, caption_prefix), start_N + keep_NT.sum(1)


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


def _option_scores(
  judge, params, questions: Questions, prefixes, after_N, G: int, cfg: JudgeConfig
) -> Array:
  """Mean log-probability of each option's tokens after caption and question, [B, G, K, A]."""
  B, K, A, O = questions.option_BKAO.shape
  stem, stem_valid = _branch(questions.stem_BKQ, G), _branch(questions.stem_valid_BKQ, G)
  start = jnp.repeat(after_N, K)
  hidden, stem_prefix = _run(judge, params, stem, stem_valid, start, prefixes)
  option, option_valid = _branch(questions.option_BKAO, G), _branch(questions.option_valid_BKAO, G)
  head_VD = head_matrix(judge.cfg, params)
  # The first token of every option is predicted by the question's last token ...
  logp = token_logprobs(
    _last(hidden, stem_valid), head_VD, option[:, :, 0], chunk_tokens=cfg.chunk_tokens
  )[0]
  logp = logp[..., None]  # [N * K, A, 1]
  # ... the others by the option's own tokens, a branch an option; one-token options cost nothing
  if O > 1:
    inputs, inputs_valid = (x[:, :, :-1].reshape(-1, O - 1) for x in (option, option_valid))
    begin = jnp.repeat(start + stem_valid.sum(1), A)
    hidden, _ = _run(judge, params, inputs, inputs_valid, begin, (*prefixes, stem_prefix))
    rest, _ = token_logprobs(
      hidden.reshape(-1, hidden.shape[-1]),
      head_VD,
      option[:, :, 1:].reshape(-1, 1),
      chunk_tokens=cfg.chunk_tokens,
    )
    logp = jnp.concatenate([logp, rest.reshape(*option.shape[:2], O - 1)], axis=-1)
  mean = masked_sum(logp, option_valid, axis=-1) / jnp.maximum(option_valid.sum(-1), 1)
  return mean.reshape(B, G, K, A)


def _letter_logprobs(
  judge, params, prompt: JudgePrompt, sheet: Sheet, prefixes, after_N, G: int, cfg: JudgeConfig
) -> Array:
  """Log-probability of each option's letter, in the dataset's order, the mean over permutations:
  [B, G, K, A].
  """
  B, K, A = sheet.order_BKA.shape
  tokens, valid = _branch(sheet.tokens_BKL, G), _branch(sheet.valid_BKL, G)
  hidden, _ = _run(judge, params, tokens, valid, jnp.repeat(after_N, K), prefixes)
  letters = _branch(jnp.asarray(prompt.letter_A)[sheet.letter_BKA], G)
  logp, _ = token_logprobs(
    _last(hidden, valid), head_matrix(judge.cfg, params), letters, chunk_tokens=cfg.chunk_tokens
  )
  # Slot s shows option order[s]; back to the dataset's order, where the gold index lives.
  back_BKA = jnp.argsort(sheet.order_BKA, axis=-1)
  score_BGKA = jnp.take_along_axis(logp.reshape(B, G, K, A), back_BKA[:, None], axis=-1)
  return score_BGKA.reshape(B, G, K // cfg.permutations, cfg.permutations, A).mean(3)


def _written(
  judge,
  params,
  prompt: JudgePrompt,
  sheet: Sheet,
  prefixes,
  after_N,
  G: int,
  key: Array,
  cfg: JudgeConfig,
) -> tuple[Array, Array]:
  """Samples an answer and parses it: the option whose letter is the first of A to I in it, -1 where
  that is no option's; int32 [B, G, K]. The scores are 0, or nan where the judge was not finite."""
  B, K, A = sheet.order_BKA.shape
  tokens, valid = _branch(sheet.tokens_BKL, G), _branch(sheet.valid_BKL, G)
  start = jnp.repeat(after_N, K)
  hidden, sheet_prefix = _run(judge, params, tokens, valid, start, prefixes)

  def extend(tokens, position, valid, cache):
    embedded = judge.apply({"params": params}, tokens, method="embed")
    return judge.apply(
      {"params": params}, embedded, position, valid, (*prefixes, sheet_prefix, cache)
    )

  end = decode(
    extend,
    head_matrix(judge.cfg, params),
    _last(hidden, valid),
    start + valid.sum(1),
    empty_cache(sheet_prefix, B * G * K, cfg.max_tokens),
    prompt.words,
    key,
    SamplingConfig(max_tokens=cfg.max_tokens, temperature=cfg.temperature),
  )
  letter = jnp.where(end.valid_NT, jnp.asarray(prompt.letter_V)[end.tokens_NT], -1)
  first = jnp.argmax(letter >= 0, axis=1)[:, None]
  letter_BGK1 = jnp.take_along_axis(letter, first, axis=1).reshape(B, G, K, 1)
  hit_BGKA = (sheet.letter_BKA[:, None] == letter_BGK1) & sheet.used_BKA[:, None]
  slot_BGK = jnp.argmax(hit_BGKA, axis=-1)
  order_BGKA = jnp.broadcast_to(sheet.order_BKA[:, None], hit_BGKA.shape)
  chosen = jnp.take_along_axis(order_BGKA, slot_BGK[..., None], axis=-1)[..., 0]
  finite = jnp.isfinite(end.logp_NT).all(1).reshape(B, G, K, 1)
  return jnp.where(hit_BGKA.any(-1), chosen, -1), jnp.where(
    jnp.broadcast_to(finite, hit_BGKA.shape), 0.0, jnp.nan
  )
