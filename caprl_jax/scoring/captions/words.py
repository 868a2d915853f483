"""A caption -> its words: how many, and in one form for comparison."""

import re

_SIGN = "㐀-鿿豈-﫿぀-ヿ"  # Chinese and Japanese, written without spaces: each is a word
_WORD = re.compile(rf"[{_SIGN}]|[^\W{_SIGN}]+(?:['’.,-][^\W{_SIGN}]+)*")


def words_of(text: str) -> list[str]:
  """The words of a text: "don't", "x-ray" and "1,200.5" are one each, and so is a Chinese sign."""
  return _WORD.findall(text)


def normal_words(text: str) -> list[str]:
  """The words in a form in which case does not count."""
  return words_of(text.casefold())
