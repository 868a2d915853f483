"""What becomes of a caption's text: limits, fields, captions that were there."""

import pathlib

import pytest

from caprl_jax.data.rows import CaptionRow
from caprl_jax.modes.caption import texts
from caprl_jax.modes.caption.texts import TextConfig, shorten

ENGLISH = "A cat sits. It is 3.5 m from Dr. Smith, e.g. near (here). Then it left!"


@pytest.mark.parametrize(
  "text, words, characters, kept",
  [
    (ENGLISH, None, None, ENGLISH),
    (ENGLISH, None, 60, "A cat sits. It is 3.5 m from Dr. Smith, e.g. near (here)."),
    (ENGLISH, None, 50, "A cat sits."),
    (ENGLISH, 12, None, "A cat sits."),
    (ENGLISH, 13, None, "A cat sits. It is 3.5 m from Dr. Smith, e.g. near (here)."),
    (ENGLISH, 13, 20, "A cat sits."),
    ('He said "Go." Then more.', None, 15, 'He said "Go."'),
    ("A cat... and more words", 3, None, "A cat..."),
    ("# A title\n\nA cat\nsits here.", 4, None, "# A title\n\nA cat"),
    ("一只猫坐着。它很大！“真的？”然后离开了。", None, 9, "一只猫坐着。"),
    ("一只猫坐着。它很大！“真的？”然后离开了。", None, 15, "一只猫坐着。它很大！“真的？”"),
    ("一只猫坐着。它很大！", 5, None, "一只猫坐着。"),
    ("a long sentence without an end", 3, None, "a long sentence"),
    ("a long sentence without an end", None, 8, "a long"),
    ("一只猫坐着很大", None, 3, "一只猫"),
    ("abcdefgh", None, 3, "abc"),
    ("  short  ", 5, 10, "short"),
    ("", 5, 10, ""),
  ],
)
def test_a_caption_is_cut_at_a_sentence_or_else_at_a_word(text, words, characters, kept):
  assert shorten(text, words, characters) == kept


def row(name="set/10_dog/a.b.png", **fields) -> CaptionRow:
  return CaptionRow(pathlib.Path(name), "", name, fields=fields or None)


def test_text_before_and_after_with_fields():
  cfg = TextConfig(before="sks {folder}, {tags}: ", after=" [{name}] {{x}} {", max_words=3)
  found = texts.finished("A cat sits. It runs.", row(tags=["red", 2]), cfg)
  assert found == ("sks 10_dog, red, 2: A cat sits. [a.b] {x} {", True)
  assert texts.finished(" A cat. ", row(tags="r"), TextConfig(before=">")) == ("> A cat. ", False)
  with pytest.raises(ValueError, match=r"10_dog/a.b.png' has no \{tags\}, .*it has name, folder"):
    texts.finished("A cat.", row(), cfg)
  texts.check_fields({"caption.text.before": cfg.before}, ["tags"])
  with pytest.raises(
    ValueError, match=r"before = .*\{tags\}, .*the fields there are: name, folder"
  ):
    texts.check_fields({"caption.text.before": cfg.before}, [])
  with pytest.raises(ValueError, match="max_words = 0 must be at least 1"):
    TextConfig(max_words=0)


def test_captions_that_were_there_are_joined():
  assert texts.joined("old", ["new"], "append", ", ") == ["old, new"]
  assert texts.joined("old", ["new"], "prepend", "\n") == ["new\nold"]
  assert texts.joined("old", ["b", "c"], "append", " ") == ["old", "b", "c"]
  assert texts.joined("old", ["b", "c"], "prepend", " ") == ["b", "c", "old"]
  assert texts.joined(" ", ["new"], "append", " ") == ["new"]
