"""Whatever a model writes is read and scored, in time linear in its length; what only sets an
answer does not change its score.
"""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from caprl_jax.scoring.answers import METRICS, score
from caprl_jax.scoring.extraction import extract_answer, refuses

ANIMALS = ("cat", "dog", "fox", "hen")
PIECES = (
  "A B C D I a b answer is the not if or and option ( ) [ ] { } ** \\boxed{ \\text{ } $ <answer> "
  "</answer> <think> </think> . , : ; ? ! \n - 答案 选 是 不 12 1,200 % million / ^ \\frac{1}{2} "
  "cat dog correct wrong it would be because could \" ' ` # 2010 [2010, 2012] ½ − \ud800 "
  "\x00 🅱️"
).split(" ")
texts = st.one_of(
  st.text(max_size=80),
  st.lists(st.sampled_from(PIECES), max_size=30).map(" ".join),
  st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
)


@settings(max_examples=200, deadline=None)
@given(texts, texts.filter(str.strip), st.sampled_from(sorted(METRICS)), st.booleans())
@example("1/0", "0", "ChartQA", False)
@example("[" * 50, "[]", "ChartQAPro", False)
def test_any_text_has_a_score(output, gold, benchmark, listed):
  options = ANIMALS if listed else ()
  read = extract_answer(output, len(options) or None, "ours")
  assert 0 <= score(read, gold, benchmark, options).value <= 1
  assert 0 <= score(output, gold, benchmark, options).value <= 1
  if read is not None:
    refuses(read)


LONG = [
  "((((",
  "A A A ",
  "B, ",
  "A)\n",
  "A. cat\n",
  "\\boxed{",
  "\\boxed{A}",
  "\\text{",
  "\\frac{",
  "$",
  "*",
  "~~",
  '"',
  "1,",
  "1,111",
  "1.1",
  "9 ",
  "½",
  "->",
  ".",
  "the answer is ",
  "answer to ",
  "Answer: ",
  "The answer is A. ",
  "is correct ",
  "A is correct ",
  "not ",
  "if ",
  "can't ",
  "because ",
  "答案是",
  "选",
  "<answer>",
  "<think>",
  '{"answer": ',
  '{"a":',
  "one hundred ",
  "it is ",
  "1e9",
  "ﷺ",  # 18 letters in compatibility form
  "Dr. ",
  "\x00",
]
AROUND = [("", ""), ("The answer is ", " B."), ("", "\nB"), ("\\boxed{", "}"), ("Answer: ", "")]


@pytest.mark.parametrize("number", range(len(LONG)))
def test_long_texts_take_linear_time(number):
  piece, (before, after) = LONG[number], AROUND[number % len(AROUND)]
  output = before + piece * (100_000 // len(piece)) + after
  start = time.process_time()
  for options in ((), ANIMALS):
    read = extract_answer(output, len(options) or None, "ours")
    for benchmark in ("MMStar", "ChartQAPro", "InfoVQA", "WeMath")[number % 2 :: 2]:
      gold = "B" if options else "[2010, 12]"
      assert 0 <= score(read, gold, benchmark, options).value <= 1
    refuses(read or "")
  assert time.process_time() - start < 20


ANSWERS = st.one_of(
  st.sampled_from(
    [*"ABCD", "cat", "dog", "12", "45%", "1,200", "-3.5", "2010", "Yes", "red and blue"]
  ),
  st.integers(-(10**9), 10**9).map(str),
  st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: f"{value:.3f}"),
)
SETTINGS = [
  "  {}  ",
  "\n{}\n",
  "{}.",
  "**{}**",
  "`{}`",
  '"{}"',
  "“{}”",
  "'{}'",
  "${}$",
  "\\boxed{{{}}}",
  "**{}.**",
  "<answer>{}</answer>",
  "<think>hm</think>\n\n{}",
  "The answer is {}.",
  "**Answer:** {}",
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(ANSWERS, ANSWERS, st.sampled_from(sorted(METRICS)))
def test_what_sets_an_answer_does_not_change_its_score(answer, gold, benchmark):
  letter = gold in ANIMALS or gold in tuple("ABCD")
  options = ANIMALS if letter else ()

  def scored(output: str) -> float:
    return score(
      extract_answer(output, len(options) or None, "ours"), gold, benchmark, options
    ).value

  plain = scored(answer)
  assert {setting: scored(setting.format(answer)) for setting in SETTINGS} == dict.fromkeys(
    SETTINGS, plain
  )
