"""Mode `sft`: supervised warm start. Images with captions -> a captioner in Hugging Face format.

Teaches a captioner, new or loaded, by next-token prediction on captions: of a JSON-lines file, or
written from the facts that a dataset knows with weighted templates (how the quickstart's warm start
is made). Phases follow one another, each with its own captions and learning-rate schedule.
"""

import dataclasses
import functools
import hashlib
import logging
import pathlib
from collections.abc import Callable, Sequence

import jax
import ml_collections
import ml_dtypes
import numpy as np
from PIL import Image

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.config import schema as configuration
from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.batches import ImagePrompt, ImageShape, eval_batches
from caprl_jax.data.captions import (
  caption_ids,
  captions_fit,
  places,
  recognition_fits,
  stems,
  taught,
)
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.readers.qa_sources import read_caption_rows, read_qa_rows
from caprl_jax.data.rows import QARow, read_image
from caprl_jax.data.shapes.buckets import Shapes
from caprl_jax.data.usable_rows import (
  NextUsable,
  fits,
  shape_of,
  shapes_of,
  usable,
)
from caprl_jax.harness.buckets.shared import saved_steps
from caprl_jax.harness.checkpoints import CheckpointConfig, Checkpoints
from caprl_jax.harness.loop import run_loop
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.run_record import RunRecord
from caprl_jax.harness.process.workdir_lock import only_run
from caprl_jax.harness.sections import PolicySection
from caprl_jax.harness.training.row_batches import TrainingRows, training_batches
from caprl_jax.harness.training.row_digests import row_digests
from caprl_jax.harness.training.state import make_state
from caprl_jax.hub.load import Loaded, save_policy
from caprl_jax.hub.new_policy import policy_from_architecture, shared_tokenizer
from caprl_jax.hub.tokenizer import Tokenizer
from caprl_jax.hub.vocabulary import own_vocabulary
from caprl_jax.modes.sft.section import FREE, NewPolicyConfig, PhaseConfig, SFTConfig
from caprl_jax.progress import counted
from caprl_jax.rl.optimizer import build_optimizer
from caprl_jax.supervised.caption_step import SFTExample, caption_scores, sft_step
from caprl_jax.types import Array, Batch, Params, Vocabulary

log = logging.getLogger("caprl_jax.modes.sft.run")


class CaptionExample:
  """(row index, generator) -> SFTExample: draws a template, fills in the facts, perturbs the image
  if asked.
  """

  def __init__(
    self,
    rows: list,
    tokenizer: Tokenizer,
    prompt: ImagePrompt,
    phase: PhaseConfig,
    cfg: SFTConfig,
    shapes: Callable[[int], Shapes] | None = None,
  ):
    """shapes: what the image of a row is padded to, where that is not `prompt`'s shape."""
    self.shapes = shapes
    self.rows, self.tokenizer, self.prompt, self.phase, self.cfg = (
      rows,
      tokenizer,
      prompt,
      phase,
      cfg,
    )
    self.weights = np.array([weight for weight, _ in phase.templates])

  def padded(self, shapes: Callable[[int], Shapes] | None) -> "CaptionExample":
    """The same, with each row's image padded as `shapes` says."""
    return CaptionExample(self.rows, self.tokenizer, self.prompt, self.phase, self.cfg, shapes)

  def __call__(self, index: int, rng: np.random.Generator) -> SFTExample:
    row = self.rows[index]
    if self.phase.templates:
      template = self.phase.templates[
        rng.choice(len(self.weights), p=self.weights / self.weights.sum())
      ][1]
      caption = template.format(**row.facts)
    else:
      caption = row.caption
    image = shift_and_mirror(read_image(row), rng) if self.cfg.augment else None
    prompt = self.prompt.padded_to(*self.shapes(index)) if self.shapes else self.prompt
    batch = Batch(*prompt(row, image), None, np.int32(index))
    return SFTExample(batch, *caption_ids(self.tokenizer, row, caption, self.cfg.max_tokens))


def shift_and_mirror(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  """Moves a picture by up to an eighth of each side, repeating its edge, and mirrors it half of the
  time.
  """
  pixels = np.asarray(image)
  reach = (pixels.shape[0] // 8, pixels.shape[1] // 8)
  padded = np.pad(pixels, ((reach[0],) * 2, (reach[1],) * 2, (0, 0)), mode="edge")
  top, left = rng.integers(0, 2 * reach[0] + 1), rng.integers(0, 2 * reach[1] + 1)
  moved = padded[top : top + pixels.shape[0], left : left + pixels.shape[1]]
  return Image.fromarray(moved[:, ::-1] if rng.random() < 0.5 else moved)


def text_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
  """Every text token and the end tokens allowed; no judge is involved."""
  allowed = np.zeros(vocab_size, bool)
  allowed[: tokenizer.vocab_size] = True
  allowed[list(tokenizer.special_ids)] = False
  allowed[list(tokenizer.end_ids)] = True
  return own_vocabulary(allowed, tokenizer.end_ids)


def recognition(
  policy: Loaded,
  params,
  rows: list[QARow],
  prompt: ImagePrompt,
  vocabulary: Vocabulary,
  cfg: SFTConfig,
  bad: BadRowList,
) -> dict[str, float]:
  """For each {fact} in the template: how often, given the true text before it, the true word is the
  likeliest of all values that the fact takes. Compares whole words, by the sum of their tokens'
  log-probabilities. Rows that cannot be read any more are left out, where `bad` drops such."""

  @jax.jit
  def score(params: Params, example: SFTExample) -> Array:
    return caption_scores(policy.model, params, example, vocabulary)

  rates = {}
  absent = lambda one: one.replace(batch=dataclasses.replace(one.batch, row_B=np.int32(-1)))
  for place, stem in stems(cfg.recognition).items():
    values = sorted({row.facts[place] for row in rows})
    scores, there = [], np.ones(len(rows), bool)
    # the text up to the place, then each candidate word; the same length of context for all
    for value in values:

      def without_end(index, rng, stem=stem, value=value):
        del rng
        row = rows[index]
        caption = stem.format(**row.facts) + value
        tokens, valid = caption_ids(policy.tokenizer, row, caption, cfg.max_tokens)
        valid[valid.sum() - 1] = False
        return SFTExample(Batch(*prompt(row), None, np.int32(index)), tokens, valid)

      found, numbers = [], []
      example = NextUsable(without_end, rows, bad, absent)
      batches = eval_batches(example, len(rows), 100, 0)
      bar = counted(batches, f"recognition of {place} {value!r}", "batch", -(-len(rows) // 100))
      for batch, real in bar:
        found.append(sharding.to_host(score(params, batch))[:real])
        numbers.append(batch.batch.row_B[:real])
      scores.append(np.concatenate(found))
      there &= np.concatenate(numbers) >= 0
    best = np.array(values)[np.argmax(scores, axis=0)]
    right = best == np.array([row.facts[place] for row in rows])
    rates[place] = float(right[there].mean())
  return rates


def begin_policy(
  section: NewPolicyConfig, phases: Sequence[PhaseConfig], rows: list, *, seed: int, mesh
) -> Loaded:
  """Loads the checkpoint, or makes a new model with a (compact) copy of another one's tokenizer."""
  if section.checkpoint:
    return PolicySection(section.checkpoint).load(mesh)
  if section.architecture is None or section.tokenizer is None:
    raise ValueError(
      "mode sft needs policy.checkpoint, or policy.architecture and "
      "policy.tokenizer for a new model"
    )
  texts = None
  if section.compact:
    texts = {text for phase in phases for row in rows for text in taught(phase.templates, row)}
  tokenizer = shared_tokenizer(section.tokenizer, texts, section.instruction)
  return policy_from_architecture(
    section.architecture, section.preprocessor, tokenizer, seed=seed, mesh=mesh
  )


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Runs all phases, writes `workdir/<sft.output>` in Hugging Face format and
  `recognition.json`.
  """
  cfg = configuration.load_section(config, "sft", SFTConfig)
  section = configuration.load_section(config, "policy", NewPolicyConfig)
  mesh_section = configuration.load_section(config, "mesh", sharding.MeshConfig)
  checkpoint = configuration.load_section(config, "checkpoint", CheckpointConfig)
  mesh = sharding.make_mesh(mesh_section)
  sharding.check_batch_size(cfg.batch_size, mesh, "sft.batch_size")
  sections = {
    "seed": config.seed,
    "mesh": mesh_section,
    "policy": section,
    "sft": cfg,
    "checkpoint": checkpoint,
  }
  with only_run(workdir):
    record = RunRecord(workdir, "sft")
    begun = any(saved_steps(_place(workdir, i)) for i in range(len(cfg.phases)))
    changed = record.begin(sections, FREE, goes_on=begun or record.complete_step is not None)
    if record.complete_step is not None and not changed and _left(cfg, workdir):
      log.info("this run is complete: see %s", workdir / cfg.output)
      return
    record.reopen()
    bad = BadRowList(cfg.bad_rows, workdir / "bad_rows.jsonl", "--config.sft.bad_rows")
    rows = _rows(cfg, config.seed, bad)
    eval_rows = _eval_rows(cfg, config.seed, bad)
    with jax.set_mesh(mesh):
      policy = begin_policy(section, cfg.phases, rows, seed=config.seed, mesh=mesh)
      made = _check_rows(policy, rows, eval_rows, cfg, bad, workdir)
      _bind(record, section, policy)
      _train_phases(
        policy,
        made,
        section,
        cfg=cfg,
        config=config,
        workdir=workdir,
        bad=bad,
        checkpoint=checkpoint,
      )
    record.finish(sum(phase.steps for phase in cfg.phases))


def _place(workdir: pathlib.Path, number: int) -> pathlib.Path:
  """The folder of a phase."""
  return workdir / f"phase_{number}"


def _left(cfg: SFTConfig, workdir: pathlib.Path) -> bool:
  """Whether all that a complete run leaves is there; the first process decides for all."""
  files = (workdir / cfg.output / "config.json", workdir / "recognition.json")
  return from_first(lambda: all(path.exists() for path in files))


def _bind(record: RunRecord, section: NewPolicyConfig, policy: Loaded) -> None:
  """Compares what the run begins with with the record's. Raises ValueError where it is another
  one."""
  others = "bring it back as it was, or use another --workdir"
  refused = {
    "policy.checkpoint": f"a phase's checkpoints go on from it; {others}",
    "vocabulary": f"its ids would mean others (a compact one has what captions need); {others}",
  }
  found = {"vocabulary": hashlib.sha256(policy.tokenizer.to_json().encode()).hexdigest()}
  if section.checkpoint:
    found["policy.checkpoint"] = from_first(PolicySection(section.checkpoint).digest)
  record.bind(found, refused, {})


@dataclasses.dataclass(frozen=True)
class CheckedRows:
  """The rows that can be used, to train on and to measure with, and a shape that holds all of their
  images. digests, shapes: of `train` and its images."""

  train: list
  eval: list[QARow]
  shape: ImageShape
  digests: list[str]
  shapes: list[Shapes]


def _check_rows(
  policy: Loaded,
  rows: list,
  eval_rows: list[QARow],
  cfg: SFTConfig,
  bad: BadRowList,
  workdir: pathlib.Path,
) -> CheckedRows:
  """Decodes every image and tokenises every caption that may be taught. Raises ValueError for rows
  that cannot be used and are to be refused."""
  images, pixels = ImageCheck(workdir), policy.model.cfg.vision.pixels
  images([*rows, *eval_rows])  # in one pass
  left = lambda rows, check: bad.check(usable(rows, images(rows), [fits(pixels), check]))
  tokenizer, most, phases = policy.tokenizer, cfg.max_tokens, [one.templates for one in cfg.phases]
  train = left(rows, captions_fit(phases, tokenizer, most))
  recognised = recognition_fits(cfg.recognition or "", eval_rows, tokenizer, most)
  held_out = left(eval_rows, recognised)
  bad.settle()
  shape = shape_of(images([*train, *held_out]), pixels)
  facts = images(train)
  return CheckedRows(
    train, held_out, shape, row_digests(train, facts), shapes_of(train, facts, [pixels])
  )


def _rows(cfg: SFTConfig, seed: int, bad: BadRowList) -> list:
  """The rows to train on: with the facts that the templates use, or with captions of their own.
  Raises ValueError where there are none."""
  templates = [template for phase in cfg.phases for _, template in phase.templates]
  if templates:
    needed = places(templates)
    read = read_qa_rows(cfg.train, seed, bad_rows=bad)
    rows = [row for row in read if needed <= (row.facts or {}).keys()]
  else:
    rows = read_caption_rows(cfg.train, bad)
  if not rows:
    raise ValueError(
      f"sft.train = {cfg.train!r} has no row that knows the facts its templates "
      "use; check the places in sft.phases"
    )
  return rows


def _eval_rows(cfg: SFTConfig, seed: int, bad: BadRowList) -> list[QARow]:
  """The rows whose facts measure recognition; none where nothing is measured."""
  if cfg.eval is None:
    return []
  needed = places([cfg.recognition or ""])
  read = read_qa_rows(cfg.eval, seed, bad_rows=bad)
  rows = [row for row in read if needed <= (row.facts or {}).keys()]
  return rows[: cfg.eval_rows]


def _train_phases(
  policy: Loaded,
  made: CheckedRows,
  section: NewPolicyConfig,
  cfg: SFTConfig,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  bad: BadRowList,
  checkpoint: CheckpointConfig,
) -> None:
  """Trains phase after phase, measures after each, and writes the captioner."""
  vocabulary = text_vocabulary(policy.tokenizer, policy.model.cfg.text.vocab_size)
  rows, eval_rows = made.train, made.eval
  pieces = policy.prompt_pieces(section.instruction)
  prompt = ImagePrompt(policy.model.cfg, pieces, made.shape)
  log.info(
    "%d rows, %.2fM parameters, vocabulary %d",
    len(rows),
    sum(x.size for x in jax.tree.leaves(policy.params)) / 1e6,
    policy.model.cfg.text.vocab_size,
  )
  params, steps, measured = policy.params, 0, []
  for number, phase in enumerate(cfg.phases):
    example = CaptionExample(rows, policy.tokenizer, prompt, phase, cfg)
    params = _train_phase(
      dataclasses.replace(policy, params=params),
      vocabulary,
      example,
      number=number,
      config=config,
      place=_place(workdir, number),
      bad=bad,
      checkpoint=checkpoint,
      made=made,
    )
    steps += phase.steps
    if eval_rows and cfg.recognition:
      measured.append(recognition(policy, params, eval_rows, prompt, vocabulary, cfg, bad))
      log.info(
        "after phase %d (%d steps), recognition on %d images of %s: %s",
        number,
        steps,
        len(eval_rows),
        cfg.eval,
        measured[-1],
      )
  dtype = ml_dtypes.bfloat16 if cfg.output_dtype == "bfloat16" else np.dtype(cfg.output_dtype)
  output = workdir / cfg.output  # an absolute path stays what it is
  save_policy(output, policy, params, dtype)
  if jax.process_index() == 0:
    write_json(workdir / "recognition.json", {"rows": len(eval_rows), "phases": measured})
    log.info("wrote %s; use it with --config.policy.checkpoint=%s", output, output)


def _train_phase(
  policy: Loaded,
  vocabulary: Vocabulary,
  example: CaptionExample,
  *,
  number: int,
  config: ml_collections.ConfigDict,
  place: pathlib.Path,
  bad: BadRowList,
  checkpoint: CheckpointConfig,
  made: CheckedRows,
) -> Params:
  """Trains `policy.params`, which are used up, for one phase, from its newest checkpoint in `place`
  if there is one; returns the new ones."""
  mesh, phase, cfg = jax.sharding.get_mesh(), example.phase, example.cfg
  tx, _ = build_optimizer(phase.optimizer, phase.steps)
  state = make_state(
    policy.params, tx, policy.shardings, config.seed, mesh, phase.optimizer.moment_memory
  )
  # The state comes out where it went in: another layout would compile the step anew.
  step = jax.jit(
    functools.partial(sft_step, policy=policy.model, tx=tx, vocabulary=vocabulary),
    donate_argnums=0,
    out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh), None),
  )
  place.mkdir(parents=True, exist_ok=True)
  checkpoints = Checkpoints(place, checkpoint)
  rows = TrainingRows(made.train, [(len(made.train), None)], made.digests, made.shapes, bad)
  iterator = training_batches(
    place / "train_rows.json",
    rows,
    example.padded,
    cfg=policy.model.cfg,
    batch_size=cfg.batch_size,
    shape_buckets=cfg.shape_buckets,
    seed=config.seed + number,
    share=sharding.batch_share(mesh, cfg.batch_size),
    goes_on=bool(checkpoints.latest_step()),
  )
  if checkpoints.latest_step():
    state, position = checkpoints.restore(state)
    iterator.set_state(position)
  try:
    state = run_loop(
      step,
      state,
      iterator,
      steps=phase.steps,
      mesh=mesh,
      checkpoints=checkpoints,
      config=configuration.to_plain(config),
      workdir=place,
      what=f"phase {number}",
      reward_name="update/none",
    )
  finally:
    checkpoints.close()
  return state.params
