"""Images with questions -> how a captioner's own model answers them, with the image and without:
CapRL's QA filter.

The image and all that stands before it run once; every question in every order of its options
branches from there, and the answer is read from the logits of the letters. Letters: B images, M
presentations an image, L tokens of one, A letters.
"""

import abc
import dataclasses
import functools
import os
import string
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.data.batches import ImagePrompt, ImageShape, image_shape, shape_bucket, stack
from caprl_jax.data.question_texts import orders, question_text
from caprl_jax.data.rows import QARow, Question
from caprl_jax.hub.load import Loaded
from caprl_jax.hub.tokenizer import Tokenizer
from caprl_jax.models.attention import Prefix
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.policy import Policy, last_hidden
from caprl_jax.types import Array, Images, Params, Prompts

MAX_OPTIONS = 10
TOKENS_STEP = 32  # presentations are padded to a multiple of this


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
  """permutations: orders in which each question's options are shown, each turned on by one place,
    so that the right one visits different letters. none_of_above: one option more where the image
    is shown, as released.
  questions_per_row: presented to one run of an image; an image with more takes several. batch_size:
  images a program.
  """

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
  it, and the mean probabilities of the right letter among those shown. error: why it was not asked.
  """

  visual: float = 0.0
  blind: float = 0.0
  visual_prob: float = 0.0
  blind_prob: float = 0.0
  error: str = ""


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

  def __init__(self, loaded: Loaded, cfg: AnswerConfig, mesh: jax.sharding.Mesh, seed: int):
    self.loaded, self.cfg, self.mesh, self.seed = loaded, cfg, mesh, seed
    self.specials = [self._specials(self._ids("x", with_image)) for with_image in (False, True)]
    self.pool = futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1), "answering")

  @abc.abstractmethod
  def texts(self, question: Question, with_image: bool) -> list[str]:
    """What the user says, for each presentation."""

  @abc.abstractmethod
  def run(
    self, images: Images | None, prompts: Prompts | None, tokens_BML: Array, valid_BML: Array
  ) -> Array:
    """What the model makes of each presentation, [B, M, ...]."""

  @abc.abstractmethod
  def verdict(self, question: Question, visual: np.ndarray, blind: np.ndarray) -> VqaAnswer:
    """Of what `run` gave for a question's presentations, with the image and without it."""

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *failure) -> None:
    self.pool.shutdown(cancel_futures=True)

  def __call__(
    self, rows: Sequence[QARow], numbers: Sequence[int]
  ) -> Iterator[list[tuple[int, list[VqaAnswer] | ValueError]]]:
    """Verdicts on all questions of `rows[number]`, for each number, batch by batch; a ValueError
    where the image cannot be read."""
    buckets: dict[ImageShape, list[tuple[int, int]]] = {}
    failed: list[tuple[int, list[VqaAnswer] | ValueError]] = []
    verdicts: dict[int, list[VqaAnswer | None]] = {}
    cfg = self.loaded.model.cfg
    for number, shape in zip(numbers, self.pool.map(lambda n: self._shape(rows[n]), numbers)):
      if isinstance(shape, ValueError):
        failed.append((number, shape))
        continue
      verdicts[number] = [None] * len(rows[number].questions)
      for first in range(0, len(rows[number].questions), self.cfg.questions_per_row):
        buckets.setdefault(shape_bucket(shape, cfg.vision.slots_multiple), []).append(
          (number, first)
        )
    if failed:
      yield failed
    for shape, members in sorted(buckets.items(), key=lambda item: item[0].tokens):
      prompt = ImagePrompt(cfg, (self.loaded.prompt_pieces("x")[0], []), shape)
      for start in range(0, len(members), self.cfg.batch_size):
        yield self._batch(rows, members[start : start + self.cfg.batch_size], prompt, verdicts)

  def _shape(self, row: QARow) -> ImageShape | ValueError:
    try:
      return image_shape([row], self.loaded.model.cfg)
    except ValueError as error:
      return error

  def _batch(
    self, rows, members, prompt: ImagePrompt, verdicts
  ) -> list[tuple[int, list[VqaAnswer] | ValueError]]:
    """Asks one batch; gives the verdicts of the images of which nothing is left to ask."""

    def prepare(member):
      number, first = member
      asked = rows[number].questions[first : first + self.cfg.questions_per_row]
      try:
        return (
          prompt(rows[number]),
          self._presentations(asked, True),
          self._presentations(asked, False),
        )
      except ValueError as error:
        return error

    made = list(self.pool.map(prepare, members))
    good = [
      (member, parts) for member, parts in zip(members, made) if not isinstance(parts, ValueError)
    ]
    finished: dict[int, list[VqaAnswer] | ValueError] = {
      number: error for (number, _), error in zip(members, made) if isinstance(error, ValueError)
    }
    if good:
      filled = [parts for _, parts in good] + [good[-1][1]] * (self.cfg.batch_size - len(good))
      images, prompts = stack([example for example, _, _ in filled])
      visual = self._run([shown for _, shown, _ in filled], images, prompts)
      blind = self._run([shown for _, _, shown in filled])
      for b, ((number, first), (_, shown, hidden)) in enumerate(good):
        asked = rows[number].questions[first : first + self.cfg.questions_per_row]
        for k, question in enumerate(asked):
          verdicts[number][first + k] = self._verdict(
            question, k, shown, hidden, visual[b], blind[b]
          )
    for number, _ in members:
      if number not in finished and None not in verdicts[number]:
        finished[number] = verdicts[number]
    return list(finished.items())

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
    self, shown: Sequence[Sequence[list[int] | None]], images=None, prompts=None
  ) -> np.ndarray:
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
    return jax.device_get(
      self.run(*sharding.put_batch((images, prompts, tokens, valid), self.mesh))
    )

  def _verdict(
    self, question: Question, k: int, shown, hidden, visual_M: np.ndarray, blind_M: np.ndarray
  ) -> VqaAnswer:
    its = slice(k * self.presentations, (k + 1) * self.presentations)
    if None in shown[its] or None in hidden[its]:
      return VqaAnswer(error="it spells a token of the chat template")
    return self.verdict(question, visual_M[its], blind_M[its])


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
    self, images: Images | None, prompts: Prompts | None, tokens_BML: Array, valid_BML: Array
  ) -> Array:
    return self._logits(self.loaded.params, images, prompts, tokens_BML, valid_BML, self.letters_A)

  def verdict(self, question: Question, visual: np.ndarray, blind: np.ndarray) -> VqaAnswer:
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
      right[name] = float(np.mean(part.argmax(1) == gold))
      probability[name] = float(np.mean(p[np.arange(len(gold)), gold]))
    return VqaAnswer(right["visual"], right["blind"], probability["visual"], probability["blind"])
