"""Images with questions -> how a captioner's own model answers them, with the image and without:
CapRL's QA filter.

The image and all that stands before it run once; every question in every order of its options
branches from there, and the answer is read from the logits of the letters. Letters: B images, M
presentations per image, L tokens of one, A letters.
"""

import abc
import dataclasses
import functools
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.data.batches import ImagePrompt, ImageShape, stack
from caprl_jax.data.question_texts import orders, question_text
from caprl_jax.data.rows import QARow, Question
from caprl_jax.hub.load import Loaded
from caprl_jax.hub.tokenizer import Tokenizer
from caprl_jax.inference.host_batches import HostBatch, HostPipeline, one_ahead
from caprl_jax.models.attention import Prefix
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.policy import Policy, last_hidden
from caprl_jax.types import Array, Images, Params, Prompts

MAX_OPTIONS = 10
TOKENS_STEP = 32  # presentations are padded to a multiple of this


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
  """How multiple-choice questions are asked about images.

  protocol: `letters`: the likeliest letter is the answer, read from logits; `official`, the
    released curation's: the options are shuffled anew each time, up to 4 tokens are sampled at
    temperature 0.1 with a repetition penalty of 1.05, and the answer is right if the right letter
    is anywhere in them.
  permutations: orders in which each question's options are shown; with `letters` each is rotated by
    one place, so that the right one visits different letters.
  none_of_above: one more option where the image is shown, as released.
  questions_per_row: questions that share one run of an image; an image with more is run several
    times.
  batch_size: images per program.
  """

  protocol: Literal["letters", "official"] = "letters"
  permutations: int = 4
  none_of_above: bool = True
  questions_per_row: int = 5
  batch_size: int = 8

  def __post_init__(self):
    if min(self.permutations, self.questions_per_row, self.batch_size) < 1:
      raise ValueError(
        f"permutations = {self.permutations}, questions_per_row = "
        f"{self.questions_per_row} and batch_size = {self.batch_size} must be at "
        "least 1"
      )


@dataclasses.dataclass(frozen=True)
class VqaAnswer:
  """How one question was answered, over all permutations: shares right with the image and without
  it, and the mean probabilities of the right letter among those shown. visual_right, blind_right: 1
  or 0 for each permutation. error: why it was not asked.
  """

  visual: float = 0.0
  blind: float = 0.0
  visual_prob: float = 0.0
  blind_prob: float = 0.0
  error: str = ""
  visual_right: Sequence[int] = ()
  blind_right: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class VqaResult:
  """A numbered row with the answers to its questions, or the error for which none was asked."""

  number: int
  row: QARow
  answers: list[VqaAnswer] = dataclasses.field(default_factory=list)
  error: ValueError | None = None


@dataclasses.dataclass(frozen=True)
class _Ask:
  """Some of a row's questions, the one numbered `first` and on: what runs after one image."""

  number: int
  row: QARow
  first: int
  questions: tuple[Question, ...]


class _ReadyAsk(NamedTuple):
  """An ask for the device: image and prompt, and the token ids of its presentations with the image
  and without it, None for what cannot be shown.
  """

  example: tuple[Images, Prompts]
  shown: list[list[int] | None]
  blind: list[list[int] | None]


def branch(
  policy: Policy,
  params: Params,
  images: Images | None,
  prompts: Prompts | None,
  tokens_BML: Array,
  valid_BML: Array,
) -> tuple[Array, Array, tuple[Prefix, ...]]:
  """Runs an image once, None for none, and all M presentations after it.

  Returns what predicts the token after each presentation [B * M, D], that token's position [B * M],
  and the prefixes that it follows: the image's, then the presentations' own.
  """
  B, M, L = tokens_BML.shape
  start_B, prefixes = jnp.zeros(B, jnp.int32), ()
  if images is not None:
    _, image = policy.apply({"params": params}, images, prompts, method="prefill")
    start_B, prefixes = prompts.next_position_B, (image,)
  tokens_NL, valid_NL, start_N = (
    tokens_BML.reshape(B * M, L),
    valid_BML.reshape(B * M, L),
    jnp.repeat(start_B, M),
  )
  hidden_NLD, own = policy.apply(
    {"params": params},
    tokens_NL,
    start_N[:, None] + jnp.arange(L),
    valid_NL,
    prefixes,
    method="extend",
  )
  return last_hidden(hidden_NLD, valid_NL), start_N + valid_NL.sum(1), (*prefixes, own)


def letter_logits(
  policy: Policy,
  params: Params,
  images: Images | None,
  prompts: Prompts | None,
  tokens_BML: Array,
  valid_BML: Array,
  letters_A: Array,
) -> Array:
  """Logits of the letters after each presentation, float32 [B, M, A]; the image, if any, runs once
  for all M.
  """
  hidden_ND, _, _ = branch(policy, params, images, prompts, tokens_BML, valid_BML)
  head_AD = head_matrix(policy.cfg.text, params["language_model"])[letters_A]
  logits = jnp.einsum("nd,ad->na", hidden_ND.astype(jnp.float32), head_AD.astype(jnp.float32))
  return logits.reshape(*tokens_BML.shape[:2], -1)


def letter_ids(tokenizer: Tokenizer) -> np.ndarray:
  """Ids of the letters A, B, ...; raises ValueError where one is no single token."""
  ids = [tokenizer.encode_plain(letter) for letter in string.ascii_uppercase[: MAX_OPTIONS + 1]]
  if any(len(found) != 1 for found in ids):
    raise ValueError(
      "the model's tokenizer has no single token for each of the letters A to K: it "
      "cannot be asked for them"
    )
  return np.array([found[0] for found in ids], np.int32)


class VqaRunner(abc.ABC):
  """Shows a model the questions of many images, with the image and without it, and judges what it
  makes of them. A context manager: it has threads."""

  presentations = 1  # of each question
  blind = True  # ask without the image, too

  def __init__(self, loaded: Loaded, cfg: AnswerConfig, mesh: jax.sharding.Mesh, seed: int):
    self.loaded, self.cfg, self.mesh, self.seed = loaded, cfg, mesh, seed
    self.specials = [self._specials(self._ids("x", with_image)) for with_image in (False, True)]
    self._before = loaded.prompt_pieces("x")[0]
    self._host = HostPipeline(loaded.model.cfg, cfg.batch_size)

  @abc.abstractmethod
  def texts(self, question: Question, with_image: bool) -> list[str]:
    """What the user says, for each presentation."""

  @abc.abstractmethod
  def run(
    self,
    images: Images | None,
    prompts: Prompts | None,
    tokens_BML: Array,
    valid_BML: Array,
    place_B2: Array,
  ) -> Array:
    """What the model makes of each presentation, [B, M, ...].

    Args:
      place_B2: int32, number of the row and of its first question that is asked, for random draws.
    """

  @abc.abstractmethod
  def verdict(self, question: Question, visual: np.ndarray, blind: np.ndarray | None) -> VqaAnswer:
    """Of what `run` gave for a question's presentations, with the image and without it (None where
    that is not asked)."""

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *failure) -> None:
    self._host.close()

  def __call__(self, rows: Iterable[tuple[int, QARow]]) -> Iterator[list[VqaResult]]:
    """Asks all questions of numbered rows; yields rows as the last of their questions is answered,
    those first that have none. One whose image cannot be read has an error."""
    rows = list(rows)
    silent = [VqaResult(number, row) for number, row in rows if not row.questions]
    if silent:
      yield silent
    buckets, unreadable = self._host.bucket([item for item in rows if item[1].questions])
    if unreadable:
      yield [VqaResult(number, row, error=error) for (number, row), error in unreadable]
    asks = {shape: self._asks(members) for shape, members in buckets.items()}
    answers = {
      ask.number: [None] * len(ask.row.questions) for members in asks.values() for ask in members
    }
    batches = self._host.batches(asks, self._prepare)
    for batch, readings in one_ahead(batches, self._dispatch):
      yield self._collect(batch, readings, answers)

  def _asks(self, rows: Iterable[tuple[int, QARow]]) -> list["_Ask"]:
    step = self.cfg.questions_per_row
    return [
      _Ask(number, row, first, row.questions[first : first + step])
      for number, row in rows
      for first in range(0, len(row.questions), step)
    ]

  def _prepare(self, shape: ImageShape, ask: "_Ask") -> "_ReadyAsk":
    # Presentations bring what follows the image.
    example = ImagePrompt(self.loaded.model.cfg, (self._before, []), shape)(ask.row)
    shown, blind = (self._presentations(ask.questions, sight) for sight in (True, False))
    return _ReadyAsk(example, shown, blind)

  def _dispatch(self, batch: HostBatch["_Ask", "_ReadyAsk"]) -> tuple[Array, Array | None] | None:
    """Begins to ask a batch with the images and without them; None where all images failed."""
    if not batch.items:
      return None
    images, prompts = stack([ready.example for ready in batch.ready])
    places = [(ask.number, ask.first) for ask in batch.items]
    fillers = len(batch.ready) - len(places)
    place_B2 = np.array(places + places[-1:] * fillers, np.int32)
    shown, blind = ([ready.shown for ready in batch.ready], [ready.blind for ready in batch.ready])
    return (
      self._run(shown, place_B2, images, prompts),
      self._run(blind, place_B2) if self.blind else None,
    )

  def _collect(
    self,
    batch: HostBatch["_Ask", "_ReadyAsk"],
    readings: tuple[Array, Array | None] | None,
    answers: dict[int, list[VqaAnswer | None]],
  ) -> list[VqaResult]:
    """Puts a batch's answers in their places; gives the rows of which nothing is left to ask, which
    leave `answers`. An image that failed is given once, though several asks may be of it.
    """
    finished = [
      VqaResult(ask.number, ask.row, error=error)
      for ask, error in batch.failed
      if answers.pop(ask.number, None) is not None
    ]
    visual, blind = jax.device_get(readings) if batch.items else ((), ())
    for b, (ask, ready) in enumerate(zip(batch.items, batch.ready)):
      if ask.number not in answers:
        continue
      for k, question in enumerate(ask.questions):
        unseen = blind[b] if self.blind else None
        answers[ask.number][ask.first + k] = self._verdict(question, k, ready, visual[b], unseen)
      if None not in answers[ask.number]:
        finished.append(VqaResult(ask.number, ask.row, answers.pop(ask.number)))
    return finished

  def _presentations(
    self, questions: Sequence[Question], with_image: bool
  ) -> list[list[int] | None]:
    """Token ids of each question's presentations; None for one that cannot be shown. Those after
    the image only, if any."""
    shown: list[list[int] | None] = []
    for text in (text for question in questions for text in self.texts(question, with_image)):
      try:
        ids = self._ids(text, with_image)
      except ValueError:  # it spells the image's token
        ids = None
      # One special token more than the template's own, and the question has closed the turn.
      shown.append(ids if ids and self._specials(ids) == self.specials[with_image] else None)
    return shown

  def _ids(self, text: str, with_image: bool) -> list[int]:
    return self.loaded.prompt_pieces(text)[1] if with_image else self.loaded.text_prompt(text)

  def _specials(self, ids: Sequence[int]) -> int:
    return sum(token in self.loaded.tokenizer.special_ids for token in ids)

  def _run(
    self,
    shown: Sequence[Sequence[list[int] | None]],
    place_B2: np.ndarray,
    images: Images | None = None,
    prompts: Prompts | None = None,
  ) -> Array:
    M = self.cfg.questions_per_row * self.presentations
    longest = max((len(ids) for row in shown for ids in row if ids), default=1)
    L = -(-longest // TOKENS_STEP) * TOKENS_STEP
    tokens, valid = np.zeros((len(shown), M, L), np.int32), np.zeros((len(shown), M, L), bool)
    # Nobody reads what becomes of a filler; one like the others ends no later than they.
    filler = next((ids for row in shown for ids in row if ids), [0])
    for b, row in enumerate(shown):
      for m, ids in enumerate([*row, *[None] * (M - len(row))]):
        ids = ids or filler
        tokens[b, m, : len(ids)], valid[b, m, : len(ids)] = ids, True
    return self.run(*sharding.put_batch((images, prompts, tokens, valid, place_B2), self.mesh))

  def _verdict(
    self,
    question: Question,
    k: int,
    ready: "_ReadyAsk",
    visual_M: np.ndarray,
    blind_M: np.ndarray | None,
  ) -> VqaAnswer:
    its = slice(k * self.presentations, (k + 1) * self.presentations)
    if None in ready.shown[its] or None in ready.blind[its]:
      return VqaAnswer(error="it spells a token of the chat template")
    return self.verdict(question, visual_M[its], None if blind_M is None else blind_M[its])


class Answerer(VqaRunner):
  """A model that answers questions by letter. Raises ValueError as `letter_ids`."""

  def __init__(self, loaded: Loaded, cfg: AnswerConfig, mesh: jax.sharding.Mesh, seed: int):
    self.letters_A = jax.device_put(letter_ids(loaded.tokenizer), sharding.replicated(mesh))
    self._logits = jax.jit(functools.partial(letter_logits, loaded.model))
    self.presentations = cfg.permutations
    super().__init__(loaded, cfg, mesh, seed)

  def texts(self, question: Question, with_image: bool) -> list[str]:
    return [
      question_text(question, order, with_image and self.cfg.none_of_above)
      for order in orders(question, self.cfg.permutations, self.seed)
    ]

  def run(
    self,
    images: Images | None,
    prompts: Prompts | None,
    tokens_BML: Array,
    valid_BML: Array,
    place_B2: Array,
  ) -> Array:
    del place_B2  # nothing is drawn
    return self._logits(self.loaded.params, images, prompts, tokens_BML, valid_BML, self.letters_A)

  def verdict(self, question: Question, visual: np.ndarray, blind: np.ndarray | None) -> VqaAnswer:
    assert blind is not None
    if len(question.options) > MAX_OPTIONS:
      return VqaAnswer(error=f"{len(question.options)} options, more than {MAX_OPTIONS}")
    right, probability = {}, {}
    gold = [
      order.index(question.gold) for order in orders(question, self.cfg.permutations, self.seed)
    ]
    for name, logits_RA, more in (
      ("visual", visual, self.cfg.none_of_above),
      ("blind", blind, False),
    ):
      part = logits_RA[:, : len(question.options) + more].astype(np.float64)
      if not np.isfinite(part).all():
        raise ValueError(
          "the model gave numbers that are not finite for the question "
          f"{question.stem!r}; check its dtype"
        )
      p = np.exp(part - part.max(1, keepdims=True))
      p /= p.sum(1, keepdims=True)
      right[name] = tuple((part.argmax(1) == gold).astype(int).tolist())
      probability[name] = float(np.mean(p[np.arange(len(gold)), gold]))
    return VqaAnswer(
      *(float(np.mean(right[name])) for name in ("visual", "blind")),
      *(probability[name] for name in ("visual", "blind")),
      visual_right=right["visual"],
      blind_right=right["blind"],
    )
