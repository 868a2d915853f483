"""What a captioner is taught, and which rows it is too long for."""

import pytest

from caprl_jax.data import captions
from caprl_jax.data.rows import CaptionRow, QARow
from caprl_jax.data.usable_rows import ImageFacts, RowError


class Words:
  """A tokenizer of words."""

  end_ids = (0,)

  def encode_plain(self, text):
    return [len(word) for word in text.split()]


def row(**facts):
  return QARow(b"", (), "one", facts)


def test_captions_are_padded_and_never_cut():
  ids, valid = captions.caption_ids(Words(), row(), "a red cat", 6)
  assert ids.tolist() == [1, 3, 3, 0, 0, 0] and valid.tolist() == [True] * 4 + [False] * 2
  said = "row 'one': its caption has 4 tokens, more than sft.max_tokens = 3"
  with pytest.raises(RowError, match=said) as raised:
    captions.caption_ids(Words(), row(), "a red cat", 3)
  assert raised.value.reason == "caption too long"


def test_places_and_the_text_before_them():
  assert captions.stems("A {color} {shape}.") == {"color": "A ", "shape": "A {color} "}
  assert captions.places(["A {color}.", "{shape}"]) == {"color", "shape"}
  assert captions.places([""]) == set()


def test_a_row_is_refused_where_any_phase_would_be_too_long():
  phases = [((1.0, "A {color} one."),), ((0.5, "{color}"), (0.5, "It is of {color} color."))]
  check = captions.captions_fit(phases, Words(), 6)
  check(row(color="red"), ImageFacts())
  with pytest.raises(RowError):
    check(row(color="very dark red"), ImageFacts())
  with pytest.raises(RowError):  # again, for another row
    check(row(color="very dark red"), ImageFacts())
  plain = captions.captions_fit([()], Words(), 3)
  plain(CaptionRow(b"", "two words", "one"), ImageFacts())
  with pytest.raises(RowError):
    plain(CaptionRow(b"", "now three words", "one"), ImageFacts())


def test_recognition_asks_about_all_values():
  rows = [row(color="red"), row(color="very dark red")]
  captions.recognition_fits("A {color}", rows, Words(), 5)(rows[0], ImageFacts())
  with pytest.raises(RowError):
    captions.recognition_fits("A {color}", rows, Words(), 4)(rows[0], ImageFacts())
  captions.recognition_fits("", rows, Words(), 1)(rows[0], ImageFacts())
