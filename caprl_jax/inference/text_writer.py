"""Prompts -> texts of a language model without eyes: Prism's second stage. Letters: N prompts, L
prompt tokens, T new ones."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.hub.load import Loaded
from caprl_jax.hub.vocabulary import own_vocabulary
from caprl_jax.inference.host_batches import one_ahead
from caprl_jax.models.decoder import Decoder, head_matrix
from caprl_jax.models.policy import last_hidden
from caprl_jax.rl.sampling import SamplingConfig, decode
from caprl_jax.types import Array, Params, Vocabulary


class WrittenText(NamedTuple):
  """A text, and whether it ended by itself ("end") or was cut at max_tokens ("length")."""

  text: str
  finish: str


def write_texts(
  model: Decoder,
  params: Params,
  tokens_NL: Array,
  valid_NL: Array,
  key: Array,
  *,
  vocabulary: Vocabulary,
  cfg: SamplingConfig,
) -> tuple[Array, Array, Array]:
  """Goes on writing after each prompt: tokens and which are valid [N, T], and whether each ended
  [N]. The key is consumed."""
  N, L = tokens_NL.shape
  run = lambda tokens, position, valid, prefixes: model.apply(
    {"params": params},
    model.apply({"params": params}, tokens, method="embed"),
    position,
    valid,
    prefixes,
  )
  position = jnp.broadcast_to(jnp.arange(L), (N, L))
  hidden_NLD, prefix = run(tokens_NL, position, valid_NL, ())
  end = decode(
    run,
    head_matrix(model.cfg, params),
    last_hidden(hidden_NLD, valid_NL),
    valid_NL.sum(1),
    prefixes=(prefix,),
    vocabulary=vocabulary,
    key=key,
    cfg=cfg,
  )
  return end.tokens_NT, end.valid_NT, end.done_N


class TextWriter:
  """A language model that goes on after prompts, one compiled program per bucket of lengths."""

  def __init__(
    self,
    loaded: Loaded,
    cfg: SamplingConfig,
    *,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    seed: int,
    share: tuple[int, int] = (0, 1),
  ):
    """share: which of the batches are written, as (first, of): each of several processes, which
    are asked the same, writes its own."""
    self.loaded, self.batch_size, self.mesh, self.seed = loaded, batch_size, mesh, seed
    self.share = share
    size, ends = loaded.model.cfg.vocab_size, loaded.tokenizer.end_ids
    if not ends:
      raise ValueError(
        "the answering model's files name no end token: it would never stop; "
        "add eos_token_id to config.json"
      )
    vocabulary = own_vocabulary(np.arange(size) < loaded.tokenizer.vocab_size, ends)
    self._run = jax.jit(
      functools.partial(write_texts, loaded.model, vocabulary=vocabulary, cfg=cfg)
    )

  def __call__(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, WrittenText]]]:
    """Yields (number of the prompt, its text) batch by batch, prompts of like length together."""
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    first, of = self.share
    batches = (
      (start, order[start : start + self.batch_size])
      for start in range(first * self.batch_size, len(order), of * self.batch_size)
    )
    dispatch = lambda batch: self._dispatch(batch[0], [prompts[n] for n in batch[1]])
    for (_, members), texts in one_ahead(batches, dispatch):
      yield self._fetch(members, texts)

  def _dispatch(self, start: int, prompts: Sequence[Sequence[int]]) -> tuple[Array, ...]:
    """Begins to write after a batch of prompts; `start` makes its random key its own."""
    L = length_bucket(max(map(len, prompts)))
    tokens, valid = np.zeros((self.batch_size, L), np.int32), np.zeros((self.batch_size, L), bool)
    for n in range(self.batch_size):
      ids = prompts[min(n, len(prompts) - 1)]  # a batch is filled up with its last prompt
      tokens[n, : len(ids)], valid[n, : len(ids)] = ids, True
    key = jax.random.fold_in(jax.random.key(self.seed), start)
    return self._run(self.loaded.params, *sharding.put_batch((tokens, valid), self.mesh), key)

  def _fetch(self, members: list[int], out) -> list[tuple[int, WrittenText]]:
    tokens_NT, valid_NT, done_N = jax.device_get(out)
    decode_ids = self.loaded.tokenizer.decode_written
    return [
      (
        number,
        WrittenText(
          decode_ids(tokens_NT[n][valid_NT[n]].tolist()), "end" if done_N[n] else "length"
        ),
      )
      for n, number in enumerate(members)
    ]


def length_bucket(length: int) -> int:
  """The length rounded up by at most a quarter, so that few programs are compiled."""
  step = max(16, 1 << max(length.bit_length() - 3, 0))
  return -(-length // step) * step
