"""Questions read from a model's text: layouts in use, what is not guessed, nothing is lost."""

import itertools
import re
import time

import numpy as np
import pytest

from caprl_jax.data.rows import Question
from caprl_jax.modes.curate.generated import (
  Failure,
  drop_similar_questions,
  format_questions,
  parse_generated,
  question_key,
)
from caprl_jax.modes.curate.prompts import GENERATION_SYSTEM

COLORS = Question("What colour is the dog?", ("Brown", "White", "Black", "Gray"), 3)
SHAPES = Question("Which shape is largest?", ("The circle", "A square", "x**2", "3. of May"), 0)
CHINESE = Question("图中有几只狗？", ("一只", "两只", "三只"), 1)
WORDS = (
  "how many dogs (and 2 cats) are left of A. Smith's red, 3.5 m long car: 10 or 12? "
  "红色 的 车 é — * x"
).split()


def only(text: str) -> Question:
  questions, failures = parse_generated(text)
  assert failures == [] and len(questions) == 1, (questions, failures)
  return questions[0]


def failure(text: str) -> Failure:
  questions, failures = parse_generated(text)
  assert questions == [] and len(failures) == 1, (questions, failures)
  return failures[0]


def write(question: Question, number: int, header: str, option: str, answer: str) -> str:
  options = "\n".join(option.format(l, text) for l, text in zip("ABCDEFGHIJ", question.options))
  gold = "ABCDEFGHIJ"[question.gold]
  return (
    header.format(n=number, q=question.stem)
    + "\n"
    + options
    + "\n"
    + answer.format(l=gold, t=question.options[question.gold])
  )


HEADERS = [
  "#### {n}. **{q}**",
  "### {n}. {q}",
  "{n}. {q}",
  "{n}) **{q}**",
  "**{n}. {q}**",
  "**{n}.** {q}",
  "Q{n}: {q}",
  "Q{n}. {q}",
  "Question {n}: {q}",
  "**Question {n}:** {q}",
  "**Question {n}**\n{q}",
  "### Question {n}\n\n{q}",
  "#### {n}. **Question**\n{q}",
  "#### {n}. **Question:** {q}",
  "#### {n}\n**{q}**",
  "- **Question {n}** - {q}",
  "## **{n}. {q}**",
  "### Question {n}\n**Question:** {q}",
  "#### {n}. **Question**\n#### {q}",
  "问题{n}：{q}",
  "第{n}题\n{q}",
  "{n}、{q}",
  "#### **{q}**",
  "Question: {q}",
  "Here is the first:\n\n{q}",
]
OPTIONS = [
  "   - {0}) {1}",
  "{0}) {1}",
  "{0}. {1}",
  "({0}) {1}",
  "- {0}) {1}",
  "**{0})** {1}",
  "- **{0}.** {1}",
  "**{0})**{1}",
  "* **{0}) {1}**",
  "{0}: {1}",
  "{0}、{1}",
  "（{0}）{1}",
  "\t{0})  {1}  ",
]
ANSWERS = [
  "**Answer:** {l}) {t}",
  "Answer: {l}",
  "**Answer: ({l})**",
  "Correct answer: {l}",
  "Answer: {t}",
  "Answer: **{l}. {t}**",
  "The correct answer is {l}.",
  "**Correct Answer:** ({l}) {t}",
  "**Answer:**\n{l}) {t}",
  "\nanswer: {l}",
  "答案：{l}",
  "正确答案是 {l}) {t}",
  "### Answer: {l}",
  "Answer: {l} - {t}",
  "Answer: Option {l}",
  "Answer: {l} ({t})",
  "Answer: {l}) {t}, because one sees it.",
  "Ans: {l}",
  "The correct option is {l}",
  "- **Answer**: `{l}`",
  "**Answer:**{l}",
]


@pytest.mark.parametrize("header", HEADERS)
def test_headers_in_use(header):
  for question in (COLORS, SHAPES, CHINESE):
    assert only(write(question, 1, header, "{0}) {1}", "Answer: {l}")) == question


@pytest.mark.parametrize("option", OPTIONS)
def test_option_labels_in_use(option):
  for question in (COLORS, CHINESE):
    assert only(write(question, 1, "1. {q}", option, "Answer: {l}")) == question


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_in_use(answer):
  for question in (COLORS, CHINESE):
    assert only(write(question, 1, "#### {n}. **{q}**", "{0}) {1}", answer)) == question


def test_styles_in_every_combination_with_any_separator():
  separators = ["\n", "\n\n", "\n-\n", "\n------\n", "\n————\n\n", "\n***\n"]
  draw = np.random.default_rng(0)
  numbered = [header for header in HEADERS if "{n}" in header]
  for header, option, answer in itertools.product(numbered, OPTIONS, ANSWERS):
    separator = separators[draw.integers(len(separators))]
    text = separator.join(
      write(q, n, header, option, answer) for n, q in enumerate((COLORS, SHAPES, CHINESE), 1)
    )
    newline = ("\n", "\r\n")[draw.integers(2)]
    assert parse_generated(text.replace("\n", newline)) == ([COLORS, SHAPES, CHINESE], []), text


def test_the_examples_of_the_prompt_are_read():
  questions, failures = parse_generated(GENERATION_SYSTEM)
  assert [q.gold for q in questions] == [2, 1] and not failures
  assert format_questions(questions) in GENERATION_SYSTEM


def test_chatter_is_ignored():
  first, second = format_questions([COLORS]), format_questions([SHAPES])
  text = (
    "Sure! Here are the questions:\n\n## Questions\n" + first + "\nExplanation: it is "
    "gray.\n1. I saw it.\n2. I am sure.\n" + second + "\nI hope\n this helps!"
  )
  assert parse_generated(text) == ([COLORS, SHAPES], [])
  assert parse_generated("<think>\n1. What?\nA) x\n</think>\n" + text) == ([COLORS, SHAPES], [])
  assert "inside its reasoning" in failure("<think>\n" + text).reason


def test_questions_without_headers():
  text = "Here they are:\n\n" + "\n\n".join(
    write(q, 0, "{q}\n", "{0}) {1}", "\nAnswer: {l}") for q in (COLORS, CHINESE)
  )
  assert parse_generated(text) == ([COLORS, CHINESE], [])
  lacking = "What?\nA) x\nB) y\n\n" + write(CHINESE, 0, "{q}", "{0}) {1}", "Answer: {l}")
  assert (
    parse_generated(lacking)[0] == [CHINESE]
    and "no answer" in parse_generated(lacking)[1][0].reason
  )
  # Beside numbered ones it may have lost the line it began with.
  questions, failures = parse_generated(format_questions([COLORS]) + "\nAnd then\n" + text)
  assert questions == [COLORS] and len(failures) == 2 and "no number" in failures[0].reason


def test_stems_of_several_lines():
  assert only("1. Is x**2 less than y** ?\nA) x\nB) y\nAnswer: A").stem == "Is x**2 less than y** ?"
  stem = "Look at the steps:\n1. cut\n2. glue\nQ: Which is first?\nB. is not shown."
  assert only(f"#### 1. **{stem}**\n- A) cut\n- B) glue\nAnswer: A") == Question(
    stem, ("cut", "glue"), 0
  )
  # With bare numbers nobody can tell the second step from the second question.
  questions, failures = parse_generated(f"1. {stem}\n- A) cut\n- B) glue\nAnswer: A")
  assert questions == [] and [f.reason.split(":")[0] for f in failures] == [
    "there are no options and no answer",
    "the question before it has no options",
  ]


@pytest.mark.parametrize(
  "options, want",
  [
    ("A) red  B) blue C) light green D) gray", ("red", "blue", "light green", "gray")),
    ("A) red  B) blue\nC) green  D) gray", ("red", "blue", "green", "gray")),
    ("(A) red, (B) blue, (C) green", ("red", "blue", "green")),
    ("A. red B. blue C. green D. gray", ("red", "blue", "green", "gray")),
    ("A) red\nB) blue\nC) see A) there", ("red", "blue", "see A) there")),
    ("A) blood\nB) vitamin C) pill\nC) x", ("blood", "vitamin C) pill", "x")),
    ("A) a long\n      second line\nB) blue", ("a long second line", "blue")),
    ("A) red\n\nB) blue", ("red", "blue")),
    ("A) **kwargs\nB) *args\nC) __init__\nD) 2**", ("**kwargs", "*args", "__init__", "2**")),
    ("A) red\nB) blue\nExplanation: it is blue.", ("red", "blue")),
    ("A) red\nB) blue\nC) Can not answer based on the image", ("red", "blue")),
    ("A) red\nB) blue\nF) Cannot answer", ("red", "blue")),
    ("Options:\na) red\nb) blue", ("red", "blue")),
  ],
)
def test_options_that_leave_no_doubt(options, want):
  assert only(f"#### 1. **What?**\n{options}\nAnswer: B") == Question("What?", want, 1)
  if "\n" not in options and ")" in options:
    assert only(f"1. What? {options}\nAnswer: B") == Question("What?", want, 1)


@pytest.mark.parametrize(
  "options, reason",
  [
    ("", "there are no options"),
    ("- red\n- blue", "there are no options"),
    ("A) red", "none of its options A"),
    ("A) red\nC) blue\nD) green", "lettered A, C, D"),
    ("A) red\nA) blue\nB) green", "lettered A, A, B"),
    ("B) red\nC) blue", "there are no options"),
    ("A) red\nB) blue\nC) green D) gray", "several options may stand on one line"),
    ("A) red\nB) Red", "differ at most in case"),
    ("A) red\nB) blue\nC) \nD) green", "lettered A, B, D|text between"),
    ("A) red\nor perhaps\nB) blue", "text between its options or before its answer: 'or perhaps'"),
    ("A) red\n\nor perhaps\n\nB) blue", "text between its options: 'or perhaps'"),
    ("A) red\nB) Can not answer", "none of its options|1 option"),
  ],
)
def test_options_that_cannot_be_trusted(options, reason):
  found = failure(f"#### 1. **What?**\n{options}\nAnswer: B\n")
  assert re.search(reason, found.reason), found.reason
  assert found.text.startswith("#### 1. **What?**") and "Answer: B" in found.text


@pytest.mark.parametrize(
  "answer, reason",
  [
    ("", "there is no answer"),
    ("Answer:", "there is no answer"),
    ("Answer: E", "none of its options A, B, C, D"),
    ("Answer: purple", "neither a letter nor the text of one option"),
    ("Answer: A, B", "neither a letter nor"),
    ("Answer: A) and B)", "another text"),
    ("Answer: A dog", "neither a letter nor"),
    ("Answer: D) White", "has the letter of 'red and blue' and another text"),
    ("Answer: D) red", "has the letter of 'red and blue'"),
    ("Answer: A) red and blue", "has the letter of 'red' and another text"),
    ("Answer: A) purple", "another text"),
    ("Answer: A) redwood", "another text"),
    ("Answer: A\nCorrect answer: B", "there are 2 answers: A, B"),
  ],
)
def test_answers_that_cannot_be_trusted(answer, reason):
  found = failure("1. What?\nA) red\nB) white\nC) gray\nD) red and blue\n" + answer)
  assert reason in found.reason, found.reason


def test_answers_whose_text_is_longer_or_cut():
  text = "1. What?\nA) red\nB) red wine\nC) white\nAnswer: "
  golds = {
    "B) red wine, I think": 1,
    "A) red, I think": 0,
    "C) whi": 2,
    "A) Red.": 0,
    "A\nAnswer: A) red": 0,
    "RED WINE": 1,
  }
  assert {answer: only(text + answer).gold for answer in golds} == golds
  assert "another text" in failure(text + "A) re").reason  # of red or of red wine


def test_a_letter_that_is_an_options_text():
  text = "1. Which letter is on the sign?\nA) B\nB) A\nC) D\nAnswer: "
  assert "by its letter and" in failure(text + "A").reason
  assert only(text + "A) B").gold == 0 and only(text + "C").gold == 2


@pytest.mark.parametrize(
  "text", ["I cannot see an image.", "", " \n", "Here they are:\n------\n## Questions"]
)
def test_no_question_at_all_is_one_failure_with_the_text(text):
  found = failure(text)
  assert found.text == text
  assert found.reason == (
    "there is no question in the reply" if text.strip() else "the reply is empty"
  )


def test_pieces_of_questions():
  assert "without a question" in failure("Answer: B").reason
  assert "1 option" in failure("1. What?\nA) red\nAnswer: A").reason
  assert "no text" in failure("#### 1.\nA) red\nB) blue\nAnswer: A").reason


def test_repeated_and_contradicting_questions():
  again = Question("what colour, is the DOG", ("Red", "gray.", "Blue"), 1)
  other = Question(COLORS.stem, COLORS.options, 0)
  different = Question(COLORS.stem, ("red", "as the cat"), 1)
  text = "".join(format_questions([q]) for q in (COLORS, again, other, different))
  questions, failures = parse_generated(text)
  assert questions == [COLORS, different]
  assert [f.reason.split(" of those")[0] for f in failures] == [
    "it repeats question 1",
    "it contradicts question 1",
  ]
  assert again.stem in failures[0].text


def make_questions(draw: np.random.Generator, count: int) -> list[Question]:
  made = []
  while len(made) < count:
    words = lambda low, high: " ".join(draw.choice(WORDS, draw.integers(low, high)))
    stem = f"Word{len(made)} {words(2, 12)}?"
    options = tuple(f"{words(1, 4)} {i}" for i in range(draw.integers(2, 6)))
    question = Question(stem, options, int(draw.integers(len(options))))
    try:
      format_questions([question])
    except ValueError:
      continue
    made.append(question)
  return made


def test_the_layout_comes_back_the_same():
  draw = np.random.default_rng(1)
  for _ in range(100):
    questions = make_questions(draw, 5)
    assert parse_generated("Chatter.\n" + format_questions(questions)) == (questions, [])
  several = Question("Two\nlines of 中文?", ("x", "y"), 1)
  assert parse_generated(format_questions([several])) == ([several], [])


@pytest.mark.parametrize(
  "question",
  [
    Question("What?\n1. A) x", ("x",), 0),
    Question("What?\nAnswer: A", ("x", "y"), 0),
    Question("", ("x", "y"), 0),
    Question("What?", ("x", "Can not answer"), 0),
    Question("What?", ("x", "y\n- C) z"), 0),
    Question(" What?", ("x", "y"), 0),
    Question("What?\n\nThis?", ("x", "y"), 0),
    Question("What?", tuple("abcdefghijk"), 0),
    Question("What?", ("x", "y"), 2),
  ],
)
def test_what_the_layout_cannot_say_is_not_written(question):
  with pytest.raises((ValueError, IndexError)):
    format_questions([question])


def test_a_text_cut_anywhere_loses_and_invents_nothing():
  draw = np.random.default_rng(2)
  for _ in range(4):
    made = make_questions(draw, 5)
    text = format_questions(made)
    for end in range(1, len(text)):
      questions, failures = parse_generated(text[:end])
      begun = sum(f"#### {n}" in text[:end] for n in range(1, 6))
      assert len(questions) + len(failures) == max(begun, 1), text[:end]
      assert questions == made[: len(questions)] and len(failures) <= 1 + (begun == 0), text[:end]


def test_a_lost_line_never_changes_a_question():
  draw = np.random.default_rng(3)
  for _ in range(20):
    made = make_questions(draw, 3)
    lines = format_questions(made).splitlines()
    for i in range(len(lines)):
      questions, failures = parse_generated("\n".join(lines[:i] + lines[i + 1 :]))
      assert len(questions) + len(failures) == 3 or lines[i].startswith("####"), lines[i]
      for question in questions:
        like = [q for q in made if q.stem == question.stem]
        assert like and question.options in (like[0].options, like[0].options[:-1]), lines[i]
        assert question.options[question.gold] == like[0].options[like[0].gold]


def test_nothing_that_a_model_may_say_stops_the_reader():
  draw = np.random.default_rng(4)
  lines = ["", "---", "**", "#", "A)", "1.", "(", "```"]
  for header, option, answer in zip(HEADERS, itertools.cycle(OPTIONS), itertools.cycle(ANSWERS)):
    lines += write(SHAPES, 7, header, option, answer).splitlines()
  for _ in range(3000):
    text = "\n".join(draw.choice(lines, draw.integers(0, 25)))
    questions, failures = parse_generated(text)
    assert questions or failures
    assert all(failure.reason for failure in failures)
  began = time.perf_counter()
  for text in (
    "**" * 8000,
    "A) " * 4000,
    "1. " * 4000,
    "**a" * 4000,
    "#" * 8000,
    " " * 8000 + "x",
    "Answer: " * 2000,
  ):
    parse_generated("1. What?\nA) x\n" + text)
  assert time.perf_counter() - began < 5


def test_keys_and_similar_questions():
  ask = lambda stem: Question(stem, ("x", "y"), 0)
  assert question_key(ask("What colour IS the dog's ｔａｉｌ?")) == {
    "what",
    "colour",
    "is",
    "the",
    "dog",
    "s",
    "tail",
  }
  assert question_key(ask("图中有狗？")) == set("图中有狗") and question_key(ask(" ??")) == {"??"}
  first, near, far = map(
    ask, ("What colour is the dog?", "what is the colour of the dog", "How many cats are there?")
  )
  assert drop_similar_questions([first, near, far, first], 0.8) == ([first, far], [near, first])
  assert drop_similar_questions([first, near, far], 0.9) == ([first, near, far], [])
  assert drop_similar_questions([first, near], 5 / 6)[0] == [first]  # 5 words of 6
  years = [
    ask(f"What were the sales of bicycles in the north in the year {year}?")
    for year in (2019, 2020)
  ]
  assert drop_similar_questions(years, 0.5) == (years, [])
  for threshold in (0, 1.5):
    with pytest.raises(ValueError, match="share of common words"):
      drop_similar_questions([], threshold)
