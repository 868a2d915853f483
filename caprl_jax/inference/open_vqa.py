"""Images with questions -> a captioner's answers in words, with the image and without: direct VQA,
and the released curation's way of asking for letters.

The image runs once, every question branches from it, and every answer from its question. Answers
are a few tokens that end together, and what costs is the images and questions before them: they are
written in batches, where captions and long texts go through `engine/`. Letters as in vqa.py; T
tokens of an answer.
"""

import dataclasses
import functools
import string

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.data.question_texts import LLAVA, open_text, question_text, shuffled_orders
from caprl_jax.data.rows import Question
from caprl_jax.hub.load import Loaded
from caprl_jax.hub.tokenizer import Tokenizer
from caprl_jax.hub.vocabulary import own_vocabulary
from caprl_jax.inference.vqa import (
  MAX_OPTIONS,
  AnswerConfig,
  Answerer,
  VqaAnswer,
  VqaRunner,
  branch,
)
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.policy import Policy
from caprl_jax.rl.rollout import seen_tokens
from caprl_jax.rl.sampling import SamplingConfig, decode
from caprl_jax.scoring.metrics import exact
from caprl_jax.types import Array, Images, Params, Prompts, Vocabulary


@dataclasses.dataclass(frozen=True)
class OpenVqaAnswer(VqaAnswer):
  """How one question was answered in words; `visual` and `blind` are 1 where it `is_right`, and
  there are no probabilities. written, blind_written: the answers with the image and without it."""

  written: str = ""
  blind_written: str = ""


def check_ends(tokenizer: Tokenizer) -> None:
  """Raises ValueError for a model that does not know how to end an answer."""
  if not tokenizer.end_ids:
    raise ValueError(
      "the model's files name no end token: its answers would never stop; add "
      "eos_token_id to config.json"
    )


def is_right(written: str, question: Question) -> bool:
  """Whether an answer is `exact`ly the right option; where it is others as well ("C", "C#"), by its
  very letters.
  """
  gold = question.options[question.gold]
  several = sum(exact(written, option) for option in question.options) > 1
  return bool(exact(written, gold)) and (
    not several or written.casefold() == gold.strip().casefold()
  )


def write_answers(
  policy: Policy,
  params: Params,
  images: Images | None,
  prompts: Prompts | None,
  tokens_BML: Array,
  valid_BML: Array,
  place_B2: Array,
  *,
  vocabulary: Vocabulary,
  cfg: SamplingConfig,
  seed: int = 0,
) -> tuple[Array, Array]:
  """The tokens written after each presentation, and which are valid, [B, M, T] each; the image, if
  any, runs once. Each presentation, with the image and without it, draws by itself, whatever rows
  are in its batch.

  Args:
    place_B2: as of `VqaRunner.run`.
  """
  B, M, _ = tokens_BML.shape
  hidden_ND, next_position_N, prefixes = branch(
    policy, params, images, prompts, tokens_BML, valid_BML
  )

  def extend(tokens, position, valid, prefixes):
    return policy.apply({"params": params}, tokens, position, valid, prefixes, method="extend")

  end = decode(
    extend,
    head_matrix(policy.cfg.text, params["language_model"]),
    hidden_ND,
    next_position_N,
    prefixes=prefixes,
    vocabulary=vocabulary,
    key=_keys(seed, place_B2, M, with_image=images is not None),
    cfg=cfg,
    seen_NV=_seen(prompts, tokens_BML, valid_BML, policy.cfg.text.vocab_size)
    if cfg.repetition_penalty != 1
    else None,
  )
  return end.tokens_NT.reshape(B, M, -1), end.valid_NT.reshape(B, M, -1)


def _keys(seed: int, place_B2: Array, presentations: int, with_image: bool) -> Array:
  """A random key for each presentation, [B * M]."""
  key = jax.random.fold_in(jax.random.key(seed), int(with_image))

  def of_presentation(place_2: Array, number: Array) -> Array:
    of_row = jax.random.fold_in(jax.random.fold_in(key, place_2[0]), place_2[1])
    return jax.random.fold_in(of_row, number)

  of_row = jax.vmap(of_presentation, in_axes=(None, 0))
  return jax.vmap(of_row, in_axes=(0, None))(place_B2, jnp.arange(presentations)).reshape(-1)


def _seen(prompts: Prompts | None, tokens_BML: Array, valid_BML: Array, size: int) -> Array:
  """Which tokens stand before each answer, bool [B * M, V]."""
  B, M, L = tokens_BML.shape
  seen_NV = seen_tokens(tokens_BML.reshape(B * M, L), valid_BML.reshape(B * M, L), size)
  if prompts is not None:
    seen_NV |= jnp.repeat(seen_tokens(prompts.tokens_BP, prompts.valid_BP, size), M, axis=0)
  return seen_NV


class OpenAnswerer(VqaRunner):
  """A model that answers questions in words, greedily. `permutations` and `none_of_above` of `cfg`
  do not matter: no options are shown. Raises ValueError as `check_ends`.
  """

  def __init__(
    self,
    loaded: Loaded,
    cfg: AnswerConfig,
    mesh: jax.sharding.Mesh,
    seed: int,
    *,
    wording: str = LLAVA,
    max_tokens: int = 16,
    temperature: float = 0.0,
    repetition_penalty: float = 1.0,
  ):
    sampling = SamplingConfig(
      max_tokens, temperature=temperature, repetition_penalty=repetition_penalty
    )
    size, tokenizer = loaded.model.cfg.text.vocab_size, loaded.tokenizer
    check_ends(tokenizer)
    # every id, as in `generate`
    vocabulary = own_vocabulary(np.ones(size, bool), tokenizer.end_ids)
    vocabulary = jax.device_put(vocabulary, sharding.replicated(mesh))
    self._write = jax.jit(
      functools.partial(
        write_answers,
        loaded.model,
        vocabulary=vocabulary,
        cfg=sampling,
        seed=seed,
      )
    )
    self.wording = wording
    super().__init__(loaded, cfg, mesh, seed)

  def texts(self, question: Question, with_image: bool) -> list[str]:
    del with_image  # the words are the same without it
    return [open_text(self.wording, question)]

  def run(
    self,
    images: Images | None,
    prompts: Prompts | None,
    tokens_BML: Array,
    valid_BML: Array,
    place_B2: Array,
  ) -> Array:
    tokens, valid = self._write(
      self.loaded.params, images, prompts, tokens_BML, valid_BML, place_B2
    )
    return jnp.where(valid, tokens, -1)

  def _text(self, tokens_T: np.ndarray) -> str:
    return self.loaded.tokenizer.decode_written([t for t in tokens_T.tolist() if t >= 0]).strip()

  def verdict(self, question: Question, visual: np.ndarray, blind: np.ndarray | None) -> VqaAnswer:
    assert blind is not None
    written, blind_written = self._text(visual[0]), self._text(blind[0])
    right = [float(is_right(text, question)) for text in (written, blind_written)]
    return OpenVqaAnswer(*right, written=written, blind_written=blind_written)


class OfficialAnswerer(OpenAnswerer):
  """A model that is asked for letters as in the released curation (`AnswerConfig.protocol`): there
  are no probabilities. Raises ValueError as `check_ends`."""

  temperature = 0.1

  def __init__(self, loaded: Loaded, cfg: AnswerConfig, mesh: jax.sharding.Mesh, seed: int):
    super().__init__(
      loaded,
      cfg,
      mesh,
      seed,
      max_tokens=4,
      temperature=self.temperature,
      repetition_penalty=1.05,
    )
    self.presentations = cfg.permutations

  def texts(self, question: Question, with_image: bool) -> list[str]:
    return [
      question_text(question, order, with_image and self.cfg.none_of_above)
      for order in shuffled_orders(question, self.cfg.permutations, self.seed)
    ]

  def verdict(self, question: Question, visual: np.ndarray, blind: np.ndarray | None) -> VqaAnswer:
    assert blind is not None
    if len(question.options) > MAX_OPTIONS:
      return VqaAnswer(error=f"{len(question.options)} options, more than {MAX_OPTIONS}")
    gold = [
      string.ascii_uppercase[order.index(question.gold)]
      for order in shuffled_orders(question, self.cfg.permutations, self.seed)
    ]
    seen, unseen = (
      tuple(int(letter in self._text(tokens)) for letter, tokens in zip(gold, written))
      for written in (visual, blind)
    )
    return VqaAnswer(
      float(np.mean(seen)), float(np.mean(unseen)), visual_right=seen, blind_right=unseen
    )


def letter_answerer(
  loaded: Loaded, cfg: AnswerConfig, mesh: jax.sharding.Mesh, seed: int
) -> VqaRunner:
  """Who asks for letters by `cfg.protocol`. Raises ValueError as `letter_ids` or `check_ends`."""
  kind = OfficialAnswerer if cfg.protocol == "official" else Answerer
  return kind(loaded, cfg, mesh, seed)
