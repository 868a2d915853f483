"""Captions, questions -> answers: the blind judge as one tree of shared prefixes, read from logits.

The prompt's head runs once, each caption once after it, each question once after its caption.
Pieces are spliced by position and mask: a padded or stripped token keeps its slot, is seen by
nobody, and counts for no position. Letters as in `types.py`; where "can not answer" is an option, A
counts it and it is the last.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax import rungs, sharding
from caprl_jax.masked import NEGATIVE, masked_sum
from caprl_jax.models.attention import EarlierTokens, Prefix
from caprl_jax.models.blocks import Row, prefix_in_blocks
from caprl_jax.models.decoder import Decoder, head_matrix
from caprl_jax.models.head import token_logprobs
from caprl_jax.models.policy import last_hidden
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
from caprl_jax.types import Answers, Array, Captions, JudgePrompt, Params, Questions, Vocabulary

SMALLEST_CAPTION = 64  # slots of a block; smaller ones save less than a further round costs
MOST_BLOCKS = 16  # of a caption
SMALLEST_PIECE = 8  # captions


@flax.struct.dataclass
class Judge:
  """The judge as the stages need it."""

  model: Decoder = flax.struct.field(pytree_node=False)
  params: Params
  prompt: JudgePrompt

  @property
  def head_VD(self) -> Array:
    """The unembedding."""
    return head_matrix(self.model.cfg, self.params)

  def extend(
    self, tokens_NL: Array, position_NL: Array, valid_NL: Array, prefixes: tuple[Prefix, ...]
  ) -> tuple[Array, Prefix]:
    """Runs tokens at given positions after their prefixes: hidden states [N, L, D], and what they
    leave behind as a prefix of their own."""
    out: Any = self.model.apply(
      {"params": self.params}, tokens_NL, position_NL, valid_NL, prefixes, method="extend"
    )
    return out

  def run(
    self, tokens_NL: Array, valid_NL: Array, start_N: Array, prefixes: tuple[Prefix, ...]
  ) -> tuple[Array, Prefix]:
    """As `extend`, from position `start_N` on; positions count valid tokens only."""
    position_NL = start_N[:, None] + jnp.cumsum(valid_NL, axis=1) - 1
    return self.extend(tokens_NL, jnp.maximum(position_NL, 0), valid_NL, prefixes)

  def logprobs(self, hidden_ND: Array, target_NX: Array, cfg: JudgeConfig) -> Array:
    """Log-probability of each target as the next token, float32 [N, X]."""
    logp_NX, _ = token_logprobs(hidden_ND, self.head_VD, target_NX, chunk_tokens=cfg.chunk_tokens)
    return logp_NX


@flax.struct.dataclass
class JudgeIds:
  """Captions in the judge's vocabulary."""

  tokens_BGT: Array  # int32
  keep_BGT: Array  # bool, which of them the judge is shown

  @classmethod
  def of(cls, captions: Captions, vocabulary: Vocabulary) -> "JudgeIds":
    """By the table of the policy's vocabulary. Special tokens are stripped, so that no caption can
    close the judge's turn."""
    judge_id_BGT = vocabulary.judge_id_V[captions.tokens_BGT]
    keep_BGT = captions.valid_BGT & (judge_id_BGT >= 0)
    return cls(jnp.maximum(judge_id_BGT, 0), keep_BGT)

  def with_empty(self) -> "JudgeIds":
    """With an empty caption as one more member of each group, the last, [B, G + 1, T]."""
    return jax.tree.map(lambda x_BGT: jnp.pad(x_BGT, ((0, 0), (0, 1), (0, 0))), self)


@flax.struct.dataclass
class Branches:
  """The captions as prefixes that questions branch from."""

  prefixes: tuple[Prefix, ...]  # the prompt's head (1 row), the captions (N rows)
  start_N: Array  # int32, position of the first token after each caption
  group: int = flax.struct.field(pytree_node=False)  # G

  @property
  def slots(self) -> int:
    """Of a caption."""
    return self.prefixes[-1].valid_RS.shape[1]

  def cut(self, slots: int) -> "Branches":
    """With so many slots of each caption."""
    *others, caption = self.prefixes
    keys_values = (caption.key_YRSJh, caption.value_YRSJh)
    key, value = jax.tree.map(lambda x: x[:, :, :slots], keys_values)
    cut = Prefix(key, value, caption.valid_RS[:, :slots])
    return dataclasses.replace(self, prefixes=(*others, cut))

  def per_caption(self, x_BK: Array) -> Array:
    """[B, K, ...] -> [B * G * K, ...]: every caption of a group gets the image's questions."""
    x = jnp.broadcast_to(x_BK[:, None], (x_BK.shape[0], self.group, *x_BK.shape[1:]))
    return x.reshape(-1, *x_BK.shape[2:])


def judge_ids(
  judge: Judge, captions: JudgeIds, questions: Questions, key: Array, cfg: JudgeConfig
) -> Answers:
  """Asks every caption about its image. With `cfg.blind` an empty caption is asked too."""
  return with_blind(lambda ids: answer_questions(judge, ids, questions, key, cfg), captions, cfg)


def with_blind(ask: Callable[[JudgeIds], Answers], captions: JudgeIds, cfg: JudgeConfig) -> Answers:
  """`ask` of captions; with `cfg.blind`, of an empty caption for each image too."""
  return ask(captions.with_empty()).without_blind() if cfg.blind else ask(captions)


def answer_questions(
  judge: Judge, captions: JudgeIds, questions: Questions, key: Array, cfg: JudgeConfig
) -> Answers:
  """Answers from captions in the judge's ids.

  Args:
    questions: of each image. What is presented, and in which order of options, is the same for all
      captions of an image, unless `cfg.independent`.
    key: consumed, by draws, orders and sampling.
  """
  B, G, T = captions.tokens_BGT.shape
  if cfg.independent and G > 1:  # every caption is an image of its own
    alone = jax.tree.map(lambda x: x.reshape(B * G, 1, T), captions)
    wide = jax.tree.map(lambda x: jnp.repeat(x, G, axis=0), questions)
    answers = answer_questions(judge, alone, wide, key, cfg)
    return jax.tree.map(lambda x: x.reshape(B, G, *x.shape[2:]), answers)

  draw_key, order_key, sample_key = jax.random.split(key, 3)
  index_BK, drawn_BK = draw_questions(draw_key, questions.valid_BK, cfg)
  # Where the order is not shuffled, a question drawn again is answered from the same numbers: it is
  # run once.
  run_once = cfg.reading == "option_pmi" or (not cfg.shuffle and cfg.reading != "generate")
  presented = questions if run_once or not cfg.draws else take_questions(questions, index_BK)
  shown = (
    presented if cfg.reading == "option_pmi" else Sheet.of(judge.prompt, presented, order_key, cfg)
  )
  score_BGKA, choice_BGK = _ask(judge, captions, shown, sample_key, cfg)
  if cfg.reading == "option_pmi":
    score_BGKA = score_BGKA - presented.prior_BKA[:, None]
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
  return _answers(
    choice_BGK,
    score_BGKA,
    present_BGKA,
    gold_BGK=presented.gold_BK[:, None],
    asked_BGK=asked_BGK,
    index_BGK=index_BGK,
    cfg=cfg,
  )


@flax.struct.dataclass
class _Asked:
  """Captions and what is asked about each: N = B * G rows. They share nothing but the prompt's
  head, so they can be taken in any order and any pieces."""

  captions: JudgeIds  # [N, 1, T]
  shown: Questions | Sheet  # of each caption's image
  row_N: Array  # int32, its place in the batch, for its random key
  wanted_N: Array  # bool; what becomes of the others nobody reads

  @classmethod
  def of(cls, captions: JudgeIds, shown: Questions | Sheet, wanted_BG: Array) -> "_Asked":
    """A batch's captions, of those that are not wanted nothing but their place."""
    B, G, T = captions.tokens_BGT.shape
    shortened = JudgeIds(captions.tokens_BGT, captions.keep_BGT & wanted_BG[..., None])
    return cls(
      jax.tree.map(lambda x: x.reshape(B * G, 1, T), shortened),
      jax.tree.map(lambda x: jnp.repeat(x, G, axis=0), shown),
      jnp.arange(B * G),
      wanted_BG.reshape(-1),
    )

  def slots(self) -> Array:
    """Slots up to the last token that the judge is shown, int32 [N]; -1 where nothing is wanted."""
    keep_NT = self.captions.keep_BGT[:, 0]
    slots_N = jnp.where(keep_NT, jnp.arange(keep_NT.shape[1]) + 1, 0).max(1)
    return jnp.where(self.wanted_N, slots_N, -1)


def _first_alike(captions: JudgeIds) -> Array:
  """The first caption of each one's group that is the same to the judge, int32 [B, G]."""
  shown_BGT = jnp.where(captions.keep_BGT, captions.tokens_BGT, -1)
  same_BGG = (shown_BGT[:, :, None] == shown_BGT[:, None]).all(-1)
  return jnp.argmax(same_BGG, axis=-1)


def _ask(
  judge: Judge, captions: JudgeIds, shown: Questions | Sheet, key: Array, cfg: JudgeConfig
) -> tuple[Array, Array]:
  """The scores of every option [B, G, K, A] and, where the judge writes its answers, what it chose,
  int32 [B, G, K].

  A caption that its group has twice is asked once. Captions of like lengths are taken together,
  whatever their image, and each piece computes for its longest one.
  """
  B, G, T = captions.tokens_BGT.shape
  first_BG = jnp.broadcast_to(jnp.arange(G), (B, G))
  pieces, rows = _pieces(B * G, cfg.microbatches)
  if pieces > 1 and cfg.reading != "generate":  # there each caption has a random key of its own
    first_BG = _first_alike(captions)
  asked = _Asked.of(captions, shown, first_BG == jnp.arange(G))
  head = _prompt_head(judge)
  sizes = (T // 4, T) if T >= 4 * SMALLEST_CAPTION else (T,)

  def of_piece(piece: _Asked) -> tuple[Array, Array]:
    whole = _caption_branches(judge, head, piece.captions)

    def of_size(slots: int, piece: _Asked) -> tuple[Array, Array]:
      branches = whole.cut(slots + whole.slots - T)
      if isinstance(piece.shown, Sheet):
        if cfg.reading == "generate":
          choice, score = _generated_letters(judge, piece.shown, branches, piece.row_N, key, cfg)
          return score, choice
        score = _letter_logprobs(judge, piece.shown, branches, cfg)
      else:
        score = _option_scores(judge, piece.shown, branches, cfg)
      return score, jnp.zeros(score.shape[:-1], jnp.int32)

    return rungs.on_rung(of_size, sizes, piece.slots(), piece)

  if pieces == 1:
    found = of_piece(asked)
  else:
    asked = sharding.pad_shares(asked, rows * pieces)
    order_N = rungs.like_sizes(asked.slots(), pieces)
    cut = sharding.microbatches(rungs.reorder(asked, order_N), pieces)
    found = jax.lax.map(lambda piece: rungs.where_any(piece.wanted_N, of_piece, piece), cut)
    found = sharding.join_microbatches(found)
    found = rungs.reorder(found, rungs.back(order_N))
    found = sharding.cut_shares(found, B * G)
  found = jax.tree.map(lambda x: x.reshape(B, G, *x.shape[2:]), found)
  return jax.tree.map(jax.vmap(lambda x, first: x[first]), found, (first_BG, first_BG))


def _pieces(captions: int, microbatches: int) -> tuple[int, int]:
  """Into how many pieces captions are cut, and how many a device has in each: `microbatches`, or
  more, since pieces of like captions save work, where they are not too small to be worth it."""
  shards = sharding.batch_shards()
  share = captions // (1 if captions % shards else shards)
  microbatches = max(microbatches, min(8 * microbatches, share // SMALLEST_PIECE))
  rows = -(-share // min(microbatches, share))
  return -(-share // rows), rows


def _answers(
  choice_BGK: Array,
  score_BGKA: Array,
  present_BGKA: Array,
  *,
  gold_BGK: Array,
  asked_BGK: Array,
  index_BGK: Array,
  cfg: JudgeConfig,
) -> Answers:
  """Choices and scores -> what is right, what it earns, and what could not be read."""
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

  def number(x_BGK: Array) -> Array:
    return jnp.where(valid_BGK, x_BGK.astype(jnp.float32), 0.0)

  return Answers(
    choice_BGK=choice_BGK,
    correct_BGK=correct_BGK,
    credit_BGK=number(credit_BGK),
    misled_BGK=number(misled_BGK),
    asked_BGK=asked_BGK,
    valid_BGK=valid_BGK,
    question_BGK=index_BGK,
    score_BGKA=score_BGKA,
  )


def _spaced(prompt: JudgePrompt, captions: JudgeIds) -> JudgeIds:
  """Where the prompt puts a space before the caption, its first token becomes the one that has that
  space, as in the joined text. One more slot in front holds a space for captions whose first token
  has no such twin."""
  if prompt.spaced_V is None or prompt.space is None:
    return captions
  tokens_BGT, keep_BGT = captions.tokens_BGT, captions.keep_BGT
  first_BG1 = jnp.argmax(keep_BGT, axis=-1)[..., None]
  is_first = (jnp.arange(tokens_BGT.shape[-1]) == first_BG1) & keep_BGT
  spaced_BGT = jnp.asarray(prompt.spaced_V)[tokens_BGT]
  swap = is_first & (spaced_BGT >= 0)
  space = jnp.broadcast_to(prompt.space, (*tokens_BGT.shape[:2], 1))
  return JudgeIds(
    jnp.concatenate([space, jnp.where(swap, spaced_BGT, tokens_BGT)], axis=-1),
    jnp.concatenate([~swap.any(-1, keepdims=True), keep_BGT], axis=-1),
  )


def _prompt_head(judge: Judge) -> Prefix:
  """What the prompt's head leaves behind, one row."""
  head_1L = jnp.asarray(judge.prompt.head_L)[None]
  return judge.run(head_1L, jnp.ones(head_1L.shape, bool), jnp.zeros(1, jnp.int32), ())[1]


def _caption_branches(judge: Judge, head: Prefix, captions: JudgeIds) -> Branches:
  """Runs each caption once after the prompt's head, as far as the longest one goes."""
  captions = _spaced(judge.prompt, captions)
  B, G, T = captions.tokens_BGT.shape
  tokens_NT, keep_NT = captions.tokens_BGT.reshape(B * G, T), captions.keep_BGT.reshape(B * G, T)
  start_N = jnp.full(B * G, head.valid_RS.shape[1], jnp.int32)
  position_NT = jnp.maximum(start_N[:, None] + jnp.cumsum(keep_NT, axis=1) - 1, 0)
  row = Row(tokens_NT, position_NT, keep_NT, jnp.zeros_like(tokens_NT))
  blocks = min(max(T // SMALLEST_CAPTION, 1), MOST_BLOCKS)

  def extend(
    judge: Judge,
    row: Row,
    prefixes: tuple[Prefix, ...],
    reach: int,
    earlier: EarlierTokens | None,
  ) -> tuple[Array, Prefix]:
    del reach, earlier  # a caption is one segment, and the blocks before are a prefix
    return judge.extend(row.tokens_NR, row.position_NR, row.valid_NR, prefixes)

  caption = prefix_in_blocks(extend, judge, row, (head,), -(-T // blocks))
  return Branches((head, caption), start_N + keep_NT.sum(1), G)


def _option_scores(
  judge: Judge, questions: Questions, branches: Branches, cfg: JudgeConfig
) -> Array:
  """Mean log-probability of each option's tokens after caption and question, [B, G, K, A]."""
  B, K, A, O = questions.option_BKAO.shape
  stem = branches.per_caption(questions.stem_BKQ)
  stem_valid = branches.per_caption(questions.stem_valid_BKQ)
  start = jnp.repeat(branches.start_N, K)
  hidden, stem_prefix = judge.run(stem, stem_valid, start, branches.prefixes)
  option = branches.per_caption(questions.option_BKAO)
  option_valid = branches.per_caption(questions.option_valid_BKAO)
  # The first token of every option is predicted by the question's last token ...
  logp = judge.logprobs(last_hidden(hidden, stem_valid), option[:, :, 0], cfg)[..., None]
  # ... the others by the option's own tokens, one branch per option;
  # one-token options cost nothing.
  if O > 1:
    inputs, inputs_valid = (x[:, :, :-1].reshape(-1, O - 1) for x in (option, option_valid))
    begin = jnp.repeat(start + stem_valid.sum(1), A)
    hidden, _ = judge.run(inputs, inputs_valid, begin, (*branches.prefixes, stem_prefix))
    rest = judge.logprobs(
      hidden.reshape(-1, hidden.shape[-1]), option[:, :, 1:].reshape(-1, 1), cfg
    )
    logp = jnp.concatenate([logp, rest.reshape(*option.shape[:2], O - 1)], axis=-1)
  mean = masked_sum(logp, option_valid, axis=-1) / jnp.maximum(option_valid.sum(-1), 1)
  return mean.reshape(B, branches.group, K, A)


def _letter_logprobs(judge: Judge, sheet: Sheet, branches: Branches, cfg: JudgeConfig) -> Array:
  """Log-probability of each option's letter, in the dataset's order, the mean over permutations:
  [B, G, K, A]."""
  B, K, A = sheet.order_BKA.shape
  tokens, valid = branches.per_caption(sheet.tokens_BKL), branches.per_caption(sheet.valid_BKL)
  hidden, _ = judge.run(tokens, valid, jnp.repeat(branches.start_N, K), branches.prefixes)
  letters = branches.per_caption(jnp.asarray(judge.prompt.letter_A)[sheet.letter_BKA])
  logp = judge.logprobs(last_hidden(hidden, valid), letters, cfg)
  # Slot s shows option order[s]; back to the dataset's order, where the gold index lives.
  back_BKA = jnp.argsort(sheet.order_BKA, axis=-1)
  score_BGKA = jnp.take_along_axis(
    logp.reshape(B, branches.group, K, A), back_BKA[:, None], axis=-1
  )
  return score_BGKA.reshape(B, branches.group, K // cfg.permutations, cfg.permutations, A).mean(3)


def _generated_letters(
  judge: Judge, sheet: Sheet, branches: Branches, row_N: Array, key: Array, cfg: JudgeConfig
) -> tuple[Array, Array]:
  """Samples an answer and parses it: the option whose letter is the first of A to I in it, -1 where
  that is no option's; int32 [B, G, K]. The scores are 0, or nan where the judge was not finite."""
  (B, K, _), G = sheet.order_BKA.shape, branches.group
  tokens, valid = branches.per_caption(sheet.tokens_BKL), branches.per_caption(sheet.valid_BKL)
  start = jnp.repeat(branches.start_N, K)
  place_N = (row_N[:, None] * K + jnp.arange(K)).reshape(-1)
  hidden, sheet_prefix = judge.run(tokens, valid, start, branches.prefixes)

  assert judge.prompt.words is not None and judge.prompt.letter_V is not None, "made without words"
  end = decode(
    judge.extend,
    judge.head_VD,
    last_hidden(hidden, valid),
    start + valid.sum(1),
    prefixes=(*branches.prefixes, sheet_prefix),
    vocabulary=judge.prompt.words,
    key=jax.vmap(lambda place: jax.random.fold_in(key, place))(place_N),
    cfg=SamplingConfig(max_tokens=cfg.max_tokens, temperature=cfg.temperature),
  )
  letter = jnp.where(end.valid_NT, jnp.asarray(judge.prompt.letter_V)[end.tokens_NT], -1)
  first = jnp.argmax(letter >= 0, axis=1)[:, None]
  letter_BGK1 = jnp.take_along_axis(letter, first, axis=1).reshape(B, G, K, 1)
  hit_BGKA = (sheet.letter_BKA[:, None] == letter_BGK1) & sheet.used_BKA[:, None]
  slot_BGK = jnp.argmax(hit_BGKA, axis=-1)
  order_BGKA = jnp.broadcast_to(sheet.order_BKA[:, None], hit_BGKA.shape)
  chosen = jnp.take_along_axis(order_BGKA, slot_BGK[..., None], axis=-1)[..., 0]
  finite = jnp.isfinite(end.logp_NT).all(1).reshape(B, G, K, 1)
  scores = jnp.where(jnp.broadcast_to(finite, hit_BGKA.shape), 0.0, jnp.nan)
  return jnp.where(hit_BGKA.any(-1), chosen, -1), scores
