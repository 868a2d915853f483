"""Averages as the paper has them, and what an answer may be."""

import numpy as np
import pytest

from caprl_jax.data.readers.benchmarks.row import BENCHMARKS, CAPTIONQA, BenchmarkRow
from caprl_jax.modes.prism.figures import PAPER_BENCHMARKS, official_average
from caprl_jax.modes.prism.scores import score_answers

# arXiv 2509.22647, table 3: benchmarks in its order, and the average that it prints.
TABLE_3 = [
  ("Qwen2.5-VL-3B", "65.6 27.1 40.2 28.6 32.8 21.8 54.4 22.6 46.4 64.1 35.1", 39.9),
  ("Qwen2.5-VL-72B", "80.2 38.0 60.8 34.1 39.9 30.7 60.2 24.5 55.0 69.3 39.4", 48.3),
  ("CapRL-3B", "80.5 39.9 64.8 30.7 36.4 32.4 60.1 23.4 55.0 70.6 38.1", 48.3),
]


@pytest.mark.parametrize("captioner, row, average", TABLE_3)
def test_the_papers_average_is_over_eleven_benchmarks(captioner, row, average):
  means = [float(value) / 100 for value in row.split()]
  scores = {name: {"mean": mean, "best": mean} for name, mean in zip(PAPER_BENCHMARKS, means)}
  scores["VisuLogic"] = {"mean": 1.0, "best": 1.0}
  found = official_average(scores)["official"]
  # the table's columns are rounded before they are averaged here
  assert 100 * found["mean"] == pytest.approx(average, abs=0.1) and found["benchmarks"] == 11
  assert set(BENCHMARKS.values()) == {*PAPER_BENCHMARKS, "VisuLogic"}


def test_an_average_of_what_was_asked():
  assert official_average({"MMStar": None, "questions": None}) == {}
  found = official_average({"MMStar": {"mean": 0.5, "best": 1.0}, "SEED": None})
  assert found == {"official": {"mean": 0.5, "best": 1.0, "benchmarks": 1}}


def asked(benchmark, gold, years=None):
  return BenchmarkRow("a.png", "<image>Q", gold, (), benchmark, "row", years=years)


def test_options_that_the_image_shows():
  rows = [asked("VisuLogic", "B")]
  texts = ["B\n\nThe reason is long.", "So B is correct.", "It is not B.", "A dog."]
  found = score_answers(rows, np.array([texts], object))
  assert found["ours"].tolist() == [[1, 1, 0, 0]]


def test_years_of_a_row():
  texts = np.array([["2008"], ["2008"], ["2008"]], object)
  rows = [asked("ChartQAPro", "2010", years) for years in (None, (True,), (False,))]
  assert score_answers(rows, texts)["ours"].tolist() == [[0], [0], [1]]


def test_captionqa_s_answers_as_its_authors_score_them():
  options = ("red", "Cannot answer from the caption", "blue")
  asked = BenchmarkRow("a", "<image>Q", "C", options, CAPTIONQA, "1", cannot=1)
  plain = BenchmarkRow("a", "<image>Is it?", "A", ("Yes", "No"), CAPTIONQA, "2")
  texts = np.array([["C", "B", "A", "a dog", ""], ["A", "No", "B", "E", ""]], object)
  found = score_answers([asked, plain], texts)
  # "No" is no letter to their program, and an option's text to ours
  assert found["captionqa"].tolist() == [[1, 1 / 2 + 0.05, 0, 0, 0], [1, 0, 0, 0, 0]]
  assert found["official"].tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
  assert found["ours"].tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
  assert found["abstained"][0, 1] == found["abstained"][0, 4] == 1 and found["abstained"][0, 2] == 0
  read = score_answers([asked, plain], np.array([[2, -1], [0, -1]]))
  assert read["captionqa"].tolist() == [[1, 1 / 2 + 0.05], [1, 0]]
  assert read["abstained"].tolist() == [[0, 1], [0, 1]] and "official" not in read
