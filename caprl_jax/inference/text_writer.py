"""Prompts -> texts of a language model without eyes, here or behind an endpoint: Prism's second
stage. Letters: L prompt tokens."""

import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from caprl_jax.hub.load import Loaded
from caprl_jax.hub.vocabulary import own_vocabulary
from caprl_jax.inference.endpoint import Endpoint, EndpointConfig
from caprl_jax.inference.engine.engine import Asked, Engine, EngineConfig, Listed
from caprl_jax.inference.engine.programs import EngineModel, Request
from caprl_jax.inference.engine.slots import Written
from caprl_jax.rl.sampling import SamplingConfig
from caprl_jax.types import Prompts

log = logging.getLogger("caprl_jax.inference.text_writer")


class WrittenText(NamedTuple):
  """A text, and whether it ended by itself ("end") or was cut at max_tokens ("length")."""

  text: str
  finish: str


class TextWriter:
  """A language model that goes on after prompts. Whenever a text has ended, the next prompt takes
  its place (`engine/`)."""

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
    """batch_size: texts that are written at once. share: which of the prompts are gone on from, as
    (first, of), some neighbours at a time: each of several processes, which are asked the same,
    writes its own."""
    self.loaded, self.share = loaded, share
    self.mesh = mesh
    size, ends = loaded.model.cfg.vocab_size, loaded.tokenizer.end_ids
    if not ends:
      raise ValueError(
        "the answering model's files name no end token: it would never stop; "
        "add eos_token_id to config.json"
      )
    engine_cfg = EngineConfig(batch_size, 1, cfg)
    self._engine = Engine(
      EngineModel.of_decoder(loaded.model),
      loaded.params,
      engine_cfg,
      vocabulary=own_vocabulary(np.arange(size) < loaded.tokenizer.vocab_size, ends),
      mesh=mesh,
      seed=seed,
    )
    self._together = engine_cfg.prefilled(self._engine.shards)
    self._ends = ends

  def __call__(
    self, prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None = None
  ) -> Iterator[list[tuple[int, WrittenText]]]:
    """Yields (place of the prompt, its text) as they end, shorter prompts first.

    Args:
      numbers: of each prompt's random key, int32; a text depends on the seed, its prompt and its
        number alone. None: their places.
    """
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    first, of = self.share
    together = self._together
    batches = (
      order[start : start + together]
      for start in range(first * together, len(order), of * together)
    )
    asked = (self._asked(batch, prompts, numbers or range(len(prompts))) for batch in batches)
    for found in self._engine(Listed(asked)):
      yield [(one.item, self._written(one)) for one in found]

  def _asked(
    self, members: list[int], prompts: Sequence[Sequence[int]], numbers: Sequence[int]
  ) -> Asked[int]:
    """Prompts padded to one length; what is missing to their number is the last one again."""
    L = length_bucket(max(len(prompts[n]) for n in members))
    rows = members + members[-1:] * (self._together - len(members))
    tokens: Any = np.zeros((len(rows), L), np.int32)
    valid: Any = np.zeros((len(rows), L), bool)
    for b, n in enumerate(rows):
      tokens[b, : len(prompts[n])], valid[b, : len(prompts[n])] = prompts[n], True
    position: Any = np.zeros((len(rows), 3, 0), np.int32)  # is counted on the device
    after: Any = valid.sum(1).astype(np.int32)
    number: Any = np.array([numbers[n] for n in rows], np.int32)
    return Asked(members, Request(None, Prompts(tokens, valid, position, after), number))

  def _written(self, one: Written[int]) -> WrittenText:
    text = self.loaded.tokenizer.decode_written(one.ids)
    return WrittenText(text, "end" if one.ids[-1] in self._ends else "length")


class ServedWriter:
  """As `TextWriter`, of a model behind an endpoint, which knows no seeds. Its connections close
  when it is dropped.

  Raises ValueError as `Endpoint` and its `check`.
  """

  def __init__(self, section: EndpointConfig, share: tuple[int, int] = (0, 1)):
    """share: as of `TextWriter`."""
    self.share, self._endpoint = share, Endpoint(section)
    weakref.finalize(self, self._endpoint.close)
    self._endpoint.check()

  def __call__(
    self, prompts: Sequence[tuple[str, str]], numbers: Sequence[int] | None = None
  ) -> Iterator[list[tuple[int, WrittenText | None]]]:
    """Yields (place of the prompt, its text, None where the request failed) as they end.

    Args:
      prompts: a system turn, "" for none, and a user's.

    Raises ValueError where too many requests in a row fail (`Endpoint.ask_all`).
    """
    del numbers
    first, of = self.share
    requests = ((n, *prompts[n], None) for n in range(first, len(prompts), of))
    for number, reply in self._endpoint.ask_all(requests):
      if reply.text is None:
        log.warning("no answer, which is left out: %s", reply.error)
        yield [(number, None)]
      else:
        finish = "length" if reply.finish == "length" else "end"
        yield [(number, WrittenText(reply.text, finish))]


def length_bucket(length: int) -> int:
  """The length rounded up by at most a quarter, so that few programs are compiled."""
  step = max(16, 1 << max(length.bit_length() - 3, 0))
  return -(-length // step) * step
