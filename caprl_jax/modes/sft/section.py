"""The sections of mode `sft`, and which of their keys may change when a run goes on."""

import dataclasses

from caprl_jax.data.rows import BadRows
from caprl_jax.rl.optimizer import OptimizerConfig

# What may change when a run goes on: it changes no step. What the captioner is begun with is bound
# by what its files hold, not by where they lie.
FREE = (
  "mesh.*",
  "checkpoint.*",
  "policy.checkpoint",
  "policy.tokenizer",
  "sft.bad_rows",
  "sft.eval",
  "sft.eval_rows",
  "sft.output",
  "sft.output_dtype",
  "sft.phases.*.optimizer.moment_memory",
  "sft.recognition",
  "sft.shape_buckets",
)


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
  """Steps on one set of captions.

  steps: optimizer steps.
  optimizer: as the section `optimizer`.
  templates: (weight, text with {fact} places), of which one is drawn per row; none: the rows'
    captions.
  """

  steps: int
  optimizer: OptimizerConfig
  templates: tuple[tuple[float, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """The section `sft`.

  train: a source of `qa_sources.py`, whose facts fill the templates, or a .jsonl of captions.
  phases: trained one after the other.
  eval: rows whose facts measure recognition; None measures nothing.
  eval_rows: the first rows of `eval` only.
  recognition: template whose places are measured, each given the true text before it.
  batch_size: captions per step.
  max_tokens: longest caption.
  augment: shift images by up to an eighth and mirror them, which keeps the facts of easy-vqa
    true.
  bad_rows: "refuse" to start while a row cannot be used (its image cannot be decoded or is too
    narrow, its caption is too long), or "drop" and log it; as `data.bad_rows`.
  shape_buckets: the most shapes that images are padded to, one per batch; as
    `data.shape_buckets`.
  output: folder of the captioner, below the workdir.
  output_dtype: of the written checkpoint.
  """

  train: str
  phases: tuple[PhaseConfig, ...]
  eval: str | None = None
  eval_rows: int = 1000
  recognition: str | None = None
  batch_size: int = 64
  max_tokens: int = 32
  augment: bool = False
  bad_rows: BadRows = "refuse"
  shape_buckets: int | None = None
  output: str = "policy"
  output_dtype: str = "bfloat16"

  def __post_init__(self):
    if self.shape_buckets is not None and self.shape_buckets < 1:
      raise ValueError(
        f"sft.shape_buckets = {self.shape_buckets} must be at least 1 (one shape for all images), "
        "or None"
      )


@dataclasses.dataclass(frozen=True)
class NewPolicyConfig:
  """The section `policy` of this mode: a checkpoint, or config.json and preprocessor_config.json
  of a new model.

  instruction: what the captioner is asked.
  checkpoint: the captioner to begin with; None makes a new one.
  architecture: config.json of a new one.
  preprocessor: preprocessor_config.json of a new one.
  tokenizer: model whose tokens a new one shares.
  compact: a new one keeps only the tokens that its captions need.
  """

  instruction: str = "Please describe this image in detail."
  checkpoint: str | None = None
  architecture: dict | None = None
  preprocessor: dict | None = None
  tokenizer: str | None = None
  compact: bool = True
