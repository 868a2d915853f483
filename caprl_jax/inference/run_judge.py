"""A run's judge: a language model that answers questions, here or behind an endpoint, or a
vision-language model that scores captions beside their images.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax

from caprl_jax.data.judge_questions import QuestionTokenizer, TokenizedQuestion
from caprl_jax.data.rows import Question
from caprl_jax.hub.load import Loaded
from caprl_jax.inference.endpoint_judge import EndpointJudge, FromFirst
from caprl_jax.inference.image_judge import ScorePrompt
from caprl_jax.inference.judge import Ask, HostJudge, JudgeSection, open_judge, question_tokenizer
from caprl_jax.types import JudgePrompt


def open_text_judge(
  section: JudgeSection,
  *,
  kinds: Sequence[str],
  mesh: jax.sharding.Mesh,
  seed: int,
  compare: Sequence[Ask] = (),
  first: FromFirst | None = None,
) -> HostJudge | EndpointJudge:
  """A config's judge of texts, loaded or connected to; arguments and errors as of `open_judge` and
  `EndpointJudge`. What one behind an endpoint does not answer, its `answered` says."""
  section.check_named()
  if section.endpoint is not None:
    return EndpointJudge.open(section.endpoint, section, seed, first=first)
  return open_judge(section, kinds=kinds, mesh=mesh, seed=seed, compare=compare)


@dataclasses.dataclass(frozen=True)
class RunJudge:
  """kinds: of the questions. host: asks questions; None for a judge that sees the image, which has
  `score`, the prompt by which it scores captions. loaded: the model, and tokenize: writes questions
  for it; None where `host` is an `EndpointJudge`. Without a judge all of them are None.
  """

  kinds: Sequence[str]
  loaded: Loaded | None = None
  tokenize: QuestionTokenizer | None = None
  host: HostJudge | EndpointJudge | None = None
  score: ScorePrompt | None = None

  @classmethod
  def open(
    cls,
    section: JudgeSection,
    *,
    kinds: Sequence[str],
    mesh: jax.sharding.Mesh,
    seed: int,
    compare: Sequence[Ask],
    first: FromFirst | None = None,
  ) -> "RunJudge":
    """A config's judge, if there is one; arguments and errors as of `open_text_judge`."""
    if not section.named:
      return cls(kinds)
    if section.sees_image:
      loaded = section.load(mesh)
      written = question_tokenizer(loaded, section, kinds)
      return cls(kinds, loaded, written, score=section.score_of(loaded))
    host = open_text_judge(section, kinds=kinds, mesh=mesh, seed=seed, compare=compare, first=first)
    if isinstance(host, EndpointJudge):
      return cls(kinds, host=host)
    return cls(kinds, host.judge, host.tokenize, host)

  def learn(self, questions: Iterable[Question]) -> None:
    """What `tokens` needs to know of the questions (`HostJudge.priors`)."""
    if self.host:
      self.host.priors(questions)

  def tokens(self, question: Question) -> TokenizedQuestion:
    """A question as batches hold it."""
    if isinstance(self.host, EndpointJudge):
      return self.host.tokens(question, self.kinds.index(question.kind))
    assert self.tokenize is not None, "nobody is asked where there is no judge"
    prior = self.host.prior_of(question) if self.host else None
    return self.tokenize(question, prior)

  def check_options(self, options: int, rows: int | None) -> None:
    """Raises ValueError where the judge has no letters for so many options; arguments as of
    `QuestionTokenizer.prompt`."""
    if isinstance(self.host, EndpointJudge):
      self.host.check_options(options)
    elif self.tokenize is not None:
      self.tokenize.prompt(options, rows)

  def prompt(self, options: int, rows: int | None) -> JudgePrompt | None:
    """The prompt as the step reads it, None for a judge behind an endpoint or none; arguments as of
    `QuestionTokenizer.prompt`."""
    if self.score:
      return self.score.prompt
    return self.tokenize.prompt(options, rows) if self.tokenize else None
