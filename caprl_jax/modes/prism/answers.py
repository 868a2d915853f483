"""Captions, a benchmark's questions, the answering model -> its answers, written or read."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from caprl_jax.data.readers.benchmarks.prompts import split_prompt
from caprl_jax.data.readers.benchmarks.row import CAPTIONQA, QUESTIONS, BenchmarkRow
from caprl_jax.data.rows import Question
from caprl_jax.harness.process import peers
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.result_cache import ResultCache
from caprl_jax.hub.hub_files import fingerprint
from caprl_jax.hub.load import Loaded
from caprl_jax.inference.judge import HostJudge, JudgeSection, check_blind, open_judge
from caprl_jax.inference.text_writer import TextWriter
from caprl_jax.modes.prism.evaluation import BLIND, Evaluation
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


# A row, a caption, and what the caption is: the key of what it was written of and its number among
# the captions of that.
Pair = tuple[BenchmarkRow, str, tuple[str, int]]


def write_answers(
  pairs: Sequence[Pair], kept: ResultCache, judge: Loaded, writer: TextWriter, cfg: PrismConfig
) -> list[str]:
  """The text that answers each row from each caption; what `kept` holds is not written again."""
  prompts = Prompts(judge)
  ids = [prompts(row, caption) for row, caption, _ in pairs]
  # Two captions with the same words, of one image or of two, are answered by themselves: at a
  # temperature, answers are draws, and one draw for several images would look like agreement.
  keys = [
    hashlib.sha256(json.dumps([one, which if cfg.answer_temperature else 0]).encode()).hexdigest()
    for one, (_, _, which) in zip(ids, pairs)
  ]
  left = {key: one for key, one in zip(keys, ids) if key not in kept}
  names = from_first(lambda: list(left))  # of which each process writes a part
  if names:
    prompt_of = dict(zip(keys, ids))
    with jax.set_mesh(writer.mesh), Bar(len(left), "answers", "answer") as bar:
      # A draw is of the question's own number, whatever else is left to be answered.
      numbers = [int(name[:8], 16) >> 1 for name in names]
      for found in writer([prompt_of[name] for name in names], numbers):
        kept.put(
          {names[number]: {"text": text.text, "finish": text.finish} for number, text in found}
        )
        bar.update(len(found))
    with going_on("waiting for the answers of the other processes"):
      peers.check()
    kept.await_others(keys)
  return [kept[key]["text"] for key in keys]


def read_answers(pairs: Sequence[Pair], host_judge: HostJudge) -> np.ndarray:
  """The option that the judge reads from each caption, int; -1 where it abstains. An option that
  says that the caption does not tell is not shown: the judge abstains in its own way."""
  places = [[i for i in range(len(row.options)) if i != row.cannot] for row, *_ in pairs]
  asks = []
  for (row, caption, _), kept in zip(pairs, places, strict=True):
    options = tuple(row.options[i] for i in kept)
    gold = gold_index(row)
    assert gold is not None, row.name  # `questions.read_questions` leaves the others out
    asks.append((caption, Question(row.stem, options, kept.index(gold), row.kind)))
  chosen = host_judge.choices(asks, "answers")
  return np.array([kept[n] if n >= 0 else -1 for kept, n in zip(places, chosen)], int)


def answers_identity(section: JudgeSection, cfg: PrismConfig, seed: int) -> dict[str, Any]:
  """What written answers depend on, but for what is asked. Raises ValueError for a judge that is
  not there."""
  check_blind(section)
  settings: dict[str, Any] = {
    "judge": section.source,
    "judge_sha256": fingerprint(section.source),
    "dtype": section.dtype,
  }
  if section.int8:  # the key is new: without it, what was kept stays valid
    settings["int8"] = True
  return settings | {
    "temperature": cfg.answer_temperature,
    "tokens": cfg.answer_tokens,
    "seed": seed,
  }


def answer_all(
  evaluation: Evaluation,
  section: JudgeSection,
  cfg: PrismConfig,
  kept: ResultCache | None,
  mesh: jax.sharding.Mesh,
  seed: int,
) -> dict[str, dict[str, np.ndarray]]:
  """`Evaluation.answered`. Texts go to `kept`; without one, options are read."""
  # One judge and one writer for all benchmarks: what is compiled for one serves the others.
  kinds = sorted({row.kind for rows in evaluation.rows.values() for row in rows})
  with jax.set_mesh(mesh):
    host_judge = open_judge(section, kinds=kinds, mesh=mesh, seed=seed)
  writer = None
  if kept is not None:
    sampling = SamplingConfig(cfg.answer_tokens, temperature=cfg.answer_temperature)
    writer = TextWriter(
      host_judge.judge,
      sampling,
      batch_size=cfg.answer_batch_size,
      mesh=mesh,
      seed=seed,
      share=(jax.process_index(), jax.process_count()),
    )
  answered: dict[str, dict[str, np.ndarray]] = {}
  for name, rows in evaluation.rows.items():
    answered[name] = {}
    for who, pairs in _pairs(evaluation, name, cfg.blind).items():
      if kept is None:
        with jax.set_mesh(mesh):
          found = read_answers(pairs, host_judge)
      else:
        found = np.array(write_answers(pairs, kept, host_judge.judge, writer, cfg), object)
      answered[name][who] = found.reshape(len(rows), -1)
  return answered


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
