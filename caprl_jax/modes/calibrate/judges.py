"""A config's judge under any reading and in any words: a model here, or behind an endpoint."""

from collections.abc import Sequence

import jax
import numpy as np

from caprl_jax.data.judge_prompts import OFFICIAL, JudgeTemplate
from caprl_jax.data.rows import Question
from caprl_jax.harness.process.first import from_first
from caprl_jax.inference.endpoint_judge import EndpointJudge
from caprl_jax.inference.judge import Ask, HostJudge, JudgeSection
from caprl_jax.rl.judge_protocol import JudgeConfig

AnyJudge = HostJudge | EndpointJudge


class Judges:
  """Opens the judge. Call under `jax.set_mesh`.

  Args:
    names: kinds of all questions.

  Raises ValueError as `JudgeSection.load`.
  """

  def __init__(
    self, section: JudgeSection, mesh: jax.sharding.Mesh, names: Sequence[str], seed: int
  ):
    self.section, self.names, self.seed = section, names, seed
    self.loaded = section.load(mesh) if section.endpoint is None else None

  def __call__(self, cfg: JudgeConfig, template: JudgeTemplate | None = None) -> AnyJudge:
    """The judge, asked as `cfg` and `template` say. Raises ValueError as `EndpointJudge.open`."""
    if self.loaded is not None:
      return HostJudge(self.loaded, cfg, kinds=self.names, seed=self.seed, template=template)
    endpoint = self.section.endpoint
    assert endpoint is not None, "a judge is here or there"
    return EndpointJudge.open(endpoint, cfg.each_once(), self.seed, template, from_first)

  @property
  def chat(self) -> bool:
    """Whether it is a model here whose tokenizer knows chats (a server writes them itself)."""
    if self.loaded is None:
      return False
    known = self.loaded.tokenizer.backend.token_to_id
    return all(known(token) is not None for token in OFFICIAL.specials)


def size_of(judge: AnyJudge, question: Question) -> int:
  """How much a judge reads of a question: tokens, or words of one behind an endpoint."""
  if isinstance(judge, EndpointJudge):
    return sum(len(text.split()) for text in (question.stem, *question.options))
  written = judge.tokenize(question)
  return len(written.stem) + sum(map(len, written.options))


def ask(judge: AnyJudge, rows: Sequence[Sequence[Ask]], what: str) -> tuple[np.ndarray, np.ndarray]:
  """The option chosen for each, int [rows, asks], and which of the columns were answered in all
  rows, bool [asks]."""
  flat, shape = [one for row in rows for one in row], (len(rows), len(rows[0]))
  choice = judge.choices(flat, what).reshape(shape)
  return choice, judge.answered(flat).reshape(shape).all(0)
