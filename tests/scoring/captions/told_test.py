"""Words, facts told and false statements of captions by hand; the same over captions' length."""

import numpy as np
import pytest

from caprl_jax.scoring.captions.facts import KnownFacts
from caprl_jax.scoring.captions.tradeoff import Said, length_bins, tradeoff
from caprl_jax.scoring.captions.words import words_of


@pytest.mark.parametrize(
  "caption, words",
  [
    ("A red, well-lit shape; it's 1,200.5 m.", 7),
    ("", 0),
    ("...", 0),
    ("红色的圆 and a line", 7),
    ("Ein größeres Viereck", 3),
  ],
)
def test_words(caption, words):
  assert len(words_of(caption)) == words


def test_facts_told_and_said_falsely():
  known = KnownFacts(
    [
      {"color": "red", "shape": "circle", "name": "one"},
      {"color": "dark red", "shape": "square", "name": "one"},
      {"color": "blue", "shape": "circle"},
    ]
  )
  assert set(known.values) == {"color", "shape"}  # all images have one name: it says nothing
  red = {"color": "red", "shape": "circle"}
  says = lambda caption, facts=red: known.told(caption, facts)[::2]
  assert says("A red circle.") == (1, 0)
  assert says("A Circle.") == (1 / 2, 0)
  assert says("A dark red square.") == (0, 2)  # "red" is part of another colour here
  assert says("Red, or blue: a circled thing.") == (1 / 2, 1)
  assert says("", {"color": "dark red"}) == (0, 0)
  assert says("dark red", {"color": "dark red"}) == (1, 0)
  assert known.told("A red circle.", {"size": "large"}) is None
  assert not KnownFacts([{"a": "x"}, {"a": "x"}]) and not KnownFacts([])


def test_sentences_of_descriptions_are_statements():
  red = {"description": "a bar chart with 2 bars. red is tallest. blue is shortest."}
  blue = {"description": "a bar chart with 2 bars. blue is tallest. red is shortest."}
  known = KnownFacts([red, blue])
  assert known.told("A bar chart with 2 bars. Red is tallest.", red) == (2 / 3, 3, 0)
  assert known.told("a bar chart with 2 bars. blue is tallest. it is nice.", red) == (1 / 3, 3, 1)


def said_of(words, told, false, images):
  caption = np.arange(len(words))
  return Said(*(np.array(x, float) for x in (told, false, words, images, caption)))


def test_told_against_false_over_length():
  """Sixteen captions of four images: long ones tell more and are wrong more often."""
  words = [2, 3, 12, 13] * 4
  said = said_of(words, [0, 0, 1, 1] * 4, [0, 0, 0, 1] * 4, np.repeat(range(4), 4))
  found = tradeoff(said, 0, 0.95)
  assert (found["told"], found["false"], found["words"], found["captions"]) == (0.5, 0.25, 7.5, 16)
  assert found["told_interval"] == [0.5, 0.5]  # each image has the same
  short, long = found["by_length"]
  assert (short["words"], short["told"], short["false"], short["captions"]) == (2.5, 0, 0, 8)
  assert (long["words"], long["told"], long["false"]) == (12.5, 1, 0.5)


def test_captions_of_one_length_and_few_ones_are_not_cut():
  assert length_bins(np.full(40, 7.0), np.arange(40)) == []
  assert length_bins(np.arange(15.0), np.arange(15)) == []
  masks = length_bins(np.repeat(np.arange(40.0), 2), np.repeat(np.arange(40), 2))  # two questions
  assert [int(mask.sum()) for mask in masks] == [20] * 4
  assert np.all(np.sum(masks, 0) == 1)
