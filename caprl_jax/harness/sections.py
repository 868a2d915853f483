"""The sections of a config that several modes read, as frozen dataclasses."""

import dataclasses
import hashlib
import json
import re
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from caprl_jax.config import schema as configuration
from caprl_jax.data.rows import BadRows
from caprl_jax.errors import UserError
from caprl_jax.harness.training.trained import Trained, find_run
from caprl_jax.harness.watch import STOP_IF, WARN_IF, Watch
from caprl_jax.hub.folders.text_files import json_of
from caprl_jax.hub.hub_files import fingerprint
from caprl_jax.hub.int8 import Int8
from caprl_jax.hub.load import (
  Loaded,
  load_pixels,
  load_policy,
  load_policy_config,
  rounded,
  with_attention,
  with_new_adapters,
  without_adapters,
)
from caprl_jax.json_files import shown
from caprl_jax.models.attention_choice import AttentionChoice
from caprl_jax.models.layers import LoraConfig
from caprl_jax.models.policy import Remat, check_pixel_limits
from caprl_jax.models.trainable import Trainable, merge_params, split_params, trainable_filter

# Names of the released captioners, folders that are called as they, and the hub's cache of them.
CAPRL = re.compile(r"(^|/|--)caprl-(?!eval)[^/]*(/snapshots/[^/]*)?/?$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class PolicySection:
  """The captioner; in mode `curate`, a model that writes questions or answers them.

  checkpoint: directory or hub name; or the workdir of a training run, whose newest parameters it
    means, or `<workdir>/checkpoints/<step>`.
  instruction: what the captioner is asked; CapRL's own by default.
  template: how the prompt is written: by the `checkpoint`'s own chat template, or `bare`, in ChatML
    with the user's turn alone, as the released Prism has it (Qwen2.5-VL's template adds a system
    turn).
  dtype: of activations.
  param_dtype: of parameters. float32 parameters with bfloat16 activations are master weights.
    Adapters are float32 whatever it is.
  remat: compute activations of tower and decoder again in the backward pass, which saves memory and
    costs time.
  tower_remat, decoder_remat: the same for one of the two; None: as `remat`.
  attention: `xla`; `kernel`: kernels for the TPU or GPU here that write no scores to memory; or
    `auto`: these where they fit the model and give on this chip what XLA gives, else `xla`.
  trainable: `full`; `decoder` (the tower and projector stay); `projector` alone; or `lora`,
    adapters on the decoder's linear maps as `lora` says. What is not trained has no gradient, no
    optimizer state and no place in checkpoints.
  lora: the adapters, with `trainable` = `lora`.
  min_pixels, max_pixels: in place of the checkpoint's own limits on image size; written with the
    captioner.
  int8: what is rounded to int8, in modes that write captions: `weights`, the decoder's matrices,
    each as it is read (half of bfloat16's memory, and half of what each token has to read);
    `cache`, the keys and values of image, prompt and caption, with a scale for each token and head
    (twice as many captions at once); `both`; or `none`. `caption.int8_images` tells how many greedy
    tokens it changes.
  """

  checkpoint: str
  instruction: str = "Please describe this image in detail."
  template: Literal["checkpoint", "bare"] = "checkpoint"
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: bool = False
  tower_remat: bool | None = None
  decoder_remat: bool | None = None
  attention: AttentionChoice = "xla"
  trainable: Trainable = "full"
  lora: LoraConfig = LoraConfig(rank=16, alpha=32.0)
  min_pixels: int | None = None
  max_pixels: int | None = None
  int8: Int8 = "none"

  def __post_init__(self):
    check_pixel_limits(self.min_pixels, self.max_pixels)
    if self.int8 not in (kinds := get_args(Int8)):  # where it was not read from a config
      raise ValueError(f"int8 = {shown(self.int8)} is none of {', '.join(kinds)}")
    if self.lora.base_weights is not None and self.trainable != "lora":
      raise ValueError(
        f"lora.base_weights = {self.lora.base_weights!r} and trainable = {self.trainable!r}: only "
        "what is not trained can be rounded; set trainable = 'lora', or lora.base_weights = None"
      )
    if self.lora.base_weights is not None and self.int8 != "none":
      raise ValueError(
        f"int8 = {self.int8!r} and lora.base_weights = {self.lora.base_weights!r}: a captioner is "
        "rounded once; set int8 = 'none'"
      )

  def check_exact(self, what: str) -> None:
    """Raises ValueError where the captioner is rounded. `what`: needs it as it is."""
    if self.int8 != "none":
      raise ValueError(
        f"policy.int8 = {self.int8!r} is for captions (modes caption, prism, evaluate, demo): "
        f"{what} the captioner as it is; set policy.int8 = 'none'"
      )

  @property
  def sampled_as_trained(self) -> bool:
    """Whether the repetition penalty that the captioner's files may name is left aside
    (`without_penalty`)."""
    return bool(CAPRL.search(self.checkpoint)) or find_run(self.checkpoint) is not None

  @property
  def remat_parts(self) -> Remat:
    """`remat`, `tower_remat` and `decoder_remat` together."""
    return Remat.of(self.remat, self.tower_remat, self.decoder_remat)

  def load(self, mesh: jax.sharding.Mesh) -> Loaded:
    """The captioner; of a training run's, adapters are merged. Raises ValueError as `load_policy`,
    `with_attention` and `load_trained`."""
    if run := find_run(self.checkpoint):
      return self._load_run(run, mesh)
    loaded = load_policy(
      self.checkpoint,
      mesh,
      jnp.dtype(self.dtype),
      jnp.dtype(self.param_dtype),
      self.remat_parts,
      self.lora if self.trainable == "lora" else None,
      self.min_pixels,
      self.max_pixels,
      self.int8,
    )
    loaded = with_attention(loaded, self.attention, mesh, self.checkpoint)
    if self.sampled_as_trained:
      loaded = without_penalty(loaded)
    return dataclasses.replace(loaded, bare=self.template == "bare")

  def _load_run(self, run: Trained, mesh: jax.sharding.Mesh) -> Loaded:
    section, param_dtype = self._begun(run), jnp.dtype(self.param_dtype)
    if self.lora.base_weights is not None:
      raise UserError(
        f"{run.place}: a run's parameters cannot be rounded while they are read, as "
        f"policy.lora.base_weights = {self.lora.base_weights!r} asks; name the folder "
        f"{run.workdir / 'policy'}, or write one with mode export"
      )
    # adapters are merged into what their base was before it was rounded
    section = dataclasses.replace(
      section, lora=dataclasses.replace(section.lora, base_weights=None)
    )
    if section.trainable != "lora":  # adapters are merged with the precision of their training
      section = dataclasses.replace(section, param_dtype=self.param_dtype)
    loaded = without_adapters(load_trained(section, run, mesh)[0])
    if section.trainable == "lora":
      params = jax.tree.map(lambda x: x.astype(param_dtype), loaded.params)
      loaded = dataclasses.replace(loaded, params=params)
    if self.trainable == "lora":
      loaded = with_new_adapters(loaded, self.lora, mesh)
    return dataclasses.replace(rounded(loaded, self.int8), bare=self.template == "bare")

  def _begun(self, run: Trained) -> "PolicySection":
    """What the run began with, asked and computed as this section says."""
    then = begun_with(run)
    parts = ("tower_remat", "decoder_remat")
    own = ("instruction", "template", "dtype", "remat", *parts, "attention")
    limits = {name: getattr(self, name) for name in ("min_pixels", "max_pixels")}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    return dataclasses.replace(then, **{name: getattr(self, name) for name in own}, **limits)

  def settled(self) -> "PolicySection":
    """Where `checkpoint` is a run that may be going on: with the step that it has now. All
    processes call it."""
    run = find_run(self.checkpoint)
    if run is None:
      return self
    return dataclasses.replace(self, checkpoint=str(run.settled().place))

  def pixels(self):
    """How the captioner cuts images into patches, without its weights. Raises ValueError as
    `load`."""
    if run := find_run(self.checkpoint):
      return self._begun(run).pixels()
    return load_pixels(self.checkpoint, self.min_pixels, self.max_pixels)

  def sizes(self):
    """The captioner's `PolicyConfig`, without its weights. Raises ValueError as `load`."""
    if run := find_run(self.checkpoint):
      return self._begun(run).sizes()
    return load_policy_config(self.checkpoint, self.min_pixels, self.max_pixels)

  def base(self) -> str:
    """The checkpoint that holds the model's files: `checkpoint`, or what its run began with."""
    run = find_run(self.checkpoint)
    return begun_with(run).base() if run else self.checkpoint

  def digest(self) -> str:
    """Of all files that loading it reads. Raises ValueError as `fingerprint`."""
    run = find_run(self.checkpoint)
    if run is None:
      return fingerprint(self.checkpoint)
    both = [begun_with(run).digest(), run.digest()]
    return hashlib.sha256(json.dumps(both).encode()).hexdigest()

  def identity(self) -> dict[str, Any]:
    """What the captioner's texts depend on but for its instruction: settings of work that is kept.
    A checkpoint trained anew in its place is another one. Raises ValueError as `fingerprint`."""
    said = {} if self.template == "checkpoint" else {"template": self.template}
    said |= {} if self.int8 == "none" else {"int8": self.int8}
    return said | {
      "checkpoint": self.checkpoint,
      "checkpoint_sha256": self.digest(),
      "dtype": self.dtype,
      "param_dtype": self.param_dtype,
      "min_pixels": self.min_pixels,
      "max_pixels": self.max_pixels,
    }


def begun_with(run: Trained) -> PolicySection:
  """The section `policy` of a training run.

  Raises:
    ValueError: as `Trained.config`; or what it began with is the run itself.
  """
  section = configuration.load_section(run.config(), "policy", PolicySection)
  base = find_run(section.checkpoint)
  if base and base.workdir.resolve() == run.workdir.resolve():
    raise UserError(
      f"{run.workdir}: the run says that it began with itself (policy.checkpoint = "
      f"{section.checkpoint!r}); name the folder {run.workdir / 'policy'}, if it has one"
    )
  return section


def load_trained(
  section: PolicySection, run: Trained, mesh: jax.sharding.Mesh
) -> tuple[Loaded, int]:
  """The captioner that began as `section` says, with what the run has made of it, adapters beside
  what they adapt; and the step. Of the checkpoint only parameters are read. All processes that the
  mesh is of call it.

  Raises:
    ValueError: what it began with cannot be loaded; as `Trained.restore`.
  """
  try:
    loaded = section.load(mesh)
  except ValueError as error:
    raise UserError(
      f"{run.workdir}: the run began with policy.checkpoint = {section.checkpoint!r}, which its "
      f"checkpoints need: {error} (A run that has ended leaves its captioner in "
      f"{run.workdir / 'policy'}, which needs nothing else.)"
    ) from error
  kind = trainable_filter(section.trainable, loaded.model.cfg.family)
  params, base = split_params(loaded.params, kind)
  shardings, _ = split_params(loaded.shardings, kind)
  like = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings
  )
  del params
  loaded = dataclasses.replace(loaded, params={})  # none of it lies beside what is read now
  step, trained = run.restore(like)
  loaded = without_penalty(loaded)
  return dataclasses.replace(loaded, params=merge_params(trained, base or None)), step


def without_penalty(loaded: Loaded) -> Loaded:
  """The same captioner, whose files no longer name a repetition penalty: CapRL samples without one,
  and its captioners are to be sampled as they were trained (Qwen2.5-VL's files say 1.05)."""
  name = "generation_config.json"
  said = json_of(loaded.files, name)
  if said.get("repetition_penalty") in (None, 1, 1.0):
    return loaded
  data = json.dumps(said | {"repetition_penalty": 1.0}, indent=2).encode()
  return dataclasses.replace(loaded, files={**loaded.files, name: data})


@dataclasses.dataclass(frozen=True)
class DataSection:
  """The images and questions.

  train: the training rows, a source or a mixture of sources (`qa_sources.py`). Without a judge
    these need no questions, and may be what `caption.input` takes.
  eval: the held-out rows, in the same way.
  batch_size: images per step.
  questions: questions per image in a step; at least 1 where there is a judge to answer them.
  questions_per_image: keep so many of each training image's questions, drawn once by the seed, and
    ask no others: the paper's ablation. None keeps all.
  max_train_rows, max_eval_rows: keep the first rows only, of each source.
  draw_train_rows: keep rows that are drawn by the seed rather than the first ones.
  bad_rows: "refuse" to start while a row cannot be used, or "drop" and log it. Every image is
    decoded for that once, before the first step. A row that fails all the same when its turn comes
    (a disk error) ends the run, or the next row takes its place.
  shape_buckets: the most shapes that images of training batches are padded to. A batch has images
    of one, and the step is compiled once for each. 1: all have the shape that holds the largest.
    None: up to 4, where sizes differ so much that each saves a tenth of the patches.
  """

  train: str
  eval: str
  batch_size: int
  questions: int = 0
  questions_per_image: int | None = None
  max_train_rows: int | None = None
  draw_train_rows: bool = False
  max_eval_rows: int | None = None
  bad_rows: BadRows = "refuse"
  shape_buckets: int | None = None

  def __post_init__(self):
    if self.shape_buckets is not None and self.shape_buckets < 1:
      raise ValueError(
        f"data.shape_buckets = {self.shape_buckets} must be at least 1 (one shape for all images), "
        "or None"
      )
    if self.questions_per_image is not None and self.questions_per_image < 1:
      raise ValueError(
        f"data.questions_per_image = {self.questions_per_image} must be at least 1, or None"
      )


@dataclasses.dataclass(frozen=True)
class GateSection:
  """Training is refused unless, on held-out questions, true captions beat generic and empty ones.

  ideal: template of a true caption with {fact} places; None skips the gate, and the log says so:
    for data without facts.
  generic: a caption that says nothing about the image.
  min_gap: by how much accuracy with true captions must be above that with the others.
  """

  ideal: str | None = None
  generic: str = "A simple picture."
  min_gap: float = 0.3


@dataclasses.dataclass(frozen=True)
class TrainSection:
  """The length of a run, and what it tells.

  steps: CapRL steps (rollouts).
  sample_every: steps from one file in samples/ to the next.
  sample_images: images whose captions go into such a file.
  fused: the step as one program; False runs rollout, judge and update apart and times each
    (`time/...`), more slowly.
  trackers: where the metrics go besides metrics.jsonl: any of "tensorboard" and "wandb".
  wandb_mode: "offline" needs no account.
  stop_if: rules over metrics.jsonl, as "reward/unscored > 0.5 for 20" (steps in a row): where one
    holds, the run saves and ends.
  warn_if: rules that only warn, each with what to try. Beside the metrics there are
    `watch/reward_jump`, how many standard deviations of the last 50 steps the reward is from their
    mean, and `watch/blind_rise`, how much `judge/blind` has risen together with `judge/accuracy`.
  skip_nonfinite: go on after so many steps whose loss or gradient was not finite, which change no
    parameters (counted anew at each start); after one more the run saves and ends.
  profile_steps: the first and the last step that are traced into the workdir's `profile/`, with a
    table of where their time went, counted from the start (1 compiles); () traces none.
  """

  steps: int
  sample_every: int = 20
  sample_images: int = 4
  fused: bool = True
  trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
  wandb_mode: Literal["offline", "online"] = "offline"
  stop_if: tuple[str, ...] = STOP_IF
  warn_if: tuple[str, ...] = WARN_IF
  skip_nonfinite: int = 0
  profile_steps: tuple[int, ...] = ()

  def __post_init__(self):
    steps = self.profile_steps
    if len(steps) > 2 or any(step < 1 for step in steps) or list(steps) != sorted(steps):
      raise ValueError(
        f"train.profile_steps = {steps} must be (first, last), counted from 1, e.g. (3, 5)"
      )
    if self.skip_nonfinite < 0:
      raise ValueError(f"train.skip_nonfinite = {self.skip_nonfinite} must be at least 0")
    Watch(self.stop_if, self.warn_if)  # which refuses what is no rule


@dataclasses.dataclass(frozen=True)
class EvaluateSection:
  """Evaluation on held-out rows.

  every_steps: steps from one evaluation during training to the next; 0: only before and after.
    The best captioner by held-out accuracy is kept in best/.
  batch_size: images that are captioned at once.
  temperature: of the captions; 0 is greedy.
  samples: examples that are written to samples/.
  group_images: images for which `rollout.group_size` captions are sampled as in training, to
    count flat groups.
  """

  every_steps: int = 0
  batch_size: int = 16
  temperature: float = 0.0
  samples: int = 24
  group_images: int = 32
