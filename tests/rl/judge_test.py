"""The judge's tree of shared prefixes against prompts joined and scored one by one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.judges import asked, captioned

from benchmarks.parts.executed import executed
from caprl_jax.models.decoder import Decoder, DecoderConfig, head_matrix
from caprl_jax.rl import judge as judge_module
from caprl_jax.rl.judge import Judge, JudgeIds, judge_ids
from caprl_jax.rl.judge_protocol import JudgeConfig, draw_orders
from caprl_jax.types import Captions, JudgePrompt, Questions, Vocabulary

V, B, G, T, K, A = 60, 2, 3, 6, 3, 4
JUDGE = Decoder(
  DecoderConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
    qkv_bias=False,
    init_std=0.3,
  )
)
LETTERS = ("letter_argmax", "letter_prob", "letter_sample")
KEY = jax.random.key(7)
PROMPT = JudgePrompt(
  head_L=np.array([1, 2, 3], np.int32),
  label_AL=np.array([[4, 5, 0], [4, 6, 5], [4, 7, 0], [4, 8, 5]], np.int32),
  label_valid_AL=np.array([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]], bool),
  tail_L=np.array([10, 11], np.int32),
  letter_A=np.array([12, 13, 14, 15], np.int32),
  abstain_L=np.zeros(0, np.int32),
)
# Stem, options, gold of each image's questions; the second image has two.
ASKED = [
  [
    ([20, 21], [[30], [31, 32], [33, 34, 35]], 1),
    ([22, 23, 24, 25], [[30, 31], [36]], 0),
    ([26], [[37], [38, 39], [40, 41], [42]], 3),
  ],
  [([27, 28], [[43], [44]], 1), ([29, 20, 21], [[45, 46, 47], [48], [49, 30]], 2)],
]
ONE_TOKEN = [
  [
    ([20, 21], [[30], [31], [33]], 1),
    ([22, 23, 24, 25], [[30], [36]], 0),
    ([26], [[37], [38], [40], [42]], 3),
  ],
  [([27, 28], [[43], [44]], 1), ([29, 20, 21], [[45], [48], [49]], 2)],
]


@pytest.fixture(scope="module")
def params():
  run = jax.jit(
    lambda key: JUDGE.init(
      key, jnp.zeros((1, 2, 32)), jnp.zeros((1, 2), int), jnp.ones((1, 2), bool)
    )
  )
  embed = JUDGE.init(jax.random.key(1), jnp.zeros((1, 2), int), method="embed")
  return nn.unbox({**run(jax.random.key(0))["params"], **embed["params"]})


def questions(asked, width=3, seed=0) -> Questions:
  rng = np.random.default_rng(seed)  # padding holds other ids: nobody may see them
  Q = 5
  out = Questions(
    stem_BKQ=rng.integers(0, V, (B, K, Q)).astype(np.int32),
    stem_valid_BKQ=np.zeros((B, K, Q), bool),
    option_BKAO=rng.integers(0, V, (B, K, A, width)).astype(np.int32),
    option_valid_BKAO=np.zeros((B, K, A, width), bool),
    gold_BK=np.zeros((B, K), np.int32),
    valid_BK=np.zeros((B, K), bool),
    kind_BK=np.zeros((B, K), np.int32),
    prior_BKA=np.zeros((B, K, A), np.float32),
  )
  for b, row in enumerate(asked):
    for k, (stem, options, gold) in enumerate(row):
      out.stem_BKQ[b, k, : len(stem)], out.stem_valid_BKQ[b, k, : len(stem)] = stem, True
      for a, option in enumerate(options):
        out.option_BKAO[b, k, a, : len(option)], out.option_valid_BKAO[b, k, a, : len(option)] = (
          option,
          True,
        )
        out.prior_BKA[b, k, a] = rng.normal()
      out.gold_BK[b, k], out.valid_BK[b, k] = gold, True
  return out


def captions(seed=0):
  """Ids and which count: different lengths, one empty, holes in the middle."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, V, (B, G, T)).astype(np.int32)
  keep = np.arange(T) < np.array([[6, 2, 4], [0, 5, 1]])[..., None]
  keep[0, 0, 2:4] = False
  keep[1, 1, 0] = False
  return ids, keep


def ask(params, asked, cfg, ids=None, keep=None, key=KEY):
  default = captions()
  ids, keep = default if ids is None else (ids, keep)
  return jax.device_get(answer(cfg)(params, PROMPT, ids, keep, asked, key=key))


@functools.cache
def answer(cfg):
  return asked(JUDGE, cfg)


@jax.jit
def forward(params, tokens):
  """One sequence without any prefix; what is right of a token is not seen by it."""
  x = JUDGE.apply({"params": params}, tokens[None], method="embed")
  hidden, _ = JUDGE.apply(
    {"params": params}, x, jnp.arange(len(tokens))[None], jnp.ones((1, len(tokens)), bool)
  )
  return jax.nn.log_softmax(hidden[0] @ head_matrix(JUDGE.cfg, params).T)


def next_logp(params, ids):
  """Log-probabilities after each token of one sequence, [L, V]."""
  return np.asarray(forward(params, np.pad(np.array(ids), (0, 64 - len(ids)))))[: len(ids)]


def every(asked):
  """(b, g, k, stem, options, gold, caption) of all that exists."""
  ids, keep = captions()
  for b, row in enumerate(asked):
    for g in range(G):
      for k, question in enumerate(row):
        yield b, g, k, *question, ids[b, g][keep[b, g]].tolist()


@pytest.mark.parametrize("asked, width", [(ASKED, 3), (ONE_TOKEN, 1), (ONE_TOKEN, 2)])
def test_option_pmi_equals_scoring_each_joined_prompt_on_its_own(params, asked, width):
  table = questions(asked, width)
  got = ask(params, table, JudgeConfig(chunk_tokens=1024 if width == 3 else 7))
  for b, g, k, stem, options, gold, caption in every(asked):
    scores = []
    for a, option in enumerate(options):
      before = [*PROMPT.head_L, *caption, *stem]
      logp = next_logp(params, before + option)
      mean = np.mean([logp[len(before) - 1 + i, token] for i, token in enumerate(option)])
      scores.append(mean - table.prior_BKA[b, k, a])
    np.testing.assert_allclose(got.score_BGKA[b, g, k, : len(options)], scores, atol=1e-4)
    np.testing.assert_array_equal(got.score_BGKA[b, g, k, len(options) :], -np.inf)
    assert got.choice_BGK[b, g, k] == np.argmax(scores)
    assert got.correct_BGK[b, g, k] == (np.argmax(scores) == gold) == got.credit_BGK[b, g, k]
    assert got.valid_BGK[b, g, k]
  assert got.correct_BGK.any() and not got.correct_BGK[got.valid_BGK].all()


@pytest.mark.parametrize("reading", ["option_pmi", "letter_argmax"])
def test_pieces_and_blocks_change_nothing(params, reading, monkeypatch):
  """Eight captions (two of them empty, for the blind answers) in three pieces of three, so that one
  place is filled up; each in blocks of one token."""
  ids, keep = captions()

  def ask(cfg):
    run = jax.jit(functools.partial(judge_ids, cfg=cfg))
    return run(Judge(JUDGE, params, PROMPT), JudgeIds(ids, keep), questions(ASKED), KEY)

  whole = ask(JudgeConfig(reading=reading))
  monkeypatch.setattr(judge_module, "SMALLEST_CAPTION", 1)
  assert judge_module._pieces(8, 3) == (3, 3)
  pieces = ask(JudgeConfig(reading=reading, microbatches=3))
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


def test_a_caption_that_its_group_has_twice_is_asked_once(params):
  ids, keep = captions()
  again = [0, 1, 0]  # of each group the first caption is there twice
  ids, keep = ids[:, again], keep[:, again]
  ids[1, 2, ~keep[1, 2]] += 1  # what the judge is not shown makes no difference

  def ask(cfg):
    def answer(ids, keep):
      return judge_ids(
        Judge(JUDGE, params, PROMPT), JudgeIds(ids, keep), questions(ASKED), KEY, cfg
      )

    return answer

  one, six = (ask(JudgeConfig(microbatches=count, blind=False)) for count in (1, 6))
  for a, b in zip(jax.tree.leaves(one(ids, keep)), jax.tree.leaves(six(ids, keep)), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
  other_ids, other_keep = captions()
  flops, _ = executed(six, ids, keep)
  all_of_them, _ = executed(six, other_ids, other_keep)
  head, _ = executed(lambda: judge_module._prompt_head(Judge(JUDGE, params, PROMPT)))
  assert flops - head == pytest.approx((all_of_them - head) * 4 / 6, rel=0.02)


@pytest.mark.parametrize("reading", LETTERS)
def test_letters_equal_the_joined_prompt_with_its_options_in_the_drawn_order(params, reading):
  table = questions(ASKED)
  got = ask(params, table, JudgeConfig(reading=reading))
  order = np.asarray(
    draw_orders(
      jax.random.split(KEY, 3)[1], jnp.asarray(table.option_valid_BKAO.any(-1)), JudgeConfig()
    )
  )
  moved = 0
  for b, g, k, stem, options, gold, caption in every(ASKED):
    shown = [a for a in order[b, k] if a < len(options)]
    assert sorted(shown) == list(range(len(options)))
    moved += shown != sorted(shown)
    prompt = [*PROMPT.head_L, *caption, *stem]
    for slot, a in enumerate(shown):
      prompt += [*PROMPT.label_AL[slot][PROMPT.label_valid_AL[slot]], *options[a]]
    logp = next_logp(params, prompt + [*PROMPT.tail_L])[-1]
    scores = np.zeros(len(options))
    for slot, a in enumerate(shown):
      scores[a] = logp[PROMPT.letter_A[slot]]
    np.testing.assert_allclose(got.score_BGKA[b, g, k, : len(options)], scores, atol=1e-4)
    if reading == "letter_sample":
      assert 0 <= got.choice_BGK[b, g, k] < len(options)
    else:
      assert got.choice_BGK[b, g, k] == np.argmax(scores)
    assert got.correct_BGK[b, g, k] == (got.choice_BGK[b, g, k] == gold)
    share = np.exp(scores) / np.exp(scores).sum()
    credit = share[gold] if reading == "letter_prob" else got.correct_BGK[b, g, k]
    np.testing.assert_allclose(got.credit_BGK[b, g, k], credit, atol=1e-4)
  assert moved


@pytest.mark.parametrize("reading", ["option_pmi", "letter_prob"])
def test_special_tokens_in_a_caption_are_stripped(params, reading):
  table = jax.tree.map(jnp.asarray, questions(ASKED))
  # Policy id v is judge id v - 1; ids 0 and 50 and up are special in the policy.
  judge_id = np.where((np.arange(V) >= 1) & (np.arange(V) < 50), np.arange(V) - 1, -1)
  vocabulary = Vocabulary(jnp.ones(V, bool), jnp.asarray(judge_id), (51,), 0)
  with_special = np.array(
    [
      [[7, 50, 8, 0, 9, 51], [51, 3, 51, 0, 0, 0], [5, 6, 51, 0, 0, 0]],
      [[50, 50, 11, 12, 51, 0], [20, 21, 22, 23, 24, 25], [51, 0, 0, 0, 0, 0]],
    ]
  )
  length = np.array([[6, 1, 3], [5, 6, 1]])
  without = np.array(
    [
      [[6, 7, 8, 0, 0, 0], [0] * 6, [4, 5, 0, 0, 0, 0]],
      [[10, 11, 0, 0, 0, 0], [19, 20, 21, 22, 23, 24], [0] * 6],
    ]
  )
  kept = np.array([[3, 0, 2], [2, 6, 0]])
  valid = np.arange(T) < length[..., None]
  cfg = JudgeConfig(reading=reading, blind=False)
  written = Captions(
    jnp.asarray(with_special), jnp.zeros((B, G, T)), jnp.asarray(valid), jnp.ones((B, G), bool)
  )
  run = captioned(JUDGE, cfg)
  got = run(params, PROMPT, written, table, vocabulary, KEY)
  want = ask(params, table, cfg, without.astype(np.int32), np.arange(T) < kept[..., None])
  np.testing.assert_allclose(got.score_BGKA, want.score_BGKA, atol=1e-4)
  np.testing.assert_array_equal(got.choice_BGK, want.choice_BGK)
  np.testing.assert_array_equal(got.correct_BGK, want.correct_BGK)


def test_a_winner_must_beat_the_runner_up_by_the_margin(params):
  table = questions(ASKED)
  free = ask(params, table, JudgeConfig(margin=0.0))
  best = np.sort(free.score_BGKA, -1)[..., ::-1]
  gap = np.where(free.valid_BGK, best[..., 0] - best[..., 1], np.nan)
  margin = float(np.nanmedian(gap)) + 1e-3
  strict = ask(params, table, JudgeConfig(margin=margin))
  np.testing.assert_array_equal(strict.choice_BGK, np.where(gap > margin, free.choice_BGK, -1))
  unclear = free.valid_BGK & ~(gap > margin)
  assert unclear.any() and (gap > margin).any()
  assert (strict.credit_BGK[unclear] == 0).all() and strict.valid_BGK[unclear].all()


def test_a_tie_is_no_answer(params):
  twin = [[([20, 21], [[30], [30]], 0)], [([20, 21], [[30, 31], [30, 31], [32]], 0)]]
  table = questions(twin)
  table.prior_BKA[...] = [0, 0, 100, 0]  # the third option is out
  got = ask(params, table, JudgeConfig())
  np.testing.assert_array_equal(got.choice_BGK[:, :, 0], -1)
  assert not got.correct_BGK.any() and got.valid_BGK[:, :, 0].all()


@pytest.mark.parametrize("reading", ["option_pmi", "letter_prob"])
def test_absent_options_and_questions_are_never_chosen(params, reading):
  table = questions(ASKED)
  table.prior_BKA[~table.option_valid_BKAO.any(-1)] = -1e6  # as good as it gets
  count = table.option_valid_BKAO.any(-1).sum(-1)
  for seed in range(5):
    for cfg in (
      JudgeConfig(reading=reading),
      *([JudgeConfig(reading="letter_sample")] if reading != "option_pmi" else []),
    ):
      got = ask(params, table, cfg, key=jax.random.key(seed))
      assert (got.choice_BGK < np.maximum(count, 1)[:, None]).all()
  absent = np.broadcast_to(~table.valid_BK[:, None], got.valid_BGK.shape)
  assert absent.any()
  np.testing.assert_array_equal(got.valid_BGK, ~absent)
  np.testing.assert_array_equal(got.choice_BGK[absent], -1)
  assert not got.correct_BGK[absent].any() and (got.credit_BGK[absent] == 0).all()


@pytest.mark.parametrize("reading", ["option_pmi", "letter_prob"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_judge_that_is_not_finite_gives_no_valid_answer(params, reading, value):
  broken = jax.tree.map(lambda x: x, params)
  broken["norm"] = jax.tree.map(lambda x: jnp.full_like(x, value), params["norm"])
  got = ask(broken, questions(ASKED), JudgeConfig(reading=reading))
  assert not got.valid_BGK.any() and not got.correct_BGK.any()
  np.testing.assert_array_equal(got.choice_BGK, -1)
  np.testing.assert_array_equal(got.credit_BGK, 0)


def test_one_question_that_is_not_finite_leaves_the_others_valid(params):
  table = questions(ASKED)
  table.prior_BKA[0, 1, 0] = np.nan
  table.prior_BKA[1, 0, 3] = np.nan  # an absent option: does not matter
  got = ask(params, table, JudgeConfig())
  np.testing.assert_array_equal(got.valid_BGK[0], [[True, False, True]] * G)
  np.testing.assert_array_equal(got.valid_BGK[1], [[True, True, False]] * G)


def test_orders_are_uniform_permutations_with_absent_options_last():
  present = jnp.broadcast_to(jnp.array([True, False, True, True]), (3000, 1, 4))
  order = np.asarray(draw_orders(jax.random.key(0), present, JudgeConfig()))[:, 0]
  np.testing.assert_array_equal(np.sort(order, 1), np.broadcast_to(np.arange(4), (3000, 4)))
  assert (order[:, 3] == 1).all()
  _, counts = np.unique(order, axis=0, return_counts=True)
  assert len(counts) == 6 and (np.abs(counts / 3000 - 1 / 6) < 0.03).all()


def test_all_captions_of_an_image_see_the_same_order(params):
  ids, keep = captions()
  same = np.broadcast_to(ids[:, :1], ids.shape), np.broadcast_to(keep[:, :1], keep.shape)
  got = ask(params, questions(ASKED), JudgeConfig(reading="letter_prob"), *same)
  np.testing.assert_allclose(
    got.credit_BGK, np.broadcast_to(got.credit_BGK[:, :1], got.credit_BGK.shape), atol=1e-6
  )


def test_letter_sample_follows_the_temperature(params):
  table = questions(ASKED)
  hot = [
    ask(
      params, table, JudgeConfig(reading="letter_sample", temperature=100.0), key=jax.random.key(s)
    ).choice_BGK
    for s in range(8)
  ]
  cold = ask(params, table, JudgeConfig(reading="letter_sample", temperature=1e-4))
  assert len(np.unique(np.stack(hot), axis=0)) > 1
  best = np.argmax(cold.score_BGKA, axis=-1)
  np.testing.assert_array_equal(cold.choice_BGK, np.where(cold.valid_BGK, best, -1))


@pytest.mark.parametrize(
  "wrong, message",
  [
    (dict(temperature=0.0), "temperature = 0.0 must be > 0"),
    (dict(margin=-1.0), "margin = -1.0 >= 0"),
    (dict(draws=-1), "draws = -1"),
    (dict(permutations=0), "permutations = 0"),
    (dict(max_tokens=0), "max_tokens = 0"),
    (dict(permutations=2), "permutations = 2 averages .*not 'option_pmi'"),
    (
      dict(reading="letter_argmax", permutations=2, shuffle=False),
      "permutations = 2 averages .*and False",
    ),
    (dict(prompt="official"), "'option_pmi' shows no list"),
    (dict(abstain="last"), "'option_pmi' shows no list"),
    (
      dict(reading="letter_prob", margin=0.3),
      "margin = 0.3 has no meaning for reading 'letter_prob'",
    ),
    (
      dict(reading="letter_sample", margin=0.3),
      "margin = 0.3 has no meaning for reading 'letter_sample'",
    ),
    (dict(reading="generate", margin=0.3), "margin = 0.3 has no meaning for reading 'generate'"),
    (
      dict(reading="letter_prob", abstain="permuted", shuffle=False),
      "abstain 'permuted' goes with shuffle",
    ),
    (
      dict(reading="letter_prob", abstain="permuted", abstain_letter="F"),
      "abstain 'permuted' goes with shuffle",
    ),
  ],
)
def test_wrong_settings_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    JudgeConfig(**wrong)
