"""Mode `export`: a run's newest parameters, or any checkpoint -> a directory that transformers and
vLLM load.
"""

import dataclasses
import logging
import pathlib

import jax
import ml_collections
import ml_dtypes
import numpy as np

from caprl_jax import __version__, sharding
from caprl_jax.config import registry
from caprl_jax.config import schema as configuration
from caprl_jax.harness.process.workdir_lock import only_writer
from caprl_jax.harness.sections import PolicySection
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.training.state import newest_captioner
from caprl_jax.harness.training.summary import read_summary, summary_path
from caprl_jax.hub.load import Loaded, save_policy
from caprl_jax.hub.lora import save_adapters
from caprl_jax.types import Params

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
log = logging.getLogger("caprl_jax.modes.export")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """The section `export`.

  output: the directory to write.
  run: the workdir of a training run, whose newest checkpoint is written; None writes
    `policy.checkpoint` itself.
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
    f"Made from `{base}` with caprl_jax {__version__} (CapRL, arXiv 2509.22647): a language "
    "model that cannot see the image answers questions from the caption, and what it gets "
    f"right is the captioner's reward. Parameters are in {dtype}.",
    "",
  ]
  if {"before", "after"} <= summary.keys():
    lines += ["| held-out questions | before | after |", "|---|---|---|"]
    for name in ("accuracy", "length_tokens", "questions", "images"):
      lines.append(f"| {name} | {summary['before'][name]:.4g} | {summary['after'][name]:.4g} |")
    lines += [
      "",
      f"Judge: `{summary['config']['judge']['source']}`; data: "
      f"`{summary['config']['data']['train']}`; {summary['config']['train']['steps']} "
      "steps.",
      "",
    ]
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


def trained_params(workdir: pathlib.Path, mesh) -> tuple[Loaded, Params, dict]:
  """The captioner of a run's newest checkpoint, all of its parameters, and the run's summary.

  Raises ValueError where there is no run or no checkpoint.
  """
  file = summary_path(workdir)
  if not file.exists():
    raise ValueError(
      f"export.run = {str(workdir)!r} holds no summary.json; name the --workdir of a training run"
    )
  summary = read_summary(file)
  if not isinstance(summary.get("config"), dict):
    raise ValueError(f"{file} is not a training run's; name the --workdir of a training run")
  config = registry.with_new_names(summary["config"])
  settings = read_settings(ml_collections.ConfigDict(config))
  return *newest_captioner(workdir, settings, mesh), summary


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
      loaded, params, summary = trained_params(pathlib.Path(cfg.run).expanduser(), mesh)
      base = summary["config"]["policy"]["checkpoint"]
    else:
      section = configuration.load_section(config, "policy", PolicySection)
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
