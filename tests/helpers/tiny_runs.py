"""A tiny run of each mode that goes on after a kill: inputs, command line, what it leaves."""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

from caprl_jax.data.readers.jsonl import read_jsonl, write_caption_jsonl
from caprl_jax.data.rows import CaptionRow

MODES = ("train", "sft", "pretrain", "prism", "curate")
CAPTION = "The image shows a {color} {shape}."
OUTPUT = "curated.jsonl"  # of mode curate, in the workdir

_CONFIG = """
import json, ml_collections
def get_config():
  return ml_collections.ConfigDict(json.loads({text!r}))
"""


def write(folder: pathlib.Path, longer: int = 0) -> dict[str, dict]:
  """Models, data and a config file of each mode; the configs by mode.

  longer: more steps of each run, phase and stage.
  """
  from helpers import tiny  # it needs torch, which takes its time, and nothing else here does

  train = tiny.write_all(folder)
  rows = read_jsonl(folder / "data" / "rows.jsonl")
  captions = [CaptionRow(row.image, CAPTION.format(**row.facts), row.name) for row in rows]
  write_caption_jsonl(folder / "data" / "captions.jsonl", captions)
  train.train = dict(steps=6 + longer, sample_every=2)
  train.evaluate = dict(batch_size=8, group_images=0, every_steps=3)
  train.checkpoint = dict(every_steps=1)
  train.optimizer = dict(learning_rate=1e-3, schedule="cosine", warmup_steps=1)
  configs = {"train": train.to_dict(), **_others(folder, longer)}
  for mode, config in configs.items():
    text = _CONFIG.format(text=json.dumps({**config, "mode": mode, "seed": 0}))
    (folder / f"{mode}.py").write_text(text)
  return configs


def _others(folder: pathlib.Path, longer: int) -> dict[str, dict]:
  policy, judge = str(folder / "policy"), str(folder / "judge")
  questions, captions = (str(folder / "data" / f"{name}.jsonl") for name in ("rows", "captions"))
  optimizer = dict(learning_rate=1e-2, schedule="cosine", warmup_steps=1)
  stage = dict(optimizer=optimizer, pack=dict(tokens=192, images=4), batch_size=1)
  stages = dict(
    align=dict(data=captions, trained="projector", steps=3 + longer, **stage),
    instruct=dict(data=questions, questions=1, steps=4 + longer, **stage),
  )
  return {
    "sft": dict(
      policy=dict(checkpoint=policy),
      checkpoint=dict(every_steps=1),
      sft=dict(
        train=captions,
        batch_size=4,
        max_tokens=12,
        phases=[dict(steps=3 + longer, optimizer=optimizer)] * 2,
      ),
    ),
    "pretrain": dict(
      pretrain_policy=dict(checkpoint=policy),
      pretrain=dict(order=["align", "instruct"], stages=stages, checkpoint_every_steps=1),
    ),
    "prism": dict(
      policy=dict(checkpoint="unused"),
      judge=dict(source=judge),
      prism=dict(
        captioners=f"one={policy}",
        benchmarks=f"shapes={questions}",
        captions=2,
        max_tokens=6,
        batch_size=2,
        answer_tokens=4,
        answer_batch_size=4,
      ),
    ),
    "curate": dict(
      answerer=dict(checkpoint=policy),
      curate=dict(
        input=questions,
        output=OUTPUT,
        questions="given",
        min_visual=None,
        max_blind=None,
        similar_bits=None,
        shard_rows=5,
        answers=dict(batch_size=2, permutations=2),
      ),
    ),
  }


def command(
  mode: str, folder: pathlib.Path, workdir: pathlib.Path, rows: int = 1, keys: Sequence[str] = ()
) -> list[str]:
  """The arguments of `main.main`.

  rows: of a batch of mode pretrain, to be split over devices. keys: of the config, with their
  values, as "policy.trainable=lora".
  """
  more = [f"--config.curate.output={workdir / OUTPUT}"] if mode == "curate" else []
  if mode == "pretrain" and rows > 1:
    more = [f"--config.pretrain.stages.{name}.batch_size={rows}" for name in ("align", "instruct")]
  more += [f"--config.{key}" for key in keys]
  return ["main", f"--config={folder / f'{mode}.py'}", f"--workdir={workdir}", *more]


def results(workdir: pathlib.Path) -> dict[str, Any]:
  """What a run has found, by file and key, without what no two runs share (times, the workdir's
  name). Arrays are there by digest; a checkpoint's are parameters, moments, step and key."""
  found: dict[str, Any] = {}
  for path in sorted(workdir.rglob("*")):
    name = str(path.relative_to(workdir))
    if path.name == "metrics.jsonl":
      rows = [json.loads(line) for line in path.read_text().splitlines()]
      found[f"{name} steps"] = [row["step"] for row in rows]
      for row in rows:
        timeless = {key: value for key, value in row.items() if not key.startswith("time/")}
        found[f"{name} step {row['step']}"] = timeless
    elif path.name == "checkpoints":
      newest = max((p for p in path.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
      found[f"{name} newest"] = newest.name
      state = _as_numpy(newest / "state")
      found |= {f"{name} {key}": value for key, value in _digests(state).items()}
    elif path.name in ("kept_questions.json", "train_rows.json", "recognition.json", "vqa.json"):
      found[name] = json.loads(path.read_text())
    elif path.suffix == ".safetensors" or path.name in ("prism.json", "funnel.json", OUTPUT):
      found[name] = _sha256(path.read_bytes())
    elif path.name in ("answers.jsonl", "left_out.jsonl"):
      found[name] = path.read_text()
    elif path.name == "summary.json":
      summary = json.loads(path.read_text())
      found[name] = {stage: summary[stage] for stage in ("before", "after", "counts")}
    elif path.parent.name == "cache":  # of Prism: captions and answers, each once, of all processes
      lines = path.read_text().splitlines()[1:]
      kind = name.partition(".")[0]
      found[kind] = sorted([*found.get(kind, []), *map(_compact, lines)])
    elif path.name.startswith("record_"):
      complete = json.loads(path.read_text()).get("complete") or {}
      found[f"{name} complete"] = complete.get("step")
    elif path.suffix == ".png":
      with Image.open(path) as image:
        found[name] = _sha256(image.tobytes())
  return found


def _as_numpy(checkpoint: pathlib.Path) -> Any:
  """A state, of however many processes and devices."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  with ocp.PyTreeCheckpointer() as checkpointer:
    like = checkpointer.metadata(checkpoint).item_metadata.tree
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    return checkpointer.restore(checkpoint, restore_args=wanted)


def _compact(line: str) -> str:
  return json.dumps(json.loads(line))


def _digests(state: Any, place: str = "") -> dict[str, str]:
  if isinstance(state, dict):
    items = state.items()
  elif isinstance(state, (list, tuple)):
    items = enumerate(state)
  elif state is None:
    return {}
  else:
    import numpy as np

    array = np.asarray(state)
    return {place: f"{array.dtype}{array.shape} {_sha256(array.tobytes())}"}
  return {k: v for key, one in items for k, v in _digests(one, f"{place}/{key}").items()}


def _sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()
