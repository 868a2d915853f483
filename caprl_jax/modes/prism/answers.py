"""Captions, a benchmark's questions, the answering model -> its answers, written or read."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np

from caprl_jax.data.readers.benchmarks.prompts import chat_turns, split_prompt
from caprl_jax.data.readers.benchmarks.row import CAPTIONQA, QUESTIONS, BenchmarkRow
from caprl_jax.data.rows import Question
from caprl_jax.harness.process import peers
from caprl_jax.harness.process.first import from_all, from_first
from caprl_jax.harness.result_cache import ResultCache
from caprl_jax.harness.training.made_of import judge_digest
from caprl_jax.hub.load import Loaded
from caprl_jax.inference.endpoint_judge import EndpointJudge, as_text
from caprl_jax.inference.judge import HostJudge, JudgeSection, check_text_judge
from caprl_jax.inference.run_judge import open_text_judge
from caprl_jax.inference.text_writer import ServedWriter, TextWriter
from caprl_jax.modes.prism.evaluation import BLIND, FAILED, Evaluation
from caprl_jax.modes.prism.questions import gold_index
from caprl_jax.modes.prism.section import PrismConfig
from caprl_jax.progress import Bar, going_on
from caprl_jax.rl.sampling import SamplingConfig
from caprl_jax.scoring.captionqa import SYSTEM

LETTER_ONLY = "\nAnswer with the letter of the right option only."


class Prompts:
  """(row, caption) -> token ids that the answering model goes on from."""

  def __init__(self, judge: Loaded):
    self.tokenizer = judge.tokenizer
    self.chat = judge.tokenizer.backend.token_to_id("<|im_start|>") is not None

  def __call__(self, row: BenchmarkRow, caption: str) -> list[int]:
    """A caption that spells special tokens is tokenised by itself, as text: it cannot close the
    turn.
    """
    before, after = split_prompt(row)
    if row.benchmark == CAPTIONQA:
      before, after = self._with_system(before, after)
    elif row.benchmark == QUESTIONS:  # has no turns of its own
      after += LETTER_ONLY
      if self.chat:
        before, after = f"<|im_start|>user\n{before}", f"{after}<|im_end|>\n<|im_start|>assistant\n"
      else:
        after += "\nAnswer:"
    encode, plain = self.tokenizer.encode, self.tokenizer.encode_plain
    if encode(caption) == plain(caption):
      return encode(before + caption + after)
    return encode(before) + plain(caption) + encode(after)

  def _with_system(self, before: str, after: str) -> tuple[str, str]:
    """CaptionQA's turns: of a chat, or as its authors ask a model that has no template."""
    if not self.chat:
      return f"{SYSTEM}\n\nUser: {before}", f"{after}\nAssistant:"
    begin = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    return begin + before, f"{after}<|im_end|>\n<|im_start|>assistant\n"


class ServedPrompts:
  """(row, caption) -> a system turn, "" for none, and a user's: what a server is sent, which writes
  the chat itself. No caption can close the turn."""

  def __call__(self, row: BenchmarkRow, caption: str) -> tuple[str, str]:
    """Raises ValueError as `chat_turns`."""
    before, after = split_prompt(row)
    caption = as_text(caption)
    if row.benchmark == CAPTIONQA:
      return SYSTEM, before + caption + after
    if row.benchmark == QUESTIONS:
      return "", before + caption + after + LETTER_ONLY
    return chat_turns(row, before, caption, after)


# A row, a caption, and what the caption is: the key of what it was written of and its number among
# the captions of that.
Pair = tuple[BenchmarkRow, str, tuple[str, int]]


def write_answers(
  pairs: Sequence[Pair],
  kept: ResultCache,
  prompts: Prompts | ServedPrompts,
  writer: TextWriter | ServedWriter,
  cfg: PrismConfig,
) -> list[str | None]:
  """The text that answers each row from each caption; what `kept` holds is not written again. None
  where a request of a server failed: the next run asks it again."""
  asked: list[Any] = [prompts(row, caption) for row, caption, _ in pairs]
  # Two captions with the same words, of one image or of two, are answered by themselves: at a
  # temperature, answers are draws, and one draw for several images would look like agreement.
  keys = [
    hashlib.sha256(json.dumps([one, which if cfg.answer_temperature else 0]).encode()).hexdigest()
    for one, (_, _, which) in zip(asked, pairs)
  ]
  left = {key: one for key, one in zip(keys, asked) if key not in kept}
  names = from_first(lambda: list(left))  # of which each process writes a part
  failed: list[str] = []
  if names:
    prompt_of = dict(zip(keys, asked))
    mesh = jax.set_mesh(writer.mesh) if isinstance(writer, TextWriter) else nullcontext()
    with mesh, Bar(len(left), "answers", "answer") as bar:
      # A draw is of the question's own number, whatever else is left to be answered.
      numbers = [int(name[:8], 16) >> 1 for name in names]
      for found in writer([prompt_of[name] for name in names], numbers):
        kept.put({names[n]: {"text": t.text, "finish": t.finish} for n, t in found if t})
        failed += [names[n] for n, text in found if text is None]
        bar.update(len(found))
    with going_on("waiting for the answers of the other processes"):
      peers.check()
    lost = {name for of_one in from_all(failed) for name in of_one}
    kept.await_others(key for key in keys if key not in lost)
  return [kept[key]["text"] if key in kept else None for key in keys]


def read_answers(pairs: Sequence[Pair], host_judge: HostJudge | EndpointJudge) -> np.ndarray:
  """The option that the judge reads from each caption, int; -1 where it abstains, `FAILED` where a
  server gave no answer. An option that says that the caption does not tell is not shown: the judge
  abstains in its own way."""
  places = [[i for i in range(len(row.options)) if i != row.cannot] for row, *_ in pairs]
  asks = []
  for (row, caption, _), kept in zip(pairs, places, strict=True):
    options = tuple(row.options[i] for i in kept)
    gold = gold_index(row)
    assert gold is not None, row.name  # `questions.read_questions` leaves the others out
    asks.append((caption, Question(row.stem, options, kept.index(gold), row.kind)))
  chosen, answered = host_judge.choices(asks, "answers"), host_judge.answered(asks)
  found = np.array([kept[n] if n >= 0 else -1 for kept, n in zip(places, chosen)], int)
  return np.where(answered, found, FAILED)


def answers_identity(section: JudgeSection, cfg: PrismConfig, seed: int) -> dict[str, Any]:
  """What written answers depend on, but for what is asked. Raises ValueError for a judge that is
  not there."""
  check_text_judge(section)
  settings: dict[str, Any] = {
    "judge": section.endpoint.model if section.endpoint else section.source,
    "judge_sha256": judge_digest(section),
    "dtype": section.dtype,
  }
  if section.int8:  # the key is new: without it, what was kept stays valid
    settings["int8"] = True
  return settings | {
    "temperature": cfg.answer_temperature,
    "tokens": cfg.answer_tokens,
    "seed": seed,
  }


def check_prompts(rows: Mapping[str, Sequence[BenchmarkRow]], section: JudgeSection) -> None:
  """Raises ValueError for a question that the judge's server cannot be asked in writing."""
  if section.endpoint is not None:
    for row in (row for asked in rows.values() for row in asked):
      ServedPrompts()(row, "")


def answer_all(
  evaluation: Evaluation,
  section: JudgeSection,
  cfg: PrismConfig,
  kept: ResultCache | None,
  mesh: jax.sharding.Mesh,
  seed: int,
) -> dict[str, dict[str, np.ndarray]]:
  """`Evaluation.answered`. Texts go to `kept`; without one, options are read. None and `FAILED`
  stand for answers that failed."""
  # One judge and one writer for all benchmarks: what is compiled for one serves the others.
  writes = None if kept is None else _writer(section, cfg, mesh, seed)
  host_judge = None
  if kept is None:
    kinds = sorted({row.kind for rows in evaluation.rows.values() for row in rows})
    with _local(section, mesh):
      host_judge = open_text_judge(section, kinds=kinds, mesh=mesh, seed=seed, first=from_first)
  answered: dict[str, dict[str, np.ndarray]] = {}
  for name, rows in evaluation.rows.items():
    answered[name] = {}
    for who, pairs in _pairs(evaluation, name, cfg.blind).items():
      if kept is not None and writes is not None:
        found = np.array(write_answers(pairs, kept, *writes, cfg), object)
      else:
        assert host_judge is not None
        with _local(section, mesh):
          found = read_answers(pairs, host_judge)
      answered[name][who] = found.reshape(len(rows), -1)
  return answered


def _local(section: JudgeSection, mesh: jax.sharding.Mesh) -> Any:
  """Enters the mesh of this process's devices, for a judge that is on them: what processes tell
  each other must not be inside."""
  return jax.set_mesh(mesh) if section.endpoint is None else nullcontext()


def _writer(
  section: JudgeSection, cfg: PrismConfig, mesh: jax.sharding.Mesh, seed: int
) -> tuple[Prompts, TextWriter] | tuple[ServedPrompts, ServedWriter]:
  """What the judge goes on from, and what writes."""
  share = jax.process_index(), jax.process_count()
  if section.endpoint is not None:
    asked = dataclasses.replace(
      section.endpoint, temperature=cfg.answer_temperature, max_tokens=cfg.answer_tokens
    )
    return ServedPrompts(), ServedWriter(asked, share)
  with jax.set_mesh(mesh):
    judge = section.load(mesh)
  sampling = SamplingConfig(cfg.answer_tokens, temperature=cfg.answer_temperature)
  size = cfg.answer_batch_size
  writer = TextWriter(judge, sampling, batch_size=size, mesh=mesh, seed=seed, share=share)
  return Prompts(judge), writer


def _pairs(evaluation: Evaluation, benchmark: str, blind: bool) -> dict[str, list[Pair]]:
  """Captioner -> each question with each of its captions; with `blind`, also with none."""
  questions = list(zip(evaluation.rows[benchmark], evaluation.shown[benchmark], strict=True))
  pairs: dict[str, list[Pair]] = {
    who: [
      (row, one["caption"], (key, n))
      for row, key in questions
      for n, one in enumerate(captions[key])
    ]
    for who, captions in evaluation.captions.items()
  }
  if blind:
    pairs[BLIND] = [(row, "", (key, 0)) for row, key in questions]
  return pairs
