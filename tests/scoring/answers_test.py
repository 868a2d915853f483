"""Reading answers, metrics ours and official."""

import sys
import threading
import time

import pytest

from caprl_jax.data.readers.benchmarks.row import BENCHMARKS, CAPTIONQA, QUESTIONS
from caprl_jax.scoring import answers as scoring
from caprl_jax.scoring import official as official_scoring
from caprl_jax.scoring.answers import score
from caprl_jax.scoring.choices import multiple_choice
from caprl_jax.scoring.extraction import extract_answer, refuses
from caprl_jax.scoring.mathematics import maths
from caprl_jax.scoring.metrics import anls, exact, relaxed_accuracy
from caprl_jax.scoring.official import official_score

THOUGHT = "<think>First B, then \\boxed{7}. The answer is C.</think>\n"
COLOURS = ("red", "blue", "light green", "A red dog")


# Reading an answer.


@pytest.mark.parametrize(
  "output, answer",
  [
    (THOUGHT + "<answer>so \\boxed{12}.</answer>", "12"),
    (THOUGHT + "<answer>\\boxed{\\frac{1}{2^{x}}}</answer>", "\\frac{1}{2^{x}}"),
    ("no opening tag</think><answer>\n\\boxed{B}\n</answer>", "B"),
    (THOUGHT + "<answer>\\boxed{}</answer>", ""),
  ],
)
def test_the_official_form(output, answer):
  assert extract_answer(output, None, "official") == answer
  assert extract_answer(output, None, "ours") == (answer or "\\boxed{}")


@pytest.mark.parametrize(
  "output, ours",
  [
    (THOUGHT + "<answer>12</answer>", "12"),  # no box
    (THOUGHT + "\\boxed{12}", "12"),  # no answer tag
    (THOUGHT + "So: <answer>\\boxed{12}</answer>", "12"),  # words between the tags
    ("<answer>\\boxed{12}</answer>", "12"),  # no thought
    (THOUGHT + "<answer>\\boxed{12}", "12"),  # no end tag
    (THOUGHT + "<answer></answer> \\boxed{12}", "12"),  # the box is not in the answer
    (THOUGHT + "<answer>12}</answer> \\boxed{3", "12}"),
  ],
)
def test_what_is_not_the_official_form_is_no_official_answer(output, ours):
  assert extract_answer(output, None, "official") is None
  assert extract_answer(output, None, "ours") == ours


def test_official_takes_all_between_the_first_box_and_the_last_brace():
  output = THOUGHT + "<answer>\\boxed{1} or {x} or \\boxed{2}.</answer><answer>3}</answer>"
  assert extract_answer(output, None, "official") == "1} or {x} or \\boxed{2}.</answer><answer>3"
  assert extract_answer(THOUGHT + "<answer>\\boxed{1} or \\boxed{2}</answer>", None, "ours") == "2"
  assert extract_answer(output, None, "ours") == "3}"


def test_a_looping_output_is_read_at_once():
  output = THOUGHT + "<answer>" + "\\boxed{}" * 5000
  start = time.monotonic()
  assert extract_answer(output, None, "official") is None
  assert extract_answer(output, 4, "ours") is not None
  assert extract_answer("\\boxed{" * 3000, None, "ours") is not None
  assert time.monotonic() - start < 5


@pytest.mark.parametrize(
  "output, answer",
  [
    ("<think>It is B. \\boxed{B}", None),  # cut off
    (THOUGHT + "<think>again", None),
    (THOUGHT, None),
    ("", None),
    ("...", None),
    ("<think>x</think><answer>B) blue</answer>", "B"),
    ("<answer>A</answer> No: <answer>\\boxed{\\text{C}}</answer>", "C"),
    ("\\boxed{A}, no, \\boxed{B}", "B"),
    ("\\boxed{A} is wrong. Answer: B", "B"),
    ("The answer is B.", "B"),
    ("The answer is (B) blue.", "B"),
    ("The answer is A. On second thoughts, the answer is **B**.", "B"),
    ("Final Answer: B", "B"),
    ("**Answer:** B) blue", "B"),
    ("Answer: b", "B"),
    ("Answer:\nB", "B"),
    ("The correct answer is: B, because it is blue", "B"),
    ("The answer is A red dog.", "A red dog"),
    ("The answer is E.", "E"),  # not an option: wrong, but not guessed at
    ("The answer is A, B", "A, B"),
    ("The answer is B, a blue one", "B"),
    ("The answer is B, I think", "B"),
    ("So the answer would be C.", "C"),
    ("The correct option is: C", "C"),
    ("答案是B", "B"),
    ("B", "B"),
    ("(b)", "B"),
    ("B) blue", "B"),
    ("B. It is blue.\nOne can see that", "B"),
    ("The sky is blue.\nSo: it must be that\nB", "B"),
    ("A blue sky\nblue", "blue"),
    (
      "A) red: not mentioned.\nB) blue: yes.\nC) green: no.\nSo it is blue.",
      "B",  # goes through them
    ),
    ("B) blue\nA) red is not mentioned.\nThat is all.", "B"),
    ("B) blue: that is it.\nB) is what is said.\nI am sure.", "B"),
    ("As seen, red", "As seen, red"),
  ],
)
def test_ours_with_options(output, answer):
  assert extract_answer(output, 4, "ours") == answer


@pytest.mark.parametrize(
  "output, answer",
  [
    ("The answer is 42.", "42"),
    ("The answer is 4.2.", "4.2"),
    ("The answer is 4.25 because of the bar. It is high.", "4.25"),
    ("Answer: 42. The bar says so.", "42"),
    ("The answer is Dr. No.", "Dr. No"),
    ("The answer is Yes. The chart shows an increase.", "Yes"),
    ("The answer is No. The chart shows none.", "No"),
    ("The answer is red. It says so.", "red"),
    ("Answer: 12 km. The scale has it.", "12 km"),
    ("Answer: 12 ms. The axis has it.", "12 ms"),
    ("Answer: 5 m. The axis has it.", "5 m"),
    ("Answer: 50%. That is half.", "50%"),
    ("Answer: **Yes**. It rises.", "Yes"),
    ("The answer is St. Louis. The map has it.", "St. Louis"),
    ("The answer is red vs. blue. The two differ.", "red vs. blue"),
    ("The answer is Fig. 3. It shows a dog.", "Fig. 3"),
    ("The answer is No. 5 of them. It is the last.", "No. 5 of them"),
    ("The answer is Jan. 2015. It is the peak.", "Jan. 2015"),
    ("The answer is J. R. Smith. He painted it.", "J. R. Smith"),
    ("The answer is U.S. dollars. It says so.", "U.S. dollars"),
    ("The answer is Acme Inc. and Ajax. Both rose.", "Acme Inc. and Ajax"),
    ("The answer is Hm... So be it.", "Hm... So be it"),
    ("The answer is U.S.", "U.S."),
    ("Answer: **$1,200**", "$1,200"),
    ("The final answer is B) blue", "B) blue"),  # no options: nothing is a letter
    ("One can see this.\n\n42\n\n", "42"),
    ("United States", "United States"),
    ("The answering model is 3", "The answering model is 3"),
  ],
)
def test_ours_without_options(output, answer):
  assert extract_answer(output, None, "ours") == answer


@pytest.mark.parametrize(
  "options, protocol, message",
  [
    (4, "theirs", "protocol = 'theirs'; use 'ours' or 'official'"),
    (1, "ours", "options = 1"),
    (27, "ours", "options = 27"),
  ],
)
def test_what_cannot_be_asked_for(options, protocol, message):
  with pytest.raises(ValueError, match=message):
    extract_answer("B", options, protocol)


# Metrics, ours.


@pytest.mark.parametrize(
  "prediction, right",
  [
    ("B", 1),
    ("b", 1),
    ("(B)", 1),
    ("**B**", 1),
    ("$\\text{B}$", 1),
    ("B) blue", 1),
    ("B. because", 1),
    ("Blue.", 1),
    ("the blue", 1),
    ("A", 0),
    ("red", 0),
    ("A) blue", 0),
    ("red or blue", 0),
    ("Because", 0),
    ("", 0),
    ("E", 0),
    (None, 0),
  ],
)
def test_multiple_choice(prediction, right):
  assert multiple_choice(prediction, "B", COLOURS) == right


def test_multiple_choice_by_text_needs_exactly_one_option():
  # the text before the letter that it begins with
  assert multiple_choice("A red dog", "D", COLOURS) == 1
  assert multiple_choice("2", "A", ("2", "2.0", "3")) == 1
  assert multiple_choice("2.00", "A", ("2", "2.0", "3")) == 0
  assert multiple_choice("A. M.", "B", ("P. M.", "A. M.")) == 1
  assert multiple_choice("3", "C", ("2", "2.0", "3")) == 1
  assert multiple_choice("B", "A", ("B", "A")) == 0  # a letter is a letter
  assert multiple_choice("blue", "B") == 0 and multiple_choice("B", "B") == 1  # options unknown


@pytest.mark.parametrize(
  "gold, options", [("E", COLOURS), ("b", COLOURS), ("blue", COLOURS), ("", ())]
)
def test_a_gold_that_is_no_options_letter(gold, options):
  with pytest.raises(ValueError, match="must be the letter of one of the"):
    multiple_choice("B", gold, options)


@pytest.mark.parametrize(
  "prediction, gold, right",
  [
    ("105", "100", 1),
    ("95", "100", 1),
    ("105.01", "100", 0),
    ("94.99", "100", 0),
    ("1.05", "1", 1),
    ("-105", "-100", 1),
    ("-100", "100", 0),
    ("0", "0", 1),
    ("0.0", "0", 1),
    ("0.01", "0", 0),
    ("0", "0.01", 0),
    ("1,234.5", "1234.5", 1),
    ("$1,200", "1200", 1),
    ("1200 $", "1200", 1),
    ("€5", "$5", 1),
    ("-$5", "-5", 1),
    ("2 million", "2,000,000", 1),
    ("2 million", "2", 1),  # the axis counts in millions
    ("2 million", "3", 0),
    ("2 million", "2 thousand", 0),
    ("1.2e3", "1200", 1),
    ("12 cm", "12", 1),
    ("12", "12 cm", 1),
    ("12 cm", "12 km", 0),
    ("12 years", "12 year", 1),
    ("30°", "30", 1),
    ("30^\\circ", "30", 1),
    ("4 km²", "4 km²", 1),
    ("$\\frac{1}{2}$", "0.5", 1),
    ("\\frac12", "0.5", 1),
    ("2\\frac{1}{2}", "10.5", 0),
    ("1/2", "0.5", 1),
    ("1/0", "0.5", 0),
    ("50%", "50", 1),
    ("50", "50%", 1),
    ("50\\%", "50%", 1),
    ("50 percent", "50%", 1),
    ("50%", "0.5", 1),
    ("0.5", "50%", 1),
    ("1/2", "50%", 1),
    ("0.5%", "0.5", 1),
    ("50%", "5000", 0),
    ("5000%", "50", 0),
    ("1", "100%", 0),
    ("50", "0.5", 0),
    ("0.5", "50", 0),
    ("5000", "50", 0),
    ("Yes", "yes.", 1),
    ("United  States", "united states", 1),
    ("\\text{No}", "No", 1),
    ("**No**", "No", 1),
    ("No", "Yes", 0),
    ("2010–2012", "2010-2012", 1),
    ("2010-2012", "2010", 0),
    ("3 of 4", "3", 0),
    ("12:30", "12", 0),
    ("nan", "5", 0),
    ("", "5", 0),
    ("5", "", 0),
    (None, "5", 0),
    ("9" * 6000, "9", 0),
    ("1e999999", "1", 0),
  ],
)
def test_relaxed_accuracy(prediction, gold, right):
  assert relaxed_accuracy(prediction, gold) == right


def test_relaxed_accuracy_has_a_tolerance():
  assert relaxed_accuracy("110", "100", 0.1) == 1 and relaxed_accuracy("111", "100", 0.1) == 0
  assert relaxed_accuracy("100.0", "100", 0) == 1 and relaxed_accuracy("100.1", "100", 0) == 0


def test_anls():
  assert anls("Hello  World", ["hello world"]) == 1
  assert anls("kitten", "sitting") == pytest.approx(1 - 3 / 7)  # the textbook's distance, 3
  assert anls("abcd", "abxx") == 0.5 and anls("abcd", "axxx") == 0
  assert anls("abcd", "axxx", threshold=0.2) == 0.25
  assert anls("colour", ["blue", "color", "colours"]) == pytest.approx(1 - 1 / 7)
  assert anls("", "") == 1 and anls("", "x") == 0 and anls(None, "x") == 0 and anls("x", []) == 0
  assert anls("x" * 3000, "y") == 0


@pytest.mark.parametrize(
  "prediction, gold, right",
  [
    ("The Eiffel  tower.", "eiffel tower", 1),
    ("a", "A", 1),
    ("A", "an", 0),
    ("well-known", "well known", 1),
    ("it's", "its", 0),
    ("1,000", "1000.0", 1),
    ("-5", "5", 0),
    ("−5", "-5", 1),
    ("x = -5", "x = 5", 0),
    ("50%", "50", 0),
    ("Route 66.0", "route 66", 1),
    ("(1, 2)", "[1, 2]", 0),
    ("(the) cat", "cat", 1),
    ("?", "!", 0),
    ("x^2", "x2", 0),
    ("x²", "x^2", 1),
    ("½", "0.5", 1),
    ("3.5", "35", 0),
    ("cat", "cats", 0),
    ("", "cat", 0),
    (None, "cat", 0),
  ],
)
def test_exact(prediction, gold, right):
  assert exact(prediction, gold) == right


@pytest.mark.parametrize(
  "prediction, gold, right",
  [
    ("2\\sqrt{3}", "\\sqrt{12}", 1),
    ("\\frac{7}{2}", "3.5", 1),
    ("x=2", "2", 1),
    ("(1,2)", "[1,2]", 0),
    ("$12$", "12", 1),
    ("30^\\circ", "30", 1),
    ("y=x+1", "y = 1 + x", 1),
    ("-5", "5", 0),
    ("", "5", 0),
    ("words alone", "5", 0),
    ("12 meters", "12", 1),
    ("5 or 6", "5", 0),
    (None, "5", 0),
  ],
)
def test_maths_by_math_verify(prediction, gold, right):
  pytest.importorskip("math_verify")
  assert maths(prediction, gold) == (right, "math_verify")


@pytest.mark.parametrize("gold", ["two\nlines", "\\", "blue", "12 square units"])
def test_a_gold_that_is_no_mathematics_is_compared_exactly(gold):
  pytest.importorskip("math_verify")
  assert maths(gold, gold) == (1, "exact")
  for wrong in ("lube", "7", "", None):
    assert maths(wrong, gold) == (0, "exact")


@pytest.mark.parametrize(
  "prediction, gold, right",
  [
    ("\\frac{7}{2}", "3.5", 1),
    ("7/2", "$\\frac72$", 1),
    ("1,000", "1000", 1),
    ("Blue", "blue", 1),
    ("(1,2)", "[1,2]", 0),
    ("2\\sqrt{3}", "\\sqrt{12}", 0),
    ("12 cm", "12", 1),
    ("3.5001", "3.5", 0),
    (None, "5", 0),
  ],
)
def test_maths_without_math_verify(monkeypatch, prediction, gold, right):
  monkeypatch.setitem(sys.modules, "math_verify", None)
  assert maths(prediction, gold) == (right, "plain")


def in_a_thread(function):
  """The ValueError that the function raises in another thread, as a text."""
  found = []

  def catch():
    try:
      function()
    except ValueError as error:
      found.append(str(error))

  thread = threading.Thread(target=catch)
  thread.start()
  thread.join()
  return found[0]


def test_maths_says_that_it_needs_the_main_thread():
  pytest.importorskip("math_verify")
  assert "only the main thread may" in in_a_thread(lambda: maths("1", "1"))
  assert "only the main thread may" in in_a_thread(lambda: official_score("1", "1", "WeMath"))


# The benchmarks' metrics.


def test_every_benchmark_has_a_metric():
  assert set(scoring.METRICS) == {*BENCHMARKS.values(), CAPTIONQA, QUESTIONS}


@pytest.mark.parametrize(
  "prediction, gold, benchmark, options, want",
  [
    ("blue", "B", "MMStar", COLOURS, (1, "multiple_choice")),
    ("B", "B", "SEED", (), (1, "multiple_choice")),
    ("0.50", "0.5", "MMMU", (), (1, "open")),  # an open question
    ("0.51", "0.5", "MMMU", (), (0, "open")),
    ("E", "E", "questions", COLOURS, (1, "open")),  # a gold that is no option's
    ("41", "42", "ChartQA", (), (1, "relaxed")),
    ("41", ("7", "42"), "ChartQA", (), (1, "relaxed")),
    ("41", "42", "CharXiv", (), (0, "same")),  # numbers are the same or wrong
    ("42.0", ("7", "42"), "CharXiv", (), (1, "same")),
    ("kitten", ("x", "sitting"), "InfoVQA", (), (1 - 3 / 7, "anls")),
    ("41", "42", "InfoVQA", (), (0.5, "anls")),
    ("blue", "B", "MathVerse", COLOURS, (1, "multiple_choice")),
    # the letter of a gold that is a text
    ("C", "light green", "ChartQAPro", COLOURS, (1, "multiple_choice")),
    ("C", "light green", "MMMU", COLOURS, (1, "multiple_choice")),
    ("B", "light green", "MMMU", COLOURS, (0, "open")),
    ("light green", "light green", "MMMU", COLOURS, (1, "open")),
    (None, "light green", "ChartQAPro", COLOURS, (0, "chartqapro")),
    ("A", "2", "MMMU", ("2", "2", "3"), (0, "open")),  # of two options
    ("C", "purple", "MMMU", COLOURS, (0, "open")),
    ("A", "B", "ChartQAPro", ("B", "A"), (0, "multiple_choice")),  # a letter is a letter
    ("B", "B", "VisuLogic", (), (1, "multiple_choice")),
  ],
)
def test_scores_by_benchmark(prediction, gold, benchmark, options, want):
  found = score(prediction, gold, benchmark, options)
  assert (found.value, found.rule) == (pytest.approx(want[0]), want[1])


def test_scores_of_mathematics():
  pytest.importorskip("math_verify")
  assert score("\\sqrt{4}", "2", "MathVision") == (1, "math_verify")


@pytest.mark.parametrize(
  "gold, benchmark, message",
  [("x", "mmstar", "'mmstar' has no metric; known: MMStar"), ((), "MMStar", "no gold answer")],
)
def test_what_cannot_be_scored(gold, benchmark, message):
  with pytest.raises(ValueError, match=message):
    score("x", gold, benchmark)


# The released scorer's quirks, and that ours has none of them.


@pytest.mark.parametrize(
  "prediction, gold, benchmark, official, ours",
  [
    ("105.2", "100", "ChartQA", 1, 0),  # 5% of the prediction: 5.2 / 105.2
    ("95.1", "100", "ChartQA", 0, 1),  # 4.9 / 95.1
    ("0", "0", "ChartQA", 1, 1),  # by math-verify
    (
      "100\\%",
      "0.97",
      "ChartQA",
      0,
      1,
    ),  # LaTeX's sign makes it a text; the plain one divides by 100
    ("100%", "0.97", "ChartQA", 1, 1),
    ("100%", "97", "ChartQA", 0, 1),
    ("5000", "49", "ChartQA", 1, 0),  # x0.01
    ("0.25", "24.5", "ChartQAPro", 1, 0),  # x100
    ("0.5", "0.51", "ChartQAPro", 0, 1),  # math-verify makes it \frac{1}{2}, a text
    ("1,000", "990", "ChartQAPro", 0, 1),  # a separator makes it a text
    ("5", "", "MMStar", 1, None),  # a gold that cannot be parsed
    ("5", "two\nlines", "MMStar", 1, 0),
    (None, "two\nlines", "ChartQA", 1, 0),
    (None, "two", "ChartQA", 0, 0),
    ("lube", "blue", "MathVerse", 1, 0),  # a product of letters
    ("100", "104.9", "InfoVQA", 1, 0),  # within 5% where the metric is the text's similarity
    ("kitten", "sitting", "InfoVQA", 1 - 3 / 7, 1 - 3 / 7),
    ("kitten", "sitting", "ChartQA", 0, 0),
    ("abcd", "abxx", "InfoVQA", 0.5, 0.5),
    ("abcd", "axxx", "InfoVQA", 0, 0),
    # two of six, the second space counted in the length only
    ("ab xx", "ab  cd", "InfoVQA", 2 / 3, 0.6),
    ("41", "42", "MMStar", 0, 0),  # neither "char" nor "info"
    ("2\\sqrt{3}", "\\sqrt{12}", "CharXiv", 1, 0),  # the best of relaxed and math-verify
    ("a", "A", "MMStar", 1, 1),
  ],
)
def test_quirks(prediction, gold, benchmark, official, ours):
  pytest.importorskip("math_verify")
  assert official_score(prediction, gold, benchmark) == pytest.approx(official)
  if ours is not None:
    assert score(prediction, gold, benchmark).value == pytest.approx(ours)


def test_a_folders_name_changes_the_official_rule():
  pytest.importorskip("math_verify")
  assert official_score("41", "42", "/data/lmm_eval_MMStar.json") == 0
  assert official_score("41", "42", "/data/Characters/lmm_eval_MMStar.json") == 1
  assert official_score("kitten", "sitting", "/info/lmm_eval_MMStar.json") == pytest.approx(
    1 - 3 / 7
  )


def test_official_lists_of_golds():
  pytest.importorskip("math_verify")
  for golds in (["x", "sitting"], ("x", "sitting"), "['x', 'sitting']"):
    assert official_score("kitten", golds, "InfoVQA") == pytest.approx(1 - 3 / 7)
    assert official_score("sitting", golds, "ChartQA") == 1
    assert official_score("sitting", golds, "MMStar") == 0  # one text there


def test_a_zero_prediction_is_a_text_to_the_release(monkeypatch):
  pytest.importorskip("math_verify")
  monkeypatch.setattr(official_scoring, "_official_maths", lambda *_: 0.0)
  assert official_score("0", "0", "ChartQA") == 0  # "0.0" is not "0"
  assert official_score("0", "0.0", "ChartQA") == 1
  assert official_score("5", "0", "ChartQA") == 0


def test_answers_that_say_there_is_none():
  none = (
    "It cannot be determined from the caption.",
    "The caption does not mention the color",
    "I don't know",
    "I’m unable to answer this question",
    "Not specified",
    "There is not enough information.",
    "Unknown.",
    "N/A",
    "The value isn't provided",
    "No information",
    "This is unanswerable",
  )
  some = (
    "B",
    "red",
    "not red",
    "The unknown soldier",
    "12",
    "You cannot see red",
    "can be seen",
    "Information desk",
    "No",
    "none of them",
    "a stated goal",
  )
  assert [text for text in none if not refuses(text)] == []
  assert [text for text in some if refuses(text)] == []


def test_the_official_scorer_needs_math_verify(monkeypatch):
  monkeypatch.setitem(sys.modules, "math_verify", None)
  with pytest.raises(ValueError, match=r"pip install -e '\.\[maths\]'"):
    official_score("1", "1", "MMStar")


def test_the_package_has_the_two_functions_that_score_an_answer():
  import caprl_jax.scoring
  from caprl_jax.scoring import extract_answer
  from caprl_jax.scoring import score as of_package

  assert of_package is score and extract_answer("The answer is B.", 4, "ours") == "B"
  with pytest.raises(AttributeError, match="has no attribute 'scores'"):
    caprl_jax.scoring.scores  # noqa: B018
