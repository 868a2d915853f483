"""README and docs: every command parses or runs, links lead somewhere, keys and files exist.

A block of commands has a mark in the line before it:

  <!-- run: ARGUMENTS -->          run here; ARGUMENTS come after those of each command and so win
  <!-- run first: ARGUMENTS -->    the same, before all others, which need what it leaves
  <!-- run in order: ARGUMENTS -->   in the page's order, by a test of its own (of your_images.md)
  <!-- parsed only: WHY -->        flags, config file and keys are checked by main's own parsing

{tiny} in ARGUMENTS is a folder of tiny models and data, {tiny_data} sets a training config's data
to it, {tiny_sizes} its sizes. Blocks run in one folder with the repository's configs in it, so that
a block finds what earlier ones left in runs/.
"""

import ast
import configparser
import functools
import inspect
import json
import math
import pathlib
import re
import shlex
import textwrap
from typing import NamedTuple

import pytest
from helpers.paths import ROOT

from caprl_jax import main, sharding
from caprl_jax.config import keys, registry
from caprl_jax.harness.settings import read_settings
from caprl_jax.rl import step

TRUE_TODAY = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*TRUE_TODAY, ROOT / "CHANGELOG.md"]  # which names what is no more
KINDS = "run first|run in order|run|parsed only"
MARK = re.compile(rf"<!-- (?P<kind>{KINDS}):(?P<text>.*?) ?-->", re.DOTALL)
STEP_MARK = "<!-- the step: tests/docs_test.py compares -->"
SHELL = ("bash", "sh", "console")

TINY_DATA = (
  "--config.data.train={tiny}/data/rows.jsonl --config.data.eval={tiny}/data/rows.jsonl "
  "--config.question_filter.informed=() --config.gate.ideal=None"
)
TINY_SIZES = (
  "--config.data.batch_size=2 --config.data.max_eval_rows=4 --config.evaluate.batch_size=4 "
  "--config.evaluate.group_images=4 --config.rollout.group_size=2 "
  "--config.rollout.sampling.max_tokens=4"
)


class Block(NamedTuple):
  """A fenced block of a document."""

  path: pathlib.Path
  line: int  # of the opening fence, from 1
  language: str
  before: str  # the line before the fence
  text: str

  @property
  def place(self) -> str:
    return f"{self.path.name}:{self.line}"


def blocks_of(path: pathlib.Path, text: str) -> list[Block]:
  """The fenced blocks of a document."""
  found, lines, start = [], text.splitlines(), None
  for i, line in enumerate(lines):
    if line.startswith("```") and start is None:
      start = i
    elif line.startswith("```"):
      body = "\n".join(lines[start + 1 : i])
      before = lines[start - 1] if start else ""
      found.append(Block(path, start + 1, lines[start].strip("` "), before, body))
      start = None
  if start is not None:
    raise ValueError(f"{path.name}:{start + 1}: the block is not closed")
  return found


def commands_of(block: Block) -> list[list[str]]:
  """Words of each command; of a console, of the lines behind `$`, without what was printed.

  Assignments before a command and comments are left out; `a && b` is two commands.
  """
  lines = block.text.splitlines()
  if block.language == "console":
    kept, more = [], False
    for line in lines:
      if more or line.startswith("$ "):
        kept.append(line.removeprefix("$ ") if not more else line)
        more = line.endswith("\\")
    lines = kept
  found = []
  for line in "\n".join(lines).replace("\\\n", " ").splitlines():
    words = shlex.split(line, comments=True)
    while words:
      end = words.index("&&") if "&&" in words else len(words)
      command, words = words[:end], words[end + 1 :]
      while command and re.fullmatch(r"[A-Z_]+=\S*", command[0]):
        command.pop(0)
      found.append(command)
  return [command for command in found if command]


def check(command: list[str]) -> None:
  """Raises ValueError for a command that cannot run as it stands, whatever is installed."""
  match command:
    case ["python", "-m", "caprl_jax.main", *arguments]:
      if arguments != ["--help"]:
        main._parse(main._define_flags(), ["main", *arguments])  # checks modes and sections too
    case ["caprl_jax", *arguments]:
      check(["python", "-m", "caprl_jax.main", *arguments])
    case ["bash", "launch/local.sh", count, *arguments] if count.isdecimal():
      check(["python", "-m", "caprl_jax.main", *(a for a in arguments if a != "--dry-run")])
    case ["sbatch", *arguments]:
      place = arguments.index("launch/slurm.sbatch")
      check(["python", "-m", "caprl_jax.main", *arguments[place + 1 :]])
      sizes = dict(re.findall(r"--(nodes|ntasks-per-node)=(\d+)", shlex.join(arguments[:place])))
      check_split(arguments[place + 1 :], math.prod(map(int, sizes.values())))
    case ["python", "-m", module, *arguments] if module.startswith("benchmarks."):
      check(["python", f"{module.replace('.', '/')}.py", *arguments])
    case ["python", script, *arguments] if script.startswith("benchmarks/"):
      source = (ROOT / script).read_text()
      for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag != "--" and f'"{flag}"' not in source:
          raise ValueError(f"{script} has no flag {flag}")
    case ["bash", script, *arguments] if script.startswith("launch/"):
      source = (ROOT / script).read_text()
      for argument in arguments:
        flag = argument.partition("=")[0]
        if flag == "--":
          break
        if flag.startswith("--") and not re.search(rf"{flag}\b", source):
          raise ValueError(f"{script} has no flag {flag}")
        if argument.endswith("_test.py") and not (ROOT / argument).is_file():
          raise ValueError(f"{argument} does not exist")
    case ["pip", "install", *arguments]:
      for argument in arguments:
        for extra in re.findall(r"^\.\[(.*)\]$", argument):
          if unknown := set(extra.split(",")) - extras():
            raise ValueError(f"no such extras: {unknown}")
    case ["sky", "jobs", *arguments]:
      for argument in arguments:
        if argument.startswith("launch/") and not (ROOT / argument).is_file():
          raise ValueError(f"{argument} does not exist")
    case ["ruff", "check" | "format", *_] | ["source", ".venv/bin/activate"]:
      pass
    case ["gcloud" | "kubectl" | "nvidia-smi" | "chmod" | "export", *_]:
      pass  # tools of others, of which nothing is known here
    case _:
      raise ValueError(f"this test does not know the program of {shlex.join(command)!r}")


def check_split(arguments: list[str], devices: int) -> None:
  """Raises ValueError where so many devices cannot share the batch of a command of mode train."""
  config, *_ = main._parse(main._define_flags(), ["main", *arguments])
  settings = read_settings(config)
  update = settings.step.update
  sharding.check_batch_size(
    settings.data.batch_size,
    sharding.abstract_mesh(settings.mesh, devices),
    "data.batch_size",
    {"minibatches": update.minibatches, "microbatches": update.microbatches},
  )


@functools.cache
def extras() -> set[str]:
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg")
  return set(parser["options.extras_require"])


def problems_of(block: Block) -> list[str]:
  """What is wrong with a block, as it can be told without running it; in a folder with configs/."""
  looks_so = "caprl_jax.main" in block.text or block.text.startswith("$ ")
  if block.language not in SHELL:
    return [f"{block.place}: commands in a block that is not {SHELL}"] if looks_so else []
  mark = MARK.fullmatch(block.before)
  if not mark or mark["kind"] == "parsed only" and not mark["text"].strip():
    return [f"{block.place}: commands without a mark in the line before (see tests/docs_test.py)"]
  commands, found = commands_of(block), []
  if not commands:
    return [f"{block.place}: no command in it"]
  for command in commands:
    try:
      check(command)
    except (ValueError, OSError) as error:
      found.append(f"{block.place}: {error}")
  return found


DOCUMENT_BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path, path.read_text())]
SHELL_BLOCKS = [block for block in DOCUMENT_BLOCKS if block.language in SHELL]


def run_blocks(kind: str) -> list[Block]:
  marked = [(block, MARK.fullmatch(block.before)) for block in SHELL_BLOCKS]
  return [block for block, mark in marked if mark and mark["kind"] == kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder that looks like the repository's to a command."""
  made = tmp_path_factory.mktemp("repository")
  for name in ("configs", "benchmarks", "launch"):
    (made / name).symlink_to(ROOT / name)
  return made


@pytest.fixture(scope="module")
def sandbox(folder):
  """`folder` with tiny models, and what the blocks to run first have left."""
  from helpers import tiny  # it needs torch

  tiny.write_all(folder / "tiny")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    for block in run_blocks("run first"):
      assert set(run(block, folder).values()) == {0}, block.place
  return folder


def run(block: Block, folder: pathlib.Path) -> dict[str, int]:
  """Runs a block's commands up to the first that fails: each with its exit code."""
  text = MARK.fullmatch(block.before)["text"]
  text = text.replace("{tiny_data}", TINY_DATA).replace("{tiny_sizes}", TINY_SIZES)
  added = shlex.split(text.replace("{tiny}", str(folder / "tiny")))
  codes: dict[str, int] = {}
  for command in commands_of(block):
    assert command[:3] == ["python", "-m", "caprl_jax.main"], f"{block.place}: not run here"
    codes[shlex.join(command)] = code = main.main(["main", *command[3:], *added])
    if code:
      break
  return codes


# ---- commands ----


@pytest.mark.parametrize("block", DOCUMENT_BLOCKS, ids=lambda block: block.place)
def test_commands_are_marked_and_parse(block, folder, monkeypatch):
  monkeypatch.chdir(folder)
  assert problems_of(block) == []


@pytest.mark.slow
@pytest.mark.parametrize(
  "block", run_blocks("run first") + run_blocks("run"), ids=lambda block: block.place
)
def test_commands_run(block, sandbox, monkeypatch):
  monkeypatch.chdir(sandbox)
  if block not in run_blocks("run first"):  # those have run, for `sandbox`
    assert set(run(block, sandbox).values()) == {0}


@pytest.mark.parametrize(
  "language, before, text, message",
  [
    ("bash", "", "bash launch/test.sh", "without a mark"),
    ("bash", "<!-- parsed only: -->", "bash launch/test.sh", "without a mark"),
    ("", "", "$ python -m caprl_jax.main --help", "not ('bash'"),
    ("console", "<!-- run: -->", "printed", "no command"),
    ("bash", "<!-- run: -->", "python -m caprl_jax.main --confg=a.py", "unknown flag --confg=a.py"),
    (
      "bash",
      "<!-- run: -->",
      "python -m caprl_jax.main --config=configs/a.py --workdir=a",
      "does not exist",
    ),
    (
      "console",
      "<!-- parsed only: slow -->",
      "$ A=b python -m caprl_jax.main --config=configs/quickstart.py --workdir=a \\\n"
      "    --config.judge.int_8=True\nprinted",
      "did you mean --config.judge.int8",
    ),
    ("bash", "<!-- run: -->", "python benchmarks/misled.py --sedes 1", "no flag --sedes"),
    ("bash", "<!-- run: -->", "bash launch/tpu_vm.sh all --nmae=a", "no flag --nmae"),
    ("bash", "<!-- run: -->", "pip install x && pip install '.[tpuu]'", "extras: {'tpuu'}"),
    ("bash", "<!-- run: -->", "sky jobs launch launch/sky.yaml", "launch/sky.yaml does not exist"),
    ("bash", "<!-- run: -->", "caprl_jax --config=caprl_jax:quickstrat", "mean 'quickstart'"),
    ("bash", "<!-- run: -->", "bash launch/local.sh 2 --confg=a", "unknown flag --confg=a"),
    ("bash", "<!-- run: -->", "sbatch launch/slurm.sbatch --confg=a", "unknown flag --confg=a"),
    (
      "bash",
      "<!-- run: -->",
      "sbatch --nodes=2 --ntasks-per-node=8 launch/slurm.sbatch --config=configs/caprl_3b.py"
      " --workdir=a",
      "microbatches = 16 cuts data.batch_size = 128 into pieces of 8 images",
    ),
    ("bash", "<!-- run: -->", "frobnicate", "does not know"),
  ],
)
def test_a_bad_block_is_found(language, before, text, message, folder, monkeypatch):
  monkeypatch.chdir(folder)
  [found] = problems_of(Block(pathlib.Path("a.md"), 3, language, before, text))
  assert found.startswith("a.md:3: ") and message in found


def config_problems(text: str) -> list[str]:
  """What is wrong with the commands in a config's docstring; in a folder with configs/."""
  found, before = [], ""
  for line in text.splitlines():
    follows = line.lstrip().startswith("--") and before.lstrip().startswith(("python -m", "--"))
    if follows and not before.endswith("\\"):
      found.append(f"{before.strip()!r} is to end in a backslash")
    before = line
  for line in text.replace("\\\n", " ").splitlines():
    if line.lstrip().startswith("python -m caprl_jax.main"):
      try:
        check(shlex.split(line, comments=True))
      except ValueError as error:
        found.append(str(error))
  return found


@pytest.mark.parametrize(
  "path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: path.name
)
def test_commands_in_configs_parse(path, folder, monkeypatch):
  monkeypatch.chdir(folder)
  text = ast.get_docstring(ast.parse(path.read_text()))
  assert f"--config={path.relative_to(ROOT)}" in text
  assert config_problems(text) == []


@pytest.mark.parametrize(
  "text, message",
  [
    ("  python -m caprl_jax.main --config=configs/a.py --workdir=a", "does not exist"),
    ("  python -m caprl_jax.main --config=configs/demo.py\n    --workdir=a", "end in a backslash"),
    (
      "  python -m caprl_jax.main --config=configs/demo.py \\\n    --config.demo.prot=1",
      "did you mean --config.demo.port",
    ),
  ],
)
def test_a_bad_command_in_a_config_is_found(text, message, folder, monkeypatch):
  monkeypatch.chdir(folder)
  [found] = config_problems(text)
  assert message in found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_json_and_python_blocks_parse(path):
  for block in blocks_of(path, path.read_text()):
    if block.language == "python":
      assert ast.parse(f"def body():\n{textwrap.indent(block.text, '  ')}").body, block.place
    elif block.language == "json":
      assert values_of(block.text), block.place


def values_of(text: str) -> list:
  """The JSON value that a text is, or those of its lines."""
  try:
    return [json.loads(text)]
  except ValueError:
    return [json.loads(line) for line in text.splitlines()]


# ---- keys and files that are named in the text ----


def inline_code(path: pathlib.Path) -> list[str]:
  text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
  return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("path", TRUE_TODAY, ids=lambda path: path.name)
def test_keys_that_are_named_exist(path):
  known = set(keys.keys())
  starts = {key.partition(".")[0] for key in known}
  for code in inline_code(path):
    for match in re.finditer(r"(?:^|--config\.|\()([a-z_]+(?:\.[a-z_0-9]+)+)", code):
      key = match[1]
      if key.partition(".")[0] in starts and not re.search(r"\.(py|json|jsonl|html|png|txt)$", key):
        a_section = any(one.startswith(f"{key}.") for one in known)
        assert a_section or keys.annotation_of(key) is not None, f"{path.name}: {key}"


@pytest.mark.parametrize("path", TRUE_TODAY, ids=lambda path: path.name)
def test_files_that_are_named_exist(path):
  for code in inline_code(path):
    if re.fullmatch(r"[a-z_0-9]+(/[a-z_0-9.]+)*\.(py|sh|ipynb)", code) and "/" in code:
      places = [ROOT / code, ROOT / "caprl_jax" / code]
      assert any(place.is_file() for place in places), f"{path.name}: {code}"
    elif re.fullmatch(r"caprl_jax(\.[a-z_0-9]+)+(\.[A-Z]\w*)?", code):
      module = re.sub(r"\.[A-Z]\w*$", "", code).replace(".", "/")
      assert (ROOT / f"{module}.py").is_file() or (ROOT / module).is_dir(), f"{path.name}: {code}"


def test_parts_are_those_of_the_package():
  from layering_test import ORDER

  text = (ROOT / "docs" / "code.md").read_text()
  parts = text[text.index("## Parts") : text.index("## Letters")]
  named = [part for part in re.findall(r"`(\w+)(?:/|\.py)` ", parts) if part in ORDER]
  assert named == ORDER
  for item in parts[: parts.index("Outside the package")].split("\n- ")[1:]:
    part = re.match(r"`(\w+)/`", item)
    files = {path.name for path in (ROOT / "caprl_jax" / (part[1] if part else "")).rglob("*.py")}
    assert not set(re.findall(r"`(\w+\.py)`", item)) - files, item
  readme = (ROOT / "README.md").read_text()
  table = readme[readme.index("## The code") :]
  shown = re.findall(r"`(\w+)/?`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
  assert shown == [part for part in ORDER if part != "main"]


def test_modes_in_the_readme_are_those_of_the_registry():
  table = (ROOT / "README.md").read_text()
  assert sorted(re.findall(r"^\| \[`(\w+)`\]", table, re.MULTILINE)) == sorted(registry.MODES)


# ---- the step ----


def step_body() -> str:
  """The body of train_step, without its signature and docstring."""
  source = inspect.getsource(step.train_step)
  return textwrap.dedent(source.split('"""')[2]).strip()


def test_the_readme_shows_the_step():
  [shown] = [block.text for block in DOCUMENT_BLOCKS if block.before == STEP_MARK]
  assert shown == step_body(), f"README.md is to show this:\n{step_body()}"


# ---- links, sizes ----


def anchor(heading: str) -> str:
  """GitHub's anchor of a heading."""
  plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
  return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@functools.cache
def anchors(path: pathlib.Path) -> set[str]:
  text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
  return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_exist(path):
  text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if re.match(r"https?://", target):
      continue
    file, _, place = target.partition("#")
    found = (path.parent / file).resolve() if file else path
    assert found.exists() and found.is_relative_to(ROOT), f"{path.name}: {target}"
    assert not place or place in anchors(found), f"{path.name}: {target}"


def test_every_page_is_in_the_index():
  index = (ROOT / "docs" / "index.md").read_text()
  for path in (ROOT / "docs").glob("*.md"):
    assert path.name == "index.md" or f"({path.name})" in index, path.name


def test_the_readme_is_short():
  text = (ROOT / "README.md").read_bytes()
  assert len(text) <= 14 * 1024 and len(text.splitlines()) <= 150
