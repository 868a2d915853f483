"""Caption tokens -> what its form is worth: length, repetition, timestamps.

All but `stamp_table` runs on the device in fixed shapes; no caption has to be decoded for its
reward. Besides the letters of `types.py`: X character classes a token, L = T * X.
"""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.masked import masked_mean
from caprl_jax.types import Array

# A character's class is its index here; " " stands for all whitespace, "x" for all that no
# timestamp can hold.
_CLASSES = b"0123456789[]:- x"
_OPEN, _CLOSE, _COLON, _DASH, _SPACE, _OTHER = range(10, 16)
_NOTHING = 16  # padding
_CLASS_BITS = 5

_WHITESPACE = bytes([*range(9, 14), *range(28, 33)])  # the ASCII part of what `\s` matches in a str
_SPELLING = bytes(
  0x20 if byte in _WHITESPACE else byte if byte in _CLASSES else ord("x") for byte in range(256)
)
_CODE = bytes.maketrans(_CLASSES, bytes(range(len(_CLASSES))))

# Characters that are in no match of the timestamps' regex, whatever stands before and after the
# token: runs of digits that are too long (a match holds only whole runs), and characters next to
# one that no match has beside them.
_IMPOSSIBLE = re.compile(
  rb"\d{4,}"
  rb"|\[(?=\D)|:(?=\D)|-(?=[^\d ])| (?=[^\d-])|\d(?=[\[x])"
  rb"|(?<=\D)\]|(?<=\D):|(?<=[^\d ])-|(?<=[^\d-]) |(?<=[\]x])\d"
)

# Where a time in seconds is expected, and there is none, or one that cannot be: 61 seconds, 600
# minutes.
_ABSENT, _BROKEN = -2, -1
_MAX_MINUTES = 599


def length_reward(length_BG: Array, full_tokens: int, zero_tokens: int) -> Array:
  """1 up to `full_tokens`, falling linearly to 0 at `zero_tokens`, 0 beyond (CapRL++'s R_len: 2048
  and 3072).

  With `zero_tokens` the limit of a caption and `full_tokens` the limit less a buffer, it is 1 + the
  soft overlong punishment of DAPO (arXiv 2503.14476, section 3.4).

  Args:
    length_BG: tokens of each caption.

  Returns:
    float32 [B, G].
  """
  assert full_tokens < zero_tokens, (full_tokens, zero_tokens)
  return jnp.clip(
    (zero_tokens - length_BG.astype(jnp.float32)) / (zero_tokens - full_tokens), 0.0, 1.0
  )


def repetition(tokens_BGT: Array, valid_BGT: Array, ngram: int = 4) -> Array:
  """Share of a caption's n-grams of tokens that repeat an earlier one: 1 - distinct / all; 0 where
  it has none.

  Exact: the n-grams are sorted, so that equal ones become neighbours.

  Args:
    valid_BGT: bool, True up to the caption's end; what stands after it does not matter.
    ngram: tokens of an n-gram.

  Returns:
    float32 [B, G].
  """
  assert tokens_BGT.shape == valid_BGT.shape and ngram >= 1, (
    tokens_BGT.shape,
    valid_BGT.shape,
    ngram,
  )
  windows = tokens_BGT.shape[-1] - ngram + 1
  if windows < 1:
    return jnp.zeros(tokens_BGT.shape[:-1], jnp.float32)
  whole_BGL = valid_BGT[..., ngram - 1 :]  # the window that begins here ends in the caption
  last = jnp.iinfo(tokens_BGT.dtype).max
  ngrams = [jnp.where(whole_BGL, tokens_BGT[..., i : i + windows], last) for i in range(ngram)]
  ngrams = jax.lax.sort(ngrams, dimension=-1, is_stable=False, num_keys=ngram)
  equal_BGL = jnp.stack([keys[..., 1:] == keys[..., :-1] for keys in ngrams]).all(0)
  repeats_BGL = jnp.pad(equal_BGL, ((0, 0), (0, 0), (1, 0)))
  return masked_mean(repeats_BGL, jnp.arange(windows) < whole_BGL.sum(-1, keepdims=True), axis=-1)


def stamp_table(texts: Sequence[bytes]) -> np.ndarray:
  r"""What `timestamp_reward` has to know of a vocabulary, from the bytes of each of its tokens.

  Each token becomes a few character classes: its whitespace runs become one, and runs of characters
  that no timestamp can hold become one. Such are not only letters: "::", "12345" and "[-" are in no
  match either, whatever the tokens around them. Whitespace is ASCII's (9-13, 28-32), digits too:
  Unicode's others, whose bytes tokens may split, count as letters here, while Python's `\s` and
  `\d` would match them.

  Args:
    texts: by token id; empty for special tokens and for ids without a token, which then leave no
    trace in the text.

  Returns:
    uint8 [V, X], padded on the right.
  """
  rows = [_reduce(text).translate(_CODE) for text in texts]
  table_VX = np.full((len(rows), max([1, *map(len, rows)])), _NOTHING, np.uint8)
  for row, classes in zip(table_VX, rows, strict=True):
    row[: len(classes)] = np.frombuffer(classes, np.uint8)
  return table_VX


def _reduce(text: bytes) -> bytes:
  text = re.sub(rb" +", b" ", text.translate(_SPELLING))
  # a neighbour of an impossible one may be impossible
  while (reduced := _IMPOSSIBLE.sub(b"x", text)) != text:
    text = reduced
  return re.sub(rb"x+", b"x", text)


def timestamp_reward(tokens_BGT: Array, valid_BGT: Array, table_VX: Array) -> Array:
  r"""How well a caption's timestamps are formed and ordered (CapRL++'s R_format,
  `compute_format_reward`).

  Timestamps are the matches of `\[(\d{1,3}):(\d{2})(?:\s*-\s*(\d{1,3}):(\d{2}))?\]`. One is valid
  with seconds up to 59, minutes up to 599, and an end, if any, not before its start. The reward is
  half the share of them that is valid, plus a half if there is a valid one and the starts of those
  never decrease; 0 without timestamps.

  Args:
    valid_BGT: bool, True up to the caption's end; what stands after it does not matter.
    table_VX: of `stamp_table`.

  Returns:
    float32 [B, G].
  """
  assert tokens_BGT.shape == valid_BGT.shape, (tokens_BGT.shape, valid_BGT.shape)
  match_BGL, valid_BGL, start_BGL = _stamps(_text(tokens_BGT, valid_BGT, table_VX))
  latest_BGL = jax.lax.cummax(jnp.where(valid_BGL, start_BGL, _BROKEN), axis=2)  # itself included
  in_order_BG = valid_BGL.any(-1) & (~valid_BGL | (start_BGL >= latest_BGL)).all(-1)
  return 0.5 * masked_mean(valid_BGL, match_BGL, axis=-1) + 0.5 * in_order_BG


def _text(tokens_BGT: Array, valid_BGT: Array, table_VX: Array) -> Array:
  """The caption's character classes without gaps, int32 [B, G, L]; the whitespace of two tokens
  that meet is one.
  """
  class_BGTX = jnp.where(valid_BGT[..., None], jnp.asarray(table_VX)[tokens_BGT], _NOTHING)
  class_BGL = class_BGTX.reshape(*tokens_BGT.shape[:-1], -1).astype(jnp.int32)
  # A place and its class in one number: a running maximum finds the class of the last character
  # before a place, and a sort moves what is dropped behind the rest.
  length = class_BGL.shape[-1]
  place_L = jnp.arange(length)

  def pack(place: Array | int, classes: Array | int) -> Array | int:
    return place << _CLASS_BITS | classes

  def unpack(packed: Array) -> Array:
    return packed & (1 << _CLASS_BITS) - 1

  last_BGL = jax.lax.cummax(jnp.where(class_BGL == _NOTHING, -1, pack(place_L, class_BGL)), axis=2)
  before_BGL = jnp.pad(unpack(last_BGL), ((0, 0), (0, 0), (1, 0)), constant_values=_NOTHING)[
    ..., :-1
  ]
  kept_BGL = (class_BGL != _NOTHING) & ~((class_BGL == _SPACE) & (before_BGL == _SPACE))
  packed_BGL = jnp.where(kept_BGL, pack(place_L, class_BGL), pack(length, _NOTHING))
  return unpack(jax.lax.sort(packed_BGL, is_stable=False))


def _stamps(text_BGL: Array) -> tuple[Array, Array, Array]:
  """Whether a timestamp begins at each place, whether it is valid, and its start in seconds; [B, G,
  L] each.

  The regex read from right to left: each array says of every place which time a certain rest of a
  timestamp holds that begins there.
  """
  space, dash, close = text_BGL == _SPACE, text_BGL == _DASH, text_BGL == _CLOSE
  # with the characters that each takes
  clocks = [(digits + 3, _clock(text_BGL, digits)) for digits in (1, 2, 3)]
  # "0:07]"
  end = _whichever([jnp.where(_ahead(close, n, False), clock, _ABSENT) for n, clock in clocks])
  tail = _whichever([end, jnp.where(space, _ahead(end, 1, _ABSENT), _ABSENT)])  # " 0:07]"
  tail = jnp.where(dash, _ahead(tail, 1, _ABSENT), _ABSENT)  # "- 0:07]"
  tail = _whichever([tail, jnp.where(space, _ahead(tail, 1, _ABSENT), _ABSENT)])  # " - 0:07]"

  starts, ends = [], []
  for n, clock in clocks:
    # Without an end it ends where it starts.
    stop = jnp.where(_ahead(close, n, False), clock, _ahead(tail, n, _ABSENT))
    starts.append(jnp.where(stop != _ABSENT, clock, _ABSENT))
    ends.append(jnp.where(clock != _ABSENT, stop, _ABSENT))
  start, end = _ahead(_whichever(starts), 1, _ABSENT), _ahead(_whichever(ends), 1, _ABSENT)
  match = (text_BGL == _OPEN) & (start != _ABSENT)
  return match, match & (start >= 0) & (start <= end), start


def _clock(text_BGL: Array, digits: int) -> Array:
  """Seconds of the "mm:ss" at each place whose minutes have so many digits; `_ABSENT`,
  `_BROKEN`.
  """
  numbers = [_ahead(text_BGL, i, _NOTHING) for i in range(digits + 3)]
  there = numbers.pop(digits) == _COLON
  there &= jnp.stack([number < 10 for number in numbers]).all(0)
  minutes = sum(number * 10 ** (digits - 1 - i) for i, number in enumerate(numbers[:digits]))
  seconds = 10 * numbers[-2] + numbers[-1]
  possible = (seconds < 60) & (minutes <= _MAX_MINUTES)
  return jnp.where(there, jnp.where(possible, 60 * minutes + seconds, _BROKEN), _ABSENT)


def _whichever(times: list[Array]) -> Array:
  """The time that is not absent; at most one can be there."""
  return jnp.stack(times).max(0)


def _ahead(x_BGL: Array, places: int, beyond: int) -> Array:
  """What stands `places` further, `beyond` where that is after the end."""
  return jnp.pad(x_BGL, ((0, 0), (0, 0), (0, places)), constant_values=beyond)[..., places:]
