"""CaptionQA's rules, quirks included: which questions offer "cannot answer", options' order,
letters read, scores."""

import random

import pytest

from caprl_jax.scoring.captionqa import (
  CANNOT_ANSWER,
  ShownOptions,
  captionqa_score,
  chosen_option,
  gold_of,
  is_yes_no,
  question_text,
  shown_options,
)


@pytest.mark.parametrize(
  "question, choices, yes_no",
  [
    ("What colour is it?", ("Red", "Blue"), False),
    ("What is there?", ("Yes", "No"), True),
    ("Is it red or blue?", ("Red", "Blue"), True),  # "is" begins it, whatever is chosen from
    ("Which of them?", ("Two eyes", "A north wind"), True),  # "yes" and "no" are inside words
    ("Island or sea?", ("Island", "Sea"), False),
    (" Does it move?", ("Slowly", "Fast"), True),
  ],
)
def test_yes_and_no_offer_no_way_out(question, choices, yes_no):
  assert is_yes_no(question, choices) == yes_no
  shown = shown_options(question, choices, 1, random.Random(0))
  assert (shown.cannot is None) == yes_no and shown.texts[shown.gold] == choices[1]
  assert sorted(shown.texts) == sorted((*choices, *(() if yes_no else (CANNOT_ANSWER,))))
  assert yes_no or shown.texts[shown.cannot] == CANNOT_ANSWER


def test_one_generator_orders_one_question_after_the_other():
  rng = random.Random(0)
  orders = [[0, 1, 2, 3], [0, 1]]
  for order in orders:
    rng.shuffle(order)
  ours = random.Random(0)
  first = shown_options("What?", ("a", "b", "c"), 0, ours)
  second = shown_options("Is it?", ("a", "b"), 0, ours)
  assert first.texts == tuple(("a", "b", "c", CANNOT_ANSWER)[i] for i in orders[0])
  assert second.texts == tuple("ab"[i] for i in orders[1])


@pytest.mark.parametrize(
  "answer, chosen",
  [
    ("B", 1),
    ("(b) blue", 1),
    ("A dog", 0),
    ("<think>A</think> C", 2),
    ("I say. Answer: C", 2),
    ("A\nB", 1),
    ("E", None),
    ("2", 1),
    ("none", None),
    ("", None),
    ("Z 3", 2),
  ],
)
def test_letters_as_the_authors_read_them(answer, chosen):
  assert chosen_option(answer, 4) == chosen


def test_scores():
  shown = ShownOptions(("a", CANNOT_ANSWER, "b"), 2, 1)
  assert [captionqa_score(i, shown) for i in (0, 1, 2, None)] == [0, 1 / 2 + 0.05, 1, 0]
  assert gold_of(("x ", "y", "y"), " y") == 1 and gold_of(("x",), "z") is None
  assert question_text("Q?", ("a", "b")) == "Question:\nQ?\n\nOptions:\nA. a\nB. b\n\nAnswer:"
