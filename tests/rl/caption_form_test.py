"""Length, repetition and timestamps of captions against the same formulas in Python on texts."""

import random
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import qwen_vocabulary

from caprl_jax.rl.caption_form import length_reward, repetition, stamp_table, timestamp_reward

# of CapRL++'s serve_rm.py
STAMP = re.compile(r"\[(\d{1,3}):(\d{2})(?:\s*-\s*(\d{1,3}):(\d{2}))?\]")
ALPHABET = "[]:-0123456789 \n\ta"
TIMED = [
  ("", 0.0),
  ("a red circle", 0.0),
  ("[00:00]", 1.0),
  ("[00:05] [00:03]", 0.5),
  ("[00:61]", 0.0),
  ("[00:03] a [00:03] [00:05]", 1.0),
  ("[00:05][00:61]", 0.75),
  ("[00:05] [00:61] [00:03]", 1 / 3),
  ("[00:03] [00:99] [00:02 - 00:01] [00:05]", 0.75),
  ("[00:09 - 00:01] [00:05]", 0.75),
  ("[599:59]", 1.0),
  ("[600:00]", 0.0),
  ("[0:00-600:00]", 0.0),
  ("[0:00-599:59]", 1.0),
  ("[1:00] [0:59]", 0.5),
  ("[1:02 - 1:02]", 1.0),
  ("[1:02 - 1:01]", 0.0),
  ("[1:02 - 1:61]", 0.0),
  ("[1:62 - 1:03]", 0.0),
  ("[1:02-1:03]", 1.0),
  ("[001:02  -\n\t 01:03]", 1.0),
  ("[1:02 1:03]", 0.0),
  ("[1:02 - - 1:03]", 0.0),
  ("[1:02 - ]", 0.0),
  ("[1:02 -1:03 ]", 0.0),
  ("[ 1:02]", 0.0),
  ("[1:02 ]", 0.0),
  ("[1: 02]", 0.0),
  ("[1:02\x1c-\x0b1:03]", 1.0),
  ("[0001:02]", 0.0),
  ("[1234567:02]", 0.0),
  ("[1:2]", 0.0),
  ("[1:023]", 0.0),
  (":::[1:02]:::", 1.0),
  ("[1::02]", 0.0),
  ("[[1:02]]", 1.0),
  ("[1:02", 0.0),
  ("1:02]", 0.0),
  ("[1:02]-[1:01]", 0.5),
  ("[1:02 - 1:03 - 1:04]", 0.0),
  ("[1:02 a 1:03]", 0.0),
  ("[12:34:56]", 0.0),
  ("[12", 0.0),
  ("[", 0.0),
  ("[00:00 - ", 0.0),
  ("[00:00 -", 0.0),
  ("[00:00 ", 0.0),
  ("[00:00", 0.0),
  ("[00:05] [", 1.0),
  ("[00:05] [0:07", 1.0),
  ("[00:05] [0:07 -", 1.0),
  ("東[00:05]京 é[00:03]", 0.5),
]


def plain_timestamp_reward(text: str) -> float:
  count, starts = 0, []
  for match in STAMP.finditer(text):
    count += 1
    minute, second, *end = [None if group is None else int(group) for group in match.groups()]
    if second > 59 or minute > 599:
      continue
    if end[0] is not None and (
      end[1] > 59 or end[0] > 599 or 60 * end[0] + end[1] < 60 * minute + second
    ):
      continue
    starts.append(60 * minute + second)
  return 0.5 * len(starts) / max(count, 1) + 0.5 * (bool(starts) and sorted(starts) == starts)


def plain_repetition(tokens: list[int], n: int) -> float:
  ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
  return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def padded(
  captions: Sequence[Sequence[int]], group: int, vocab_size: int, length: int | None = None
):
  """Tokens [B, G, T] with random ones after each caption's end, and which are the caption's."""
  length = length or max(map(len, captions))
  tokens = (
    np.random.RandomState(0).randint(-1, vocab_size, (len(captions), length)).astype(np.int32)
  )
  for row, caption in zip(tokens, captions, strict=True):
    row[: len(caption)] = caption
  valid = np.arange(length) < np.array([len(caption) for caption in captions])[:, None]
  return tokens.reshape(-1, group, length), valid.reshape(-1, group, length)


def rewards_of(
  captions: Sequence[Sequence[bytes]], group: int = 1, length: int | None = None
) -> np.ndarray:
  """The timestamp reward of captions, given as their tokens' bytes, in a vocabulary of these tokens
  and no others.
  """
  texts = sorted({text for caption in captions for text in caption} | {b"[00:09]"})
  ids = {text: i for i, text in enumerate(texts)}
  tokens, valid = padded(
    [[ids[text] for text in caption] for caption in captions], group, len(texts), length
  )
  return np.asarray(jax.jit(timestamp_reward)(tokens, valid, stamp_table(texts))).reshape(-1)


def cut(text: bytes, rng: random.Random, longest: int) -> list[bytes]:
  """The text in random pieces; empty ones among them, as special tokens are."""
  pieces = []
  while text:
    length = rng.randint(1, longest)
    pieces += [text[:length]] + [b""] * (rng.random() < 0.1)
    text = text[length:]
  return pieces


def stamp(rng: random.Random) -> str:
  """A timestamp as likely right as wrong."""

  def clock() -> str:
    left = rng.choice([rng.randrange(4), rng.randrange(100), rng.randrange(1100)])
    digits = rng.randint(1, 3)
    return f"{left:0{digits}}:{rng.randrange(70 if rng.random() < 0.3 else 60):02}"

  gap = lambda: rng.choice(["", "", " ", " ", "\n ", "\t"])
  text = f"[{clock()}{gap()}-{gap()}{clock()}]" if rng.random() < 0.5 else f"[{clock()}]"
  while rng.random() < 0.2:
    at = rng.randrange(len(text))
    text = (
      text[:at] + "".join(rng.choices(ALPHABET, k=rng.randrange(3))) + text[at + rng.randrange(2) :]
    )
  return text


def captions_at_random(count: int, seed: int) -> list[str]:
  """Timestamps with noise between them, and every fourth nothing but noise."""
  rng = random.Random(seed)
  noise = lambda k: "".join(rng.choices(ALPHABET, k=rng.randrange(k)))
  return [
    noise(60)
    if i % 4 == 3
    else noise(4) + "".join(stamp(rng) + noise(4) for _ in range(rng.randrange(1, 5)))
    for i in range(count)
  ]


@pytest.mark.parametrize(
  "length, expected",
  [(0, 1), (1, 1), (2048, 1), (2560, 0.5), (2304, 0.75), (3072, 0), (3073, 0), (9999, 0)],
)
def test_length_reward_falls_from_one_to_zero(length, expected):
  got = jax.jit(length_reward, static_argnums=(1, 2))(jnp.full((2, 3), length), 2048, 3072)
  assert got.shape == (2, 3) and got.dtype == jnp.float32
  np.testing.assert_allclose(got, expected, atol=1e-7)


def test_length_reward_is_one_plus_the_soft_overlong_punishment():
  limit, buffer = 20480, 4096
  length = np.arange(0, 25000, 100)
  punishment = np.where(
    length <= limit - buffer, 0, np.where(length > limit, -1, (limit - buffer - length) / buffer)
  )
  np.testing.assert_allclose(
    length_reward(jnp.asarray(length)[None], limit - buffer, limit)[0], 1 + punishment, atol=1e-6
  )


def test_length_reward_wants_room_to_fall():
  with pytest.raises(AssertionError):
    length_reward(jnp.zeros((1, 1)), 10, 10)


@pytest.mark.parametrize(
  "tokens, ngram, expected",
  [
    ([7] * 6, 4, 2 / 3),
    ([7] * 6, 1, 5 / 6),
    ([1, 2, 3, 1, 2, 3, 1, 2, 3], 3, 4 / 7),
    ([1, 2, 3, 4], 4, 0),
    ([7, 7, 7], 4, 0),
    ([], 1, 0),
    ([5, 6, 5, 6], 2, 1 / 3),
    ([5, 6, 6, 5, 6], 2, 1 / 4),
    ([1, 2, 2, 1], 2, 0),
  ],
)
def test_repetition_by_hand(tokens, ngram, expected):
  got = jax.jit(repetition, static_argnums=2)(*padded([tokens], 1, 9, length=9), ngram)
  np.testing.assert_allclose(got, [[expected]], rtol=1e-6)
  np.testing.assert_allclose(plain_repetition(tokens, ngram), expected)


@pytest.mark.parametrize("ngram", [1, 2, 3, 4])
def test_repetition_is_that_of_sets_of_ngrams(ngram):
  rng = random.Random(ngram)
  captions = [rng.choices(range(rng.choice([2, 3, 20])), k=rng.randint(0, 24)) for _ in range(300)]
  tokens, valid = padded(captions, 4, 3, length=24)
  got = jax.jit(repetition, static_argnums=2)(tokens, valid, ngram)
  assert got.shape == (75, 4) and got.dtype == jnp.float32
  expected = [plain_repetition(caption, ngram) for caption in captions]
  np.testing.assert_allclose(np.ravel(got), expected, atol=1e-6)
  assert len(set(expected)) > 20


def test_repetition_counts_four_tokens_unless_told():
  np.testing.assert_allclose(jax.jit(repetition)(*padded([[7] * 6], 1, 9)), [[2 / 3]], rtol=1e-6)


def test_repetition_where_no_caption_can_hold_an_ngram():
  np.testing.assert_array_equal(repetition(*padded([[7, 7, 7], [7]], 2, 9), 4), [[0, 0]])


@pytest.mark.parametrize("longest", [1, 2, 5, 30])
def test_timestamps_by_hand(longest):
  rng = random.Random(longest)
  texts = [text for text, _ in TIMED]
  got = rewards_of([cut(text.encode(), rng, longest) for text in texts])
  np.testing.assert_allclose(
    [plain_timestamp_reward(text) for text in texts], [reward for _, reward in TIMED]
  )
  for text, reward, (_, expected) in zip(texts, got, TIMED, strict=True):
    np.testing.assert_allclose(reward, expected, rtol=1e-6, err_msg=repr(text))


def test_nothing_is_read_beyond_the_last_place():
  # Every text ends where the room does: as many tokens as fit, with one class each.
  longest = max(len(text) for text, _ in TIMED)
  texts = [text.rjust(longest, "x") for text, _ in TIMED]
  vocabulary = sorted({character for text in texts for character in text})
  table = stamp_table([character.encode() for character in vocabulary])
  assert table.shape[1] == 1
  tokens = np.array([[[vocabulary.index(character) for character in text] for text in texts]])
  got = jax.jit(timestamp_reward)(tokens, np.ones(tokens.shape, bool), table)
  np.testing.assert_allclose(got, [[expected for _, expected in TIMED]], rtol=1e-6)


@pytest.mark.parametrize("longest", [1, 2, 3, 6, 12])
def test_timestamps_of_random_texts_in_random_tokens(longest):
  rng = random.Random(longest)
  texts = captions_at_random(400, seed=longest)
  got = rewards_of([cut(text.encode(), rng, longest) for text in texts], group=8, length=140)
  expected = [plain_timestamp_reward(text) for text in texts]
  for text, reward, plain in zip(texts, got, expected, strict=True):
    np.testing.assert_allclose(reward, plain, atol=1e-6, err_msg=repr(text))
  some = [0 < reward < 1 for reward in expected]
  assert min(sum(some), expected.count(0), expected.count(1)) > 40


def test_runs_that_a_token_boundary_splits():
  captions = [
    [":", "::"],
    ["[1", ":", ":", "02]"],
    ["[1:0", "2]"],
    ["[1:02 ", " - ", " ", "1:03]"],
    ["[1:02", " ", "", " ", "-1:03]"],
    ["[123", "4:02]"],
    ["[1", "2", "3", "4:02]"],
    ["[", "12345", ":02]"],
    ["[0", "1:0", "23]"],
    ["[1:02 -", "- 1:03]"],
    ["[1:02 ", "- 1:03]"],
    ["[a ", " 1:02]"],
    ["[1:02\n", "\n", "\n", "-1:03]"],
    ["[1:02] ", "- [1:03", "]"],
    ["[", "", "1:02]"],
    ["a[", "1:02]"],
    ["[1:02", "--", "1:03]"],
    ["[1:02", "]]"],
    ["[", "[1:02]"],
    ["[1:02-", "1", ":0", "3", "]x"],
    ["[1 ", ":02]"],
  ]
  got = rewards_of([[piece.encode() for piece in pieces] for pieces in captions])
  for pieces, reward in zip(captions, got, strict=True):
    np.testing.assert_allclose(
      reward, plain_timestamp_reward("".join(pieces)), err_msg=repr(pieces)
    )


def test_what_follows_the_end_does_not_matter():
  texts = [b"[00:05", b"]", b"[00:03]", b"a"]
  tokens = np.array([[[0, 1, 3, 2, 2], [0, 1, 2, 2, 0], [0, 1, 0, 1, 3], [0, 1, -1, 9, 1]]])
  valid = np.arange(5) < np.array([3, 2, 1, 2])[:, None]
  reward = jax.jit(timestamp_reward)
  np.testing.assert_allclose(reward(tokens, valid[None], stamp_table(texts)), [[1, 1, 0, 1]])
  np.testing.assert_allclose(
    reward(tokens, np.ones((1, 4, 5), bool), stamp_table(texts))[0, :3], [0.5, 0.5, 1]
  )


def test_one_program_serves_every_caption():
  table = stamp_table([b"[00:0", b"5]", b"3]", b" "])
  traces = []

  @jax.jit
  def terms(tokens, valid):
    traces.append(tokens.shape)
    return (
      timestamp_reward(tokens, valid, table),
      repetition(tokens, valid),
      length_reward(valid.sum(-1), 2, 6),
    )

  rng = np.random.RandomState(0)
  for _ in range(3):
    stamps, repeated, short = terms(
      rng.randint(0, 4, (2, 3, 8)), np.arange(8) < rng.randint(0, 9, (2, 3, 1))
    )
    for term in (stamps, repeated, short):
      assert term.shape == (2, 3) and term.dtype == jnp.float32
  assert len(traces) == 1


def test_table_holds_few_classes_a_token():
  table = stamp_table(
    [
      b"",
      b"abc, def",
      b"\n\n   \t",
      b"[[[[[",
      b"::",
      b"-----",
      b"12345678",
      b"a[0",
      b"]:",
      b" - ",
      "東京".encode(),
      b"a12:30 b",
    ]
  )
  assert table.dtype == np.uint8
  nothing, other, space, opening, dash = 16, 15, 14, 10, 13
  expected = [
    [],
    [other],
    [space],
    [other, opening],
    [other],
    [other],
    [other],
    [other, opening, 0],
    [11, other],
    [space, dash, space],
    [other],
    [other],
  ]
  assert [[c for c in row if c != nothing] for row in table.tolist()] == expected
  assert stamp_table([b"", b""]).shape == (2, 1)


def test_timestamps_in_the_real_qwen_vocabulary():
  ranks = qwen_vocabulary.read_ranks()
  table = stamp_table(sorted(ranks, key=ranks.__getitem__))  # the ranks are 0, 1, 2, ...
  assert table.shape == (151643, 3)
  texts = (
    [text for text, _ in TIMED]
    + captions_at_random(150, seed=0)
    + [
      "[00:00 - 00:04] A man walks in.\n\n[00:04-00:09] He sits; [0:10] he reads [1].",
      "- [12:34 - 12:40]: the ball (3:2) falls -- [13:00]\n- [12:59] it stops.",
    ]
  )
  captions = [
    [ranks[token] for token in qwen_vocabulary.bpe(text.encode(), ranks)] for text in texts
  ]
  got = jax.jit(timestamp_reward)(*padded(captions, 1, len(table)), table)
  for text, reward in zip(texts, np.ravel(got), strict=True):
    np.testing.assert_allclose(reward, plain_timestamp_reward(text), atol=1e-6, err_msg=repr(text))
