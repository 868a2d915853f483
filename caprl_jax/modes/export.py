"""Mode `export`: a run's newest parameters, another step's, or any checkpoint -> a directory that
transformers and vLLM load.
"""

import dataclasses
import logging
import pathlib

import jax
import ml_dtypes
import numpy as np

from caprl_jax import __version__, sharding
from caprl_jax.config import schema as configuration
from caprl_jax.errors import UserError
from caprl_jax.harness.buckets.shared import saved_steps
from caprl_jax.harness.process.workdir_lock import only_writer
from caprl_jax.harness.sections import PolicySection, begun_with, load_trained
from caprl_jax.harness.training.summary import read_summary, summary_path
from caprl_jax.harness.training.trained import find_run
from caprl_jax.hub.load import Loaded, save_policy
from caprl_jax.hub.lora import save_adapters

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
log = logging.getLogger("caprl_jax.modes.export")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """The section `export`.

  output: the directory to write.
  run: the workdir of a training run, whose newest checkpoint is written, or
    `<workdir>/checkpoints/<step>`; None writes `policy.checkpoint` itself.
  dtype: of the written parameters.
  adapters: of a LoRA run, write PEFT adapters, not a merged model.
  shard_gb: largest file, in 10^9 bytes.
  """

  output: str
  run: str | None = None
  dtype: str = "bfloat16"
  adapters: bool = False
  shard_gb: float = 5.0


def model_card(base: str, summary: dict, dtype: str) -> str:
  """README.md of an exported captioner: what it is, how to use it, what was measured; numbers only
  of the run.
  """
  judge, custom = _rewarded_by(summary.get("config") or {})
  taught = (
    "a language model that cannot see the image answers questions from the caption, and what it "
    "gets right is the captioner's reward"
  )
  if custom and not judge:
    taught = "the captions of an image compete by the reward that a function gives them"
  lines = [
    "---",
    "library_name: transformers",
    "pipeline_tag: image-text-to-text",
    f"base_model: {base}",
    "tags: [image-captioning, caprl]",
    "---",
    "",
    "# Image captioner trained with CapRL",
    "",
    f"Made from `{base}` with caprl_jax {__version__} (CapRL, arXiv 2509.22647): {taught}. "
    f"Parameters are in {dtype}.",
    "",
  ]
  if {"before", "after"} <= summary.keys():
    before, after = summary["before"], summary["after"]
    lines += [
      f"| held-out {'questions' if judge else 'images'} | before | after |",
      "|---|---|---|",
    ]
    for name in ("accuracy", "reward", "length_tokens", "questions", "images"):
      if name in before and name in after:
        lines.append(f"| {name} | {before[name]:.4g} | {after[name]:.4g} |")
    data, steps = summary["config"]["data"]["train"], summary["config"]["train"]["steps"]
    by = f"Judge: `{judge}`" if judge else f"Reward: `{custom}`"
    lines += ["", f"{by}; data: `{data}`; {steps} steps.", ""]
  return "\n".join(
    [
      *lines,
      "```python",
      "from transformers import AutoModelForImageTextToText, AutoProcessor",
      'model = AutoModelForImageTextToText.from_pretrained("DIRECTORY")',
      'processor = AutoProcessor.from_pretrained("DIRECTORY")',
      "```",
      "",
    ]
  )


def _rewarded_by(config: dict) -> tuple[str, str]:
  """The judge and the reward function of a run's config, each "" where there is none."""
  judge, reward = config.get("judge") or {}, config.get("reward") or {}
  served = (judge.get("endpoint") or {}).get("model")
  return served or judge.get("source") or "", reward.get("custom") or ""


def open_run(source: str, mesh: jax.sharding.Mesh) -> tuple[Loaded, str, dict]:
  """The captioner of a run's newest checkpoint, or of the one that is named, with its adapters
  beside what they adapt; what it was trained from; and the run's summary, without figures that are
  another step's.

  Raises:
    ValueError: there is no run or no checkpoint; as `load_trained`.
  """
  run = find_run(source)
  if run is None:
    raise UserError(
      f"export.run = {source!r} is no training run with a checkpoint; name the --workdir of one, "
      "or <workdir>/checkpoints/<step>"
    )
  section = begun_with(run)
  loaded, step = load_trained(section, run, mesh)
  file = summary_path(run.workdir)
  summary = read_summary(file) if file.exists() else {}
  if step != saved_steps(run.workdir)[-1]:
    summary = {name: value for name, value in summary.items() if name != "after"}
  return loaded, section.checkpoint, summary


def run(config, workdir: pathlib.Path) -> None:
  """Writes `export.output`; nothing goes to the workdir."""
  del workdir
  cfg = configuration.load_section(config, "export", ExportConfig)
  if cfg.dtype not in DTYPES:
    raise ValueError(f"export.dtype = {cfg.dtype!r}; use one of {', '.join(DTYPES)}")
  mesh = sharding.make_mesh(configuration.load_section(config, "mesh", sharding.MeshConfig))
  output, summary = pathlib.Path(cfg.output).expanduser(), {}
  with only_writer(output), jax.set_mesh(mesh):
    if cfg.run:
      loaded, base, summary = open_run(cfg.run, mesh)
    else:
      section = configuration.load_section(config, "policy", PolicySection)
      section.check_exact("a directory holds")
      loaded, base = section.load(mesh), section.checkpoint
    params = loaded.params
    lora = loaded.model.cfg.text.lora
    if cfg.adapters and lora is None:
      raise ValueError(
        "export.adapters = True, but the run trained no adapters (policy.trainable is not 'lora')"
      )
    if cfg.adapters:
      save_adapters(output, params, lora, base)
    else:
      save_policy(
        output,
        loaded,
        params,
        DTYPES[cfg.dtype],
        int(cfg.shard_gb * 1e9),
        model_card(base, summary, cfg.dtype),
      )
  if jax.process_index() == 0:  # alone has written, and may be the one that sees the folder
    log.info("wrote %s (%s)", output, ", ".join(sorted(p.name for p in output.iterdir())))
