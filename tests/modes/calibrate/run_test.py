"""Calibration of a tiny judge: figures against counting by hand, the margin, files, refusals."""

import json

import ml_collections
import numpy as np
import pytest
from helpers import tiny
from helpers.servers.chat import judging, serving
from PIL import Image

from caprl_jax.data.judge_prompts import paraphrases, template_for
from caprl_jax.data.judge_questions import TokenizedQuestion
from caprl_jax.data.readers.jsonl import read_jsonl, write_caption_jsonl
from caprl_jax.data.rows import CaptionRow, Question
from caprl_jax.harness.sections import GateSection
from caprl_jax.modes.calibrate import figures as calibration
from caprl_jax.modes.calibrate import run as calibrate
from caprl_jax.modes.calibrate import stability
from caprl_jax.modes.calibrate.section import CalibrateConfig
from caprl_jax.modes.calibrate.show import table
from caprl_jax.modes.calibrate.trials import CONDITIONS, Trial, make_trials, rotated

IDEAL = "The image shows a {color} {shape}."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("calibrate")
  tiny.write_judge(folder / "judge"), tiny.write_data(folder / "data")
  return folder


def config_of(folder, **changes):
  data = str(folder / "data" / "rows.jsonl")
  settings = dict(
    readings=("option_pmi", "letter_argmax"), max_questions=16, turns=2, paraphrases=1, **changes
  )
  return ml_collections.ConfigDict(
    dict(
      mode="calibrate",
      seed=0,
      judge=dict(source=str(folder / "judge")),
      data=dict(train=data, eval=data, batch_size=4, questions=2),
      gate=dict(ideal=IDEAL),
      calibrate=settings,
    )
  )


@pytest.fixture(scope="module")
def figures(folder):
  calibrate.run(config_of(folder), folder / "work")
  return json.loads((folder / "work" / "calibration.json").read_text())


def test_figures_are_shares_of_the_questions(figures):
  assert figures["questions"] == 16 and set(figures["readings"]) == {"option_pmi", "letter_argmax"}
  for row in figures["readings"].values():
    for condition in CONDITIONS:
      shares = row[condition]
      np.testing.assert_allclose(sum(shares.values()), 1, atol=1e-6)
      np.testing.assert_allclose(
        np.array(list(shares.values())) * 16,
        np.round(np.array(list(shares.values())) * 16),
        atol=1e-6,
      )
  agreement = figures["agreement"]
  assert agreement["option_pmi"]["option_pmi"] == 1
  assert agreement["option_pmi"]["letter_argmax"] == agreement["letter_argmax"]["option_pmi"] < 1


def test_a_larger_margin_answers_less_and_abstains_more(figures):
  table = figures["readings"]["option_pmi"]["margins"]
  assert [row["margin"] for row in table] == list(calibration.MARGINS)
  for name, sign in (("ideal_accuracy", -1), ("generic_abstained", 1), ("empty_abstained", 1)):
    assert (sign * np.diff([row[name] for row in table]) >= 0).all() and len(
      {row[name] for row in table}
    ) > 1
  np.testing.assert_allclose(
    table[0]["ideal_accuracy"], figures["readings"]["option_pmi"]["ideal"]["accuracy"]
  )


def test_the_best_margin():
  row = lambda m, ideal, generic: {
    "margin": m,
    "ideal_accuracy": ideal,
    "generic_abstained": generic,
  }
  assert (
    calibration.best_margin(
      [row(0.1, 1.0, 0.0), row(0.2, 0.9, 0.8), row(0.3, 0.7, 1.0), row(0.4, 0.1, 1.0)]
    )
    == 0.2
  )


def test_position_bias_is_measured_over_rotated_options(figures):
  position = figures["readings"]["letter_argmax"]["position"]
  assert (
    len(position["accuracy_by_gold_slot"]) == 3 and abs(sum(position["chosen_by_slot"])) <= 1 + 1e-6
  )
  question = Question("?", ("a", "b", "c"), 2)
  assert [rotated(question, by).options for by in range(3)] == [
    ("a", "b", "c"),
    ("b", "c", "a"),
    ("c", "a", "b"),
  ]
  assert [q.options[q.gold] for q in (rotated(question, by) for by in range(4))] == ["c"] * 4


def test_a_judge_that_always_says_a_is_seen(folder, monkeypatch):
  class First:
    def choices(self, asks, what):
      return np.zeros(len(asks), int)

    def answered(self, asks):
      return np.ones(len(asks), bool)

  question = Question("?", ("a", "b"), 1)
  position = calibration.position_bias(First(), [Trial(question, {"ideal": "x"})] * 4, 2, "")
  assert position == {
    "accuracy_by_gold_slot": [1.0, 0.0],
    "chosen_by_slot": [1.0, 0.0],
    "same_option_when_turned": 0.0,
  }


def test_a_judge_behind_a_server_and_what_it_does_not_answer(folder, tmp_path):
  """An honest server: right with true captions only. Questions to which an answer failed are left
  out and counted."""
  pytest.importorskip("openai")

  def behave(handler, name, attempt):
    if handler.command == "POST" and "shape is present" in name and "blue circle" in name:
      return handler.say(400, {"error": "refused"})
    return judging()(handler, name, attempt)

  config = config_of(folder)
  with serving(behave) as server:
    config.judge = dict(
      reading="generate", endpoint=dict(url=server.url, model="m", max_retries=0, max_failures=99)
    )
    with pytest.raises(ValueError, match="a judge behind an endpoint answers in words"):
      calibrate.run(config, tmp_path)
    config.calibrate.readings = ("option_pmi", "generate")
    calibrate.run(config, tmp_path)
  found = json.loads((tmp_path / "calibration.json").read_text())
  assert found["judge"] == f"m ({server.url})" and list(found["readings"]) == ["generate"]
  row, failed = found["readings"]["generate"], found["questions_failed"]
  assert 0 < failed < 8 and found["questions"] == 16 - failed
  assert row["ideal"]["accuracy"] == 1 and row["generic"]["abstained"] == 1
  assert row["empty"] == {"accuracy": 0, "abstained": 1, "misled": 0}
  assert row["shuffled"]["misled"] > 0 and row["reward"]["turned"]["same"] == 1
  assert row["reward"]["paraphrased"]["ideal_accuracy"][0] == 1
  assert f"left out: {failed} questions" in table(found, "generate")
  assert found["prompt"] == "plain" and found["agreement"] == {"generate": {"generate": 1.0}}


def test_plot_and_table(figures, folder):
  image = Image.open(folder / "work" / "calibration.png")
  assert image.size[0] > 900 and len(image.convert("RGB").getcolors(1 << 24)) > 20
  text = table(figures, "letter_argmax")
  assert "option_pmi" in text and "would be best" in text and "by slot" in text


def test_how_stable_the_rewards_are(figures):
  """The tiny judge's own verdicts; what the figures mean is tested on matrices made by hand."""
  pmi, letters = (figures["readings"][r]["reward"] for r in ("option_pmi", "letter_argmax"))
  for reward, row in ((pmi, "option_pmi"), (letters, "letter_argmax")):
    ideal, other = (figures["readings"][row][c]["accuracy"] for c in ("ideal", "shuffled"))
    assert reward["caption"]["beyond_other"]["mean"] == pytest.approx(ideal - other)
    low, high = (reward["caption"]["beyond_none"][k] for k in ("low", "high"))
    assert low <= reward["caption"]["beyond_none"]["mean"] <= high
    asked = reward["questions"]
    assert asked["separate"] + asked["always_right"] + asked["always_wrong"] == 16
    assert len(asked["never"]) == 16 - asked["separate"] and 0 <= asked["saves"] <= 1
    assert reward["reliability"]["questions"] == 2 and set(reward["reliability"]["at"]) == set(
      "1248"
    )
  assert "turned" not in pmi and 0 <= letters["turned"]["same"] <= 1
  # its own reading is asked again in other words, and the other one is not
  assert "paraphrased" not in letters and len(pmi["paraphrased"]["ideal_accuracy"]) == 2
  ideal = figures["readings"]["option_pmi"]["ideal"]["accuracy"]
  assert pmi["paraphrased"]["ideal_accuracy"][0] == ideal
  text = table(figures, "letter_argmax")
  assert "never separate" in text and f"{len(pmi['questions']['never'])} of 16" in text


def test_questions_that_never_separate_are_named():
  class Tokens:
    def tokenize(self, question):
      return TokenizedQuestion((1,) * len(question.stem), ((1, 1),) * 2, 0, 0, (0.0, 0.0))

  say = {condition: "" for condition in CONDITIONS}
  trials = [
    Trial(Question(stem, ("a", "b"), 0, "k"), say, image)
    for stem, image in (("four", "x"), ("sixsix", "y"), ("ten letter", "x"))
  ]
  right = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]], bool)
  found = stability.never_separate(right, trials, Tokens())
  assert (found["separate"], found["always_right"], found["always_wrong"]) == (1, 1, 1)
  assert found["saves"] == (8 + 10) / (8 + 10 + 14)  # stem and two options of two tokens
  assert [(one["image"], one["stem"], one["always"]) for one in found["never"]] == [
    ("x", "four", "right"),
    ("y", "sixsix", "wrong"),
  ]


@pytest.mark.parametrize(
  "reading, prompt", [("option_pmi", "plain"), ("letter_argmax", "official")]
)
def test_other_words_are_the_same_request(reading, prompt):
  template = template_for(reading, prompt)
  found = paraphrases(template)
  assert (
    len({one.head for one in (template, *found)})
    == 3
    == len({one.name for one in (*found, template)})
  )
  for one in found:
    said = one.joined("A red circle.", "What?", ["red", "blue"])
    assert "A red circle.\n" in said and said.count("What?") == 1
    assert (one.option, one.letter, one.abstain, one.specials) == (
      template.option,
      template.letter,
      template.abstain,
      template.specials,
    )
    assert said.count("<|im_start|>") == (2 if template.specials else 0)


def test_trials_pair_each_question_with_its_own_and_anothers_caption(folder):
  rows = read_jsonl(folder / "data" / "rows.jsonl")
  facts = {q: row.facts for row in rows for q in row.questions}
  trials = make_trials(rows, CalibrateConfig(kinds=("color",)), GateSection(ideal=IDEAL), 0)
  assert len(trials) == 12 and all(t.question.kind == "color" for t in trials)
  for trial in trials:
    true = trial.question.options[trial.question.gold]
    assert true in trial.captions["ideal"] and trial.captions["shuffled"] != trial.captions["ideal"]
    assert trial.captions["empty"] == "" and trial.captions["generic"] == "A simple picture."
  assert facts


def test_captions_of_a_file_stand_in_for_facts(folder):
  rows = read_jsonl(folder / "data" / "rows.jsonl")
  path = folder / "data" / "trusted.jsonl"
  write_caption_jsonl(
    path, [CaptionRow(row.image, f"Caption {i}.", row.name) for i, row in enumerate(rows[:5])]
  )
  trials = make_trials(rows, CalibrateConfig(captions=str(path)), GateSection(), 0)
  assert {t.captions["ideal"] for t in trials} == {f"Caption {i}." for i in range(5)}


@pytest.mark.parametrize(
  "cfg, gate, message",
  [
    (dict(), GateSection(), "set calibrate.ideal to a template"),
    (dict(ideal="One caption for all."), GateSection(), "images with different true captions"),
    (dict(ideal="{size}"), GateSection(), "images with different true captions"),
    (
      dict(kinds=("size",)),
      GateSection(ideal=IDEAL),
      "leaves no question; the data has .'color', 'shape'.",
    ),
  ],
)
def test_data_that_cannot_calibrate_is_refused(folder, cfg, gate, message):
  with pytest.raises(ValueError, match=message):
    make_trials(read_jsonl(folder / "data" / "rows.jsonl"), CalibrateConfig(**cfg), gate, 0)
