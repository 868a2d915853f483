"""Curation with a judge whose answers are written down."""

import dataclasses

import numpy as np
import pytest

from caprl_jax.data.rows import QARow, Question
from caprl_jax.harness import question_filter as module
from caprl_jax.harness.question_filter import QuestionFilterConfig, mismatched_facts

COLOR = Question("what color?", ("red", "blue"), 0, "color")
SHAPE = Question("what shape?", ("circle", "square"), 0, "shape")
SILENT = Question("what size?", ("large", "small"), 0, "size")  # an endpoint fails on it
INFORMED = (
  "It is a {color} {shape}.",
  "A {color} {shape}.",
  "There is a {color} {shape}.",
  "One {color} {shape}.",
)


class FakeJudge:
  """Answers by a function of caption and question, and keeps what it was asked."""

  def __init__(self, right):
    self.right, self.asked = right, []

  def correct(self, asks, what="judging"):
    self.asked += [(what, caption, question) for caption, question in asks]
    return np.array([self.right(caption, question) for caption, question in asks], bool)

  def answered(self, asks):
    return np.array([question is not SILENT for _, question in asks], bool)


def row(name, color, shape, questions=(COLOR, SHAPE)):
  return QARow(b"", questions, name, {"color": color, "shape": shape})


ROWS = [row("a", "red", "circle"), row("b", "blue", "square"), row("c", "green", "square")]


def honest(caption, question):
  """Right from a caption that says the gold attribute."""
  return question.options[question.gold] in caption


def config(**kwargs):
  return QuestionFilterConfig(**{"informed": INFORMED, **kwargs})


def filter_split(rows, host_judge, cfg, seed, where):
  """Of one split."""
  return module.filter_questions([(where, rows)], host_judge, cfg, seed)[0]


def test_mismatched_facts_share_no_fact():
  facts = lambda color, shape: {"color": color, "shape": shape}
  pool = [facts(c, s) for c in ("red", "blue", "green") for s in ("circle", "square", "star")]
  got = mismatched_facts(ROWS[0], pool, 10, seed=0)
  assert len(got) == 4 and all(f["color"] != "red" and f["shape"] != "circle" for f in got)
  assert len(mismatched_facts(ROWS[0], pool, 2, seed=0)) == 2
  assert mismatched_facts(ROWS[0], pool, 2, 0) == mismatched_facts(
    row("other", "red", "circle"), pool, 2, 0
  )
  picks = [tuple(map(str, mismatched_facts(ROWS[0], pool, 2, seed))) for seed in range(10)]
  assert len(set(picks)) > 1
  assert mismatched_facts(ROWS[0], pool[:3], 2, 0) == []  # all red
  untitled = dataclasses.replace(ROWS[0], facts={"chart": "bar", "title": ""})
  assert mismatched_facts(
    untitled, [{"chart": "pie", "title": ""}, {"chart": "bar", "title": ""}], 2, 0
  ) == [{"chart": "pie", "title": ""}]


def test_the_same_value_of_another_attribute_is_no_shared_fact():
  orange = QARow(b"", (COLOR,), "o", {"color": "orange", "fruit": "pear"})
  assert mismatched_facts(orange, [{"color": "red", "fruit": "orange"}], 1, 0)


def test_kept_and_dropped_by_kind():
  host_judge = FakeJudge(honest)
  rows, counts = filter_split(ROWS, host_judge, config(), 0, "train")
  # Golds are red and circle: only the first row's captions say them, and no mismatched caption
  # does.
  assert [r.name for r in rows] == ["a"] and rows[0].questions == (COLOR, SHAPE)
  assert counts == {"kept/color": 1, "dropped/color": 2, "kept/shape": 1, "dropped/shape": 2}
  blind = [caption for what, caption, q in host_judge.asked if what == "blind" and q is COLOR]
  assert blind[0] == "" and set(blind[1:]) == {"It is a blue square.", "It is a green square."}
  # What already failed one of four templates cannot pass three in four: it is not asked again.
  assert sum(what == "informed" for what, _, _ in host_judge.asked) == 6 + 2 * 3


def test_a_question_answered_without_its_caption_is_dropped():
  rows, counts = filter_split(
    ROWS, FakeJudge(lambda c, q: honest(c, q) or (c == "" and q is SHAPE)), config(), 0, "train"
  )
  assert rows[0].questions == (COLOR,)  # shape: one of three blind presentations right, 1/3 >= 0.25
  assert counts["dropped/shape"] == 3 and counts["kept/color"] == 1
  rows, _ = filter_split(
    ROWS,
    FakeJudge(lambda c, q: honest(c, q) or (c == "" and q is SHAPE)),
    config(max_blind=0.34),
    0,
    "",
  )
  assert rows[0].questions == (COLOR, SHAPE)


def test_a_question_answered_from_other_images_captions_is_dropped():
  host_judge = FakeJudge(
    lambda c, q: honest(c, q) or (q is COLOR and "square" in c and c.startswith("It"))
  )
  rows, counts = filter_split(ROWS, host_judge, config(), 0, "train")
  assert rows[0].questions == (SHAPE,)
  assert counts["kept/color"] == 0 and counts["dropped/color"] == 3


@pytest.mark.parametrize("least, kept", [(0.74, True), (0.75, False)])
def test_the_informed_threshold_is_strict(least, kept):
  host_judge = FakeJudge(lambda c, q: honest(c, q) and not c.startswith("There"))  # three of four
  if kept:
    rows, _ = filter_split(ROWS, host_judge, config(min_informed=least), 0, "train")
    assert rows[0].questions == (COLOR, SHAPE)
  else:
    with pytest.raises(ValueError, match="left none"):
      filter_split(ROWS, host_judge, config(min_informed=least), 0, "train")


def test_no_mismatched_captions():
  host_judge = FakeJudge(honest)
  rows, _ = filter_split(ROWS, host_judge, config(mismatched=0), 0, "train")
  assert rows[0].questions == (COLOR, SHAPE)
  assert {caption for what, caption, _ in host_judge.asked if what == "blind"} == {""}


@pytest.mark.parametrize("facts", [None, {"color": "red"}])
def test_rows_without_the_facts_are_left_out_and_counted(facts):
  rows, counts = filter_split(
    [*ROWS, QARow(b"", (COLOR, SHAPE), "d", facts)], FakeJudge(honest), config(), 0, "train"
  )
  assert [r.name for r in rows] == ["a"]
  assert counts["dropped/without facts"] == 2


def test_nothing_left_raises():
  with pytest.raises(
    ValueError, match=r"train: the question filter left none of 6 questions.*'dropped/color': 3"
  ):
    filter_split(ROWS, FakeJudge(lambda c, q: False), config(), 0, "train")
  with pytest.raises(ValueError, match="left none"):
    # knows it all without a caption
    filter_split(ROWS, FakeJudge(lambda c, q: True), config(), 0, "train")


def test_no_templates_keeps_every_row():
  host_judge = FakeJudge(honest)
  assert filter_split(ROWS, host_judge, QuestionFilterConfig(), 0, "train") == (ROWS, {})
  assert not host_judge.asked
  unasked = [dataclasses.replace(row, questions=()) for row in ROWS]
  assert filter_split(unasked, None, QuestionFilterConfig(), 0, "train") == (unasked, {})


def test_questions_of_other_kinds_are_left_out_unasked():
  host_judge = FakeJudge(honest)
  rows, counts = filter_split(ROWS, host_judge, config(kinds=("color",)), 0, "train")
  assert [r.questions for r in rows] == [(COLOR,)]
  assert counts == {"kept/color": 1, "dropped/color": 2, "left out/shape": 3}
  assert {question for _, _, question in host_judge.asked} == {COLOR}
  only_color = dataclasses.replace(ROWS[0], questions=(COLOR,))
  split = [only_color, ROWS[1]]
  rows, counts = filter_split(split, None, QuestionFilterConfig(kinds=("shape",)), 0, "train")
  assert [(r.name, r.questions) for r in rows] == [("b", (SHAPE,))]
  assert counts == {"left out/color": 2}
  no_row = r"question_filter.kinds = \('colour',\): no row has 'colour'.*kinds='\(\)' takes all"
  with pytest.raises(ValueError, match=no_row):
    filter_split(ROWS, None, QuestionFilterConfig(kinds=("colour",)), 0, "train")


def test_splits_are_judged_together_and_kept_apart():
  host_judge = FakeJudge(honest)
  (train, counts), (test, test_counts) = module.filter_questions(
    [("train", ROWS[1:]), ("test", ROWS[:1])], host_judge, config(max_blind=1.1, min_informed=-1), 0
  )
  assert [r.name for r in train] == ["b", "c"] and [r.name for r in test] == ["a"]
  assert counts["kept/color"] == 2 and test_counts["kept/color"] == 1
  host_judge = FakeJudge(honest)
  with pytest.raises(ValueError, match="train: the question filter left none of 4"):
    module.filter_questions([("train", ROWS[1:]), ("test", ROWS[:1])], host_judge, config(), 0)


def test_what_cannot_pass_any_more_is_not_asked_again():
  many = [row(str(i), f"c{i}", f"s{i}") for i in range(9)]
  host_judge = FakeJudge(lambda c, q: True)
  with pytest.raises(ValueError, match="left none"):
    filter_split(many, host_judge, config(mismatched=8), 0, "train")
  # Nine blind presentations: with the third right answer 3/9 >= 0.25, so six are never asked.
  assert sum(what == "blind" for what, _, _ in host_judge.asked) == 3 * 2 * 9


def test_a_fixed_subset_is_drawn_once():
  many = [
    row(str(i), "red", "circle", tuple(dataclasses.replace(COLOR, stem=f"{k}?") for k in range(5)))
    for i in range(40)
  ]
  kept = module.fixed_subset(many, 2, seed=0)
  assert [r.name for r in kept] == [r.name for r in many]
  assert all(len(r.questions) == 2 and set(r.questions) <= set(many[0].questions) for r in kept)
  assert module.fixed_subset(many[7:9], 2, seed=0) == kept[7:9]  # whatever the others are
  assert module.fixed_subset(many, 2, seed=1) != kept and module.fixed_subset(many, 9, 0) == many
  counts = [sum(q.stem == f"{k}?" for r in kept for q in r.questions) for k in range(5)]
  assert min(counts) > 5, counts  # none is favoured


def test_what_an_endpoint_does_not_answer_is_dropped():
  rows = [row("a", "red", "circle", (COLOR, SILENT)), *ROWS[1:]]
  judge = FakeJudge(lambda caption, q: q is SILENT or honest(caption, q))
  kept, counts = filter_split(rows, judge, config(mismatched=0, max_blind=1.1), 0, "train")
  assert SILENT not in kept[0].questions and COLOR in kept[0].questions
  assert counts["dropped/size"] == 1
