"""Asking the judge from the host: each distinct thing once, and as if each were asked alone."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from caprl_jax import judging, sharding
from caprl_jax.asking import Asker
from caprl_jax.data.questions import LETTER_TEMPLATE, PMI_TEMPLATE, QuestionTokenizer
from caprl_jax.data.rows import Question
from caprl_jax.judging import JudgeConfig
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.load import load_judge

LETTERS = ("letter_argmax", "letter_prob", "letter_sample")
PMI = JudgeConfig()
COLOR = Question("what color is the shape?", ("red", "green", "blue"), 0, "color")
# Options of one token and of several, more of them than are asked in one piece, and two that COLOR has too.
MANY = Question("what color is the shape?", ("red", "dark red", "teal", "blue circle", "the image", "a red rectangle",
                                             "blue", "green question"), 1, "color")
SHAPE = Question("what shape is present?", ("circle", "a blue rectangle"), 0, "shape")
LONG = Question("Please describe this image in detail. what shape is present?", ("a red circle", "blue circle"), 1,
                "shape")
QUESTIONS = (COLOR, MANY, SHAPE, LONG)
CAPTIONS = ("", "The image shows a red circle.", "The image shows a blue rectangle. The image shows a green circle.")
ASKS = [(caption, q) for caption in CAPTIONS for q in QUESTIONS]
CLEAR = 1e-3  # what a choice must be sure by, for rounding not to change it


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
  path = tiny.write_judge(tmp_path_factory.mktemp("judge"))
  return load_judge(str(path), sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def forward(judge):
  """One sequence of ids -> log-probabilities after each, without prefixes, padding that counts or other rows."""
  @jax.jit
  def run(params, ids):
    embedded = judge.model.apply({"params": params}, ids[None], method="embed")
    hidden, _ = judge.model.apply({"params": params}, embedded, jnp.arange(len(ids))[None], jnp.ones((1, len(ids)), bool))
    return jax.nn.log_softmax(hidden[0] @ head_matrix(judge.model.cfg, params).T)
  return lambda ids: np.asarray(run(judge.params, jnp.asarray(np.pad(ids, (0, 128 - len(ids))))))[:len(ids)]


@pytest.fixture(scope="module")
def alone(judge, forward):
  """(caption, stem, option) -> mean log-probability of the option's tokens, each asked on its own."""
  encode = judge.tokenizer.encode_plain

  @functools.cache
  def score(caption, stem, option):
    before = [*encode(PMI_TEMPLATE.head), *encode(caption), *encode(PMI_TEMPLATE.stem.format(question=stem))]
    tokens = encode(PMI_TEMPLATE.option.format(option=option))
    logp = forward([*before, *tokens])
    return np.mean([logp[len(before) - 1 + i, token] for i, token in enumerate(tokens)])
  return score


@pytest.fixture(scope="module")
def expected(alone):
  """The choices that scoring everything alone gives."""
  chosen = []
  for caption, q in ASKS:
    score = [alone(caption, q.stem, option) - alone(PMI_TEMPLATE.baseline, q.stem, option) for option in q.options]
    second, best = np.sort(score)[-2:]
    assert best - second > PMI.margin + CLEAR
    chosen.append(int(np.argmax(score)))
  return chosen


def new_asker(judge, cfg=PMI, seed=0, **sizes):
  template = PMI_TEMPLATE if cfg.reading == "option_pmi" else LETTER_TEMPLATE
  return Asker(judge, QuestionTokenizer(judge.tokenizer, template, ("color", "shape")), cfg, seed, **sizes)


@pytest.fixture(scope="module")
def learnt(judge):
  """An asker that has answered ASKS, what it was asked on the way, and its answers."""
  asker = new_asker(judge)
  asked, shapes = watch(asker)
  return asker, asked, shapes, asker.choices(ASKS)


def watch(asker):
  """Counts (caption, stem, option) that reach the judge, and notes the shape of the options of every call."""
  asked, shapes = collections.Counter(), []
  ask, answer = asker._ask, asker._answer

  def counting(asks, *args):
    asked.update((caption, q.stem, option) for caption, q in asks for option in q.options)
    return ask(asks, *args)

  def noting(params, prompt, ids, keep, questions, key):
    shapes.append(questions.option_BKAO.shape)
    return answer(params, prompt, ids, keep, questions, key=key)

  asker._ask, asker._answer = counting, noting
  return asked, shapes


def test_the_options_are_what_the_tests_need(judge):
  asker = new_asker(judge)
  long = [asker._is_long(option) for option in MANY.options]
  assert sum(long) > 4 and not all(long) and len(MANY.options) > 4
  assert [asker._is_long(option) for option in COLOR.options] == [False] * 3
  assert [asker._is_long(option) for option in SHAPE.options] == [False, True]


def test_choices_equal_those_of_scoring_everything_alone(learnt, alone, expected):
  asker, _, _, got = learnt
  assert got.dtype == int and got.tolist() == expected
  assert len(set(expected)) > 2
  assert {(caption, q.stem, option) for caption, q in ASKS for option in q.options} <= asker.known.keys()
  for key, score in asker.known.items():
    assert score == pytest.approx(alone(*key), abs=2e-5), key


def test_each_distinct_option_is_asked_once(learnt):
  asker, asked, shapes, got = learnt
  assert set(asked) == {(caption, q.stem, option) for caption in (*CAPTIONS, PMI_TEMPLATE.baseline) for q in QUESTIONS
                        for option in q.options}
  assert set(asked.values()) == {1}
  calls = len(shapes)
  assert asker.choices(ASKS[::-1]).tolist() == got.tolist()[::-1] and len(shapes) == calls


def test_options_of_one_token_are_asked_apart(learnt, judge):
  *_, shapes, _ = learnt
  assert {O for *_, O in shapes} == {1, max(len(judge.tokenizer.encode_plain(" " + o)) for q in QUESTIONS for o in q.options)}
  asker = new_asker(judge)
  _, shapes = watch(asker)
  asker.choices([(CAPTIONS[1], COLOR)])
  assert [O for *_, O in shapes] == [1, 1]  # the baseline's, the caption's


@pytest.mark.parametrize("sizes", [dict(questions_per_row=1, rows_per_call=1), dict(questions_per_row=3, rows_per_call=2)])
def test_sizes_do_not_change_what_is_learnt(judge, learnt, sizes):
  asker = new_asker(judge, seed=1, **sizes)
  _, shapes = watch(asker)
  assert asker.choices(ASKS).tolist() == learnt[-1].tolist()
  assert {(B, K) for B, K, *_ in shapes} == {(sizes["rows_per_call"], sizes["questions_per_row"])}
  assert asker.known.keys() == learnt[0].known.keys()
  for key, score in learnt[0].known.items():
    assert asker.known[key] == pytest.approx(score, abs=2e-5), key


def test_priors(judge, alone):
  asker = new_asker(judge)
  asked, shapes = watch(asker)
  asker.priors(iter([*QUESTIONS, COLOR]))
  for q in QUESTIONS:
    np.testing.assert_allclose(asker.prior_of(q), [alone("An image.", q.stem, o) for o in q.options], atol=2e-5)
  assert {caption for caption, *_ in asked} == {"An image."} == {asker.baseline} and set(asked.values()) == {1}
  calls = len(shapes)
  assert asker.choices([("An image.", q) for q in QUESTIONS]).tolist() == [-1] * 4  # it says nothing: all scores are 0
  assert len(shapes) == calls


def test_correct_and_the_margin(judge, learnt):
  asker, *_, chosen = learnt
  gold = np.array([q.gold for _, q in ASKS])
  assert asker.correct(ASKS).tolist() == (chosen == gold).tolist()
  unsure = new_asker(judge, JudgeConfig(margin=100.0))
  unsure.known = dict(asker.known)
  assert unsure.choices(ASKS).tolist() == [-1] * len(ASKS) and not unsure.correct(ASKS).any()
  assert len(asker.choices([])) == 0


@pytest.mark.parametrize("reading", LETTERS)
def test_letter_readings_choose_what_a_prompt_on_its_own_chooses(judge, forward, monkeypatch, reading):
  # In the dataset's order: the permutations are drawn anew for each place in a batch.
  monkeypatch.setattr(judging, "draw_orders", lambda key, present: jnp.argsort(~present, axis=-1, stable=True))
  encode, template = judge.tokenizer.encode_plain, LETTER_TEMPLATE
  letters = [encode(f" {letter}")[0] for letter in "ABCDEFGH"]
  expected = []
  for caption, q in ASKS:
    ids = [*encode(template.head), *encode(caption), *encode(template.stem.format(question=q.stem))]
    for letter, option in zip("ABCDEFGH", q.options):
      ids += [*encode(f"- {letter})"), *encode(f" {option}"), *encode("\n")]
    logp = forward([*ids, *encode(template.tail)])[-1][letters[:len(q.options)]]
    second, best = np.sort(logp)[-2:]
    assert best - second > PMI.margin + CLEAR
    expected.append(int(np.argmax(logp)))
  # So cold that a sample is the best option.
  cfg = JudgeConfig(reading=reading, temperature=1e-5 if reading == "letter_sample" else 0.6)
  for sizes in (dict(), dict(questions_per_row=3, rows_per_call=2)):
    asker = new_asker(judge, cfg, **sizes)
    assert asker.choices(ASKS).tolist() == expected
  assert len(set(expected)) > 1


def test_letter_readings_ask_once_and_have_no_prior(judge):
  asker = new_asker(judge, JudgeConfig(reading="letter_argmax"))
  asked, shapes = watch(asker)
  asker.priors(QUESTIONS)
  assert not shapes and asker.prior_of(MANY) == [0.0] * 8
  renamed = Question(COLOR.stem, COLOR.options, 2, "shape")  # the judge sees neither gold nor kind
  got = asker.choices([*ASKS, (CAPTIONS[1], renamed), *ASKS])
  assert got[:len(ASKS)].tolist() == got[-len(ASKS):].tolist() and got[len(ASKS)] == got[ASKS.index((CAPTIONS[1], COLOR))]
  # "red" and "blue" are options of two questions with one stem, which differ: both are asked.
  assert asked[CAPTIONS[1], COLOR.stem, "red"] == 2 and asked[CAPTIONS[1], COLOR.stem, "green"] == 1
  calls = len(shapes)
  asker.choices(ASKS)
  assert len(shapes) == calls
  assert all(-1 <= choice < len(q.options) for choice, (_, q) in zip(got, ASKS))
  again = new_asker(judge, JudgeConfig(reading="letter_argmax"))
  assert again.choices([*ASKS, (CAPTIONS[1], renamed), *ASKS]).tolist() == got.tolist()


@pytest.mark.parametrize("reading", ["option_pmi", "letter_argmax"])
def test_a_judge_that_is_not_finite_names_the_question_and_the_caption(judge, reading):
  only = "what shape is teal?"
  broken = Question(only, ("circle", "rectangle"), 0, "shape")
  [token] = judge.tokenizer.encode_plain(" teal")
  params = dict(judge.params)
  [name] = [k for k in params if "embed" in k]
  params[name] = jax.tree.map(lambda x: x.at[token].set(jnp.nan), params[name])
  import dataclasses
  asker = new_asker(dataclasses.replace(judge, params=params), JudgeConfig(reading=reading))
  # The caption that says nothing is asked first by option_pmi.
  caption = "An image." if reading == "option_pmi" else CAPTIONS[1]
  with pytest.raises(ValueError, match=rf"not finite for the question {only!r} on the\s+caption '{caption}'; "
                                       r"check judge\.source and its dtype".replace("?", r"\?", 1)):
    asker.choices([(CAPTIONS[1], COLOR), (CAPTIONS[1], broken)])
  assert len(asker.choices([(CAPTIONS[1], COLOR), (CAPTIONS[1], SHAPE)])) == 2  # the others are well
