"""The kinds of inputs: what a good one is, what is done to it, and what reads it."""

import dataclasses
import functools
import pathlib
import random
from collections.abc import Callable

from fuzz import bases, mutations, programs, targets
from fuzz.cases import DANGLING, FOLDER, LOOP, Case
from fuzz.mutations import Change, json_file, json_lines, mutate_bytes


@dataclasses.dataclass(frozen=True)
class Kind:
  """base: makes the good files. changes: what is done to files whose names end so, beside damage.
  target: reads the folder, with arguments, and returns messages of what it left out. share: of the
  inputs that a test tries."""

  base: Callable[[], bases.Files]
  changes: dict[str, Change]
  target: Callable[[pathlib.Path, tuple[str, ...]], list[str]]
  share: float = 1.0
  arguments: tuple[str, ...] = ()
  one_file: bool = False  # each input has one of the base's files only, and its name as argument


_CHECKPOINT = {
  "config.json": json_file,
  ".json": json_file,
  ".safetensors": mutations.safetensors,
  ".jinja": programs.template,
  "merges.txt": mutate_bytes,
}
_PICTURES = {f".{form.lower()}": mutate_bytes for form, _ in bases.FORMS} | {".png": mutations.png}


def _pictures() -> bases.Files:
  return {
    f"{number}.{form.lower()}": bases.picture(form, mode=mode)
    for number, (form, mode) in enumerate(bases.FORMS)
  }


@functools.cache
def _keys() -> list[str]:
  from caprl_jax.config import keys

  return keys.keys()


_COMMAND = ("--config=FOLDER/configs/quickstart.py", "--workdir=FOLDER/run", "--config.seed=3")

KINDS: dict[str, Kind] = {
  "rows": Kind(bases.rows, {".jsonl": json_lines}, targets.rows, 2, ("rows.jsonl",)),
  "release_rows": Kind(bases.release_rows, {".json": json_file}, targets.rows, 2, ("rows.json",)),
  "conversations": Kind(bases.conversations, {".jsonl": json_lines}, targets.conversations, 2),
  "captions": Kind(bases.captions, {".jsonl": json_lines}, targets.captions, 2),
  "benchmark": Kind(bases.benchmark, {".json": json_file}, targets.benchmark),
  "images": Kind(_pictures, _PICTURES, targets.images, 2, one_file=True),
  "tars": Kind(bases.tars, {".tar": mutations.tar}, targets.tars, 2),
  "parquet": Kind(bases.parquet, {".parquet": mutations.parquet}, targets.parquet, 1),
  "configs": Kind(bases.configs, {".py": programs.config_file}, targets.config, 2, one_file=True),
  "flags": Kind(bases.configs, {}, targets.flags, 2, _COMMAND),
  "captioner": Kind(bases.captioner, _CHECKPOINT, targets.captioner, 1.5),
  "judge": Kind(bases.judge, _CHECKPOINT, targets.judge, 1.5),
  "adapters": Kind(bases.adapters, _CHECKPOINT, targets.captioner, 0.5),
  "gguf": Kind(bases.gguf_file, {".gguf": mutate_bytes}, targets.gguf, 0.5),
  "tokenizers": Kind(bases.old_tokenizer, _CHECKPOINT, targets.tokenizers, 1),
  "templates": Kind(bases.templates, {".jinja": programs.template}, targets.templates, 0.5),
  "records": Kind(bases.records, {".json": json_file}, targets.records, 0.5),
  "metrics": Kind(bases.metrics, {"s.jsonl": json_lines, ".json": json_file}, targets.metrics, 1),
}


def base_files(kind: str) -> bases.Files:
  return KINDS[kind].base()


def good_case(kind: str, files: bases.Files, number: int = 0) -> Case:
  """An input to which nothing was done."""
  how, names = KINDS[kind], sorted(files)
  arguments = how.arguments or (names[number % len(names)],)
  return Case(
    kind, 0, -1, {arguments[0]: files[arguments[0]]} if how.one_file else files, arguments
  )


def make_case(kind: str, seed: int, number: int, files: bases.Files) -> Case:
  """The input of this number, with one to three changes."""
  how = KINDS[kind]
  case = dataclasses.replace(good_case(kind, files, number), seed=seed, number=number)
  rng = case.rng
  if kind == "flags":
    arguments = (f"--config=FOLDER/{rng.choice(sorted(files))}", *case.arguments[1:])
    for _ in range(rng.choice((1, 1, 2))):
      arguments = programs.flags(arguments, rng, _keys())
    return case.changed(" ".join(a[:60] for a in arguments), arguments=arguments)
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    case = _change(case, how, rng)
  return case


def _change(case: Case, how: Kind, rng: random.Random) -> Case:
  own = [n for n in case.files if any(n.endswith(end) for end in how.changes)]
  bytes_of = lambda names: [n for n in names if isinstance(case.files[n], bytes)]
  names = bytes_of(own if rng.random() < 0.9 else case.files)
  if not names:
    return case
  name = rng.choice(sorted(names))
  if rng.random() < 0.04:
    new = rng.choice((FOLDER, LOOP, DANGLING, None))
    files = {k: v for k, v in case.files.items() if k != name} | ({name: new} if new else {})
    return case.changed(f"{name}: {new or 'gone'}", files=files)
  change = next((c for end, c in how.changes.items() if name.endswith(end)), mutate_bytes)
  change = mutate_bytes if rng.random() < 0.25 else change
  data, done = change(case.files[name], rng)
  return case.changed(f"{name}: {done}", files={**case.files, name: data})
