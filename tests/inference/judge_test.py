"""Asking the judge from the host: each distinct thing once, and as if each were asked alone."""

import collections
import dataclasses
import functools
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from caprl_jax import sharding
from caprl_jax.data.judge_prompts import PLAIN as LETTER_TEMPLATE
from caprl_jax.data.judge_prompts import PMI as PMI_TEMPLATE
from caprl_jax.data.rows import Question
from caprl_jax.hub.load import load_judge
from caprl_jax.inference.judge import HostJudge
from caprl_jax.models.decoder import head_matrix
from caprl_jax.rl import judge_protocol
from caprl_jax.rl.judge_protocol import JudgeConfig

LETTERS = ("letter_argmax", "letter_prob", "letter_sample")
PMI = JudgeConfig()
COLOR = Question("what color is the shape?", ("red", "green", "blue"), 0, "color")
# Options of one token and of several, more of them than are asked in one piece, and two that COLOR
# has too.
MANY = Question(
  "what color is the shape?",
  (
    "red",
    "dark red",
    "teal",
    "blue circle",
    "the image",
    "a red rectangle",
    "blue",
    "green question",
  ),
  1,
  "color",
)
SHAPE = Question("what shape is present?", ("circle", "a blue rectangle"), 0, "shape")
QUESTIONS = (COLOR, MANY, SHAPE)
CAPTIONS = ("", "red", "The image shows a blue rectangle.")
ASKS = [(caption, q) for caption in CAPTIONS for q in QUESTIONS]
# The tiny judge's tokenizer has letters for four options.
LETTER_QUESTIONS = (COLOR, dataclasses.replace(MANY, options=MANY.options[:4]), SHAPE)
LETTER_ASKS = [(caption, q) for caption in CAPTIONS for q in LETTER_QUESTIONS]
CLEAR = 1e-3  # what a choice must be sure by, for rounding not to change it


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
  path = tiny.write_judge(tmp_path_factory.mktemp("judge"))
  return load_judge(str(path), sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def forward(judge):
  """One sequence of ids -> log-probabilities after each, without prefixes, padding that counts or
  other rows.
  """

  @jax.jit
  def run(params, ids):
    embedded = judge.model.apply({"params": params}, ids[None], method="embed")
    hidden, _ = judge.model.apply(
      {"params": params}, embedded, jnp.arange(len(ids))[None], jnp.ones((1, len(ids)), bool)
    )
    return jax.nn.log_softmax(hidden[0] @ head_matrix(judge.model.cfg, params).T)

  return lambda ids: np.asarray(run(judge.params, jnp.asarray(np.pad(ids, (0, 128 - len(ids))))))[
    : len(ids)
  ]


@pytest.fixture(scope="module")
def alone(judge, forward):
  """(caption, stem, option) -> mean log-probability of the option's tokens, each asked on its
  own.
  """
  encode = judge.tokenizer.encode_plain

  @functools.cache
  def score(caption, stem, option):
    before = [
      *encode(PMI_TEMPLATE.head),
      *encode(caption),
      *encode(PMI_TEMPLATE.stem.format(question=stem)),
    ]
    tokens = encode(PMI_TEMPLATE.option.format(option=option))
    logp = forward([*before, *tokens])
    return np.mean([logp[len(before) - 1 + i, token] for i, token in enumerate(tokens)])

  return score


@pytest.fixture(scope="module")
def expected(alone):
  """The choices that scoring everything alone gives."""
  chosen = []
  for caption, q in ASKS:
    score = [
      alone(caption, q.stem, option) - alone(PMI_TEMPLATE.baseline, q.stem, option)
      for option in q.options
    ]
    second, best = np.sort(score)[-2:]
    assert best - second > PMI.margin + CLEAR
    chosen.append(int(np.argmax(score)))
  return chosen


PROGRAMS = {}  # what judges compiled: one jit for all of a reading, for the tests to be fast


def new_judge(judge, cfg=PMI, seed=0, patched=False, **sizes):
  host_judge = HostJudge(judge, cfg, kinds=("color", "shape"), seed=seed, **sizes)
  host_judge._answer = PROGRAMS.setdefault((judge.model, cfg, patched), host_judge._answer)
  return host_judge


@pytest.fixture(scope="module")
def learnt(judge):
  """A judge that has answered ASKS, what it was asked on the way, and its answers."""
  host_judge = new_judge(judge)
  asked, shapes = watch(host_judge)
  return host_judge, asked, shapes, host_judge.choices(ASKS)


def watch(host_judge):
  """Counts (caption, stem, option) that reach the judge, and notes the shape of the options of
  every call.
  """
  asked, shapes = collections.Counter(), []
  ask, answer = host_judge._ask, host_judge._answer

  def counting(asks, *args):
    asked.update((caption, q.stem, option) for caption, q in asks for option in q.options)
    return ask(asks, *args)

  def noting(judge, captions, questions, key):
    shapes.append(questions.option_BKAO.shape)
    return answer(judge, captions, questions, key=key)

  host_judge._ask, host_judge._answer = counting, noting
  return asked, shapes


def test_the_options_are_what_the_tests_need(judge):
  host_judge = new_judge(judge)
  long = [host_judge._is_long(option) for option in MANY.options]
  assert sum(long) > 4 and not all(long) and len(MANY.options) > 4
  assert [host_judge._is_long(option) for option in COLOR.options] == [False] * 3
  assert [host_judge._is_long(option) for option in SHAPE.options] == [False, True]


def test_choices_equal_those_of_scoring_everything_alone(learnt, alone, expected):
  host_judge, _, _, got = learnt
  assert got.dtype == int and got.tolist() == expected
  assert len(set(expected)) > 2
  assert {
    (caption, q.stem, option) for caption, q in ASKS for option in q.options
  } <= host_judge.known.keys()
  for key, score in host_judge.known.items():
    assert score == pytest.approx(alone(*key), abs=2e-5), key


def test_each_distinct_option_is_asked_once(learnt):
  host_judge, asked, shapes, got = learnt
  assert set(asked) == {
    (caption, q.stem, option)
    for caption in (*CAPTIONS, PMI_TEMPLATE.baseline)
    for q in QUESTIONS
    for option in q.options
  }
  assert set(asked.values()) == {1}
  calls = len(shapes)
  assert host_judge.choices(ASKS[::-1]).tolist() == got.tolist()[::-1] and len(shapes) == calls


def test_options_of_one_token_are_asked_apart(learnt, judge):
  *_, shapes, _ = learnt
  lengths = [
    len(judge.tokenizer.encode_plain(f" {option}")) for q in QUESTIONS for option in q.options
  ]
  assert {O for *_, O in shapes} == {1, max(lengths)}
  host_judge = new_judge(judge)
  _, shapes = watch(host_judge)
  host_judge.choices([(CAPTIONS[1], COLOR)])
  assert [O for *_, O in shapes] == [1, 1]  # the baseline's, the caption's


def test_sizes_and_seed_do_not_change_what_is_learnt(judge, learnt):
  host_judge = new_judge(judge, seed=1, questions_per_row=3, rows_per_call=2)
  _, shapes = watch(host_judge)
  assert host_judge.choices(ASKS).tolist() == learnt[-1].tolist()
  assert {(B, K) for B, K, *_ in shapes} == {(2, 3)} and len(shapes) > len(learnt[2])
  assert host_judge.known.keys() == learnt[0].known.keys()
  for key, score in learnt[0].known.items():
    assert host_judge.known[key] == pytest.approx(score, abs=2e-5), key


def test_captions_and_stems_of_other_lengths(judge, alone):
  host_judge = new_judge(judge)
  long = Question(
    "Please describe this image in detail. what color is the shape?", COLOR.options, 0, "color"
  )
  caption = "The image shows a red circle. The image shows a green rectangle."
  host_judge.choices([(caption, COLOR), ("", long), ("red", COLOR)])
  assert len(host_judge.known) == 5 * 3
  for key, score in host_judge.known.items():
    assert score == pytest.approx(alone(*key), abs=2e-5), key


def test_priors(judge, alone):
  host_judge = new_judge(judge)
  asked, shapes = watch(host_judge)
  host_judge.priors(iter([*QUESTIONS, COLOR]))
  for q in QUESTIONS:
    np.testing.assert_allclose(
      host_judge.prior_of(q), [alone("An image.", q.stem, o) for o in q.options], atol=2e-5
    )
  assert {caption for caption, *_ in asked} == {"An image."} == {host_judge.baseline} and set(
    asked.values()
  ) == {1}
  calls = len(shapes)
  assert (
    host_judge.choices(
      [
        (
          "An "
          # it says nothing: all scores are 0
          "image.",
          q,
        )
        for q in QUESTIONS
      ]
    ).tolist()
    == [-1] * 3
  )
  assert len(shapes) == calls


def test_correct_and_the_margin(judge, learnt):
  host_judge, *_, chosen = learnt
  gold = np.array([q.gold for _, q in ASKS])
  assert host_judge.correct(ASKS).tolist() == (chosen == gold).tolist()
  unsure = new_judge(judge, JudgeConfig(margin=100.0))
  unsure.known = dict(host_judge.known)
  assert unsure.choices(ASKS).tolist() == [-1] * len(ASKS) and not unsure.correct(ASKS).any()
  assert len(host_judge.choices([])) == 0


@pytest.mark.parametrize("reading", LETTERS)
def test_letter_readings_choose_what_a_prompt_on_its_own_chooses(
  judge, forward, monkeypatch, reading
):
  # In the dataset's order: the orders are drawn anew for each place in a batch.
  monkeypatch.setattr(
    judge_protocol,
    "draw_orders",
    lambda key, present, cfg: jnp.argsort(~present, axis=-1, stable=True),
  )
  encode, template = judge.tokenizer.encode_plain, LETTER_TEMPLATE
  letters = [encode(f" {letter}")[0] for letter in "ABCD"]
  expected = []
  for caption, q in LETTER_ASKS:
    ids = [*encode(template.head), *encode(caption), *encode(template.stem.format(question=q.stem))]
    for letter, option in zip("ABCD", q.options):
      ids += [*encode(f"\n- {letter})"), *encode(f" {option}")]
    logp = forward([*ids, *encode(template.tail)])[-1][letters[: len(q.options)]]
    second, best = np.sort(logp)[-2:]
    assert best - second > PMI.margin + CLEAR
    expected.append(int(np.argmax(logp)))
  # So cold that a sample is the best option.
  cfg = JudgeConfig(reading=reading, temperature=1e-5 if reading == "letter_sample" else 0.6)
  assert (
    new_judge(judge, cfg, patched=True).choices(LETTER_ASKS).tolist() == expected
    and len(set(expected)) > 1
  )
  if reading == "letter_argmax":
    host_judge = new_judge(judge, cfg, patched=True, questions_per_row=2, rows_per_call=1)
    assert host_judge.choices(LETTER_ASKS).tolist() == expected


def test_letter_readings_ask_once_and_have_no_prior(judge):
  host_judge = new_judge(judge, JudgeConfig(reading="letter_argmax"))
  asked, shapes = watch(host_judge)
  host_judge.priors(LETTER_QUESTIONS)
  assert not shapes and host_judge.prior_of(LETTER_QUESTIONS[1]) == [0.0] * 4
  renamed = Question(COLOR.stem, COLOR.options, 2, "shape")  # the judge sees neither gold nor kind
  asks = [*LETTER_ASKS, (CAPTIONS[1], renamed), *LETTER_ASKS]
  got, count = host_judge.choices(asks), len(LETTER_ASKS)
  assert got[:count].tolist() == got[-count:].tolist()
  assert got[count] == got[LETTER_ASKS.index((CAPTIONS[1], COLOR))]
  # "red" and "blue" are options of two questions with one stem, which differ: both are asked.
  assert asked[CAPTIONS[1], COLOR.stem, "red"] == 2 and asked[CAPTIONS[1], COLOR.stem, "green"] == 1
  calls = len(shapes)
  host_judge.choices(LETTER_ASKS)
  assert len(shapes) == calls
  assert all(-1 <= choice < len(q.options) for choice, (_, q) in zip(got, LETTER_ASKS))
  again = new_judge(judge, JudgeConfig(reading="letter_argmax"))
  assert again.choices(asks).tolist() == got.tolist()


@pytest.mark.parametrize("reading", ["option_pmi", "letter_argmax"])
def test_a_judge_that_is_not_finite_names_the_question_and_the_caption(judge, reading):
  stem = "what shape describe?"
  [token] = judge.tokenizer.encode_plain(
    " "
    # its row is what is broken: no other question has it
    "describe"
  )
  params = {
    name: jax.tree.map(lambda x: x.at[token].set(jnp.nan), value) if "embed" in name else value
    for name, value in judge.params.items()
  }
  host_judge = new_judge(dataclasses.replace(judge, params=params), JudgeConfig(reading=reading))
  asks = ASKS if reading == "option_pmi" else LETTER_ASKS
  # The caption that says nothing is asked first by option_pmi.
  caption = "An image." if reading == "option_pmi" else CAPTIONS[1]
  message = (
    f"not finite for the question {stem!r} on the caption {caption!r}; "
    "check judge.source and its dtype"
  )
  with pytest.raises(ValueError, match=re.escape(message)):
    host_judge.choices(
      [*asks, (CAPTIONS[1], Question(stem, ("circle", "a blue rectangle"), 0, "shape"))]
    )
  assert not any(stem in key for key in host_judge.known)
  assert len(host_judge.choices(asks)) == len(asks)  # the other questions are well


def test_a_judge_nobody_holds_is_freed(judge):
  host_judge = new_judge(judge)
  host_judge._is_long("red"), host_judge.tokenize.prompt(2)
  gone = weakref.ref(host_judge), weakref.ref(host_judge.tokenize)
  del host_judge
  gc.collect()
  assert [ref() for ref in gone] == [None, None]
