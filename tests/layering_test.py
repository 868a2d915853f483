"""The import order of the folders, and what no module of the package may import or spell."""

import ast

import pytest
from helpers.paths import ROOT

PACKAGE = ROOT / "caprl_jax"

# Bottom to top: a module may import only what lies in a folder (or is a module) before its own.
# Inside a folder, imports make no circle.
ORDER = [
  "types",
  "errors",
  "progress",
  "masked",
  "host_memory",
  "sharding",
  "rungs",
  "atomic_files",
  "json_files",
  "image_files",
  "hub_datasets",
  "released_texts",
  "config",
  "scoring",
  "pages",
  "models",
  "rl",
  "hub",
  "supervised",
  "data",
  "inference",
  "harness",
  "modes",
  "api",
  "main",
]

# The folders of arrays: they know no files, clocks, text formats, configs as typed, logs or bars.
PURE = ("rl", "supervised", "models")
IMPURE = (
  "os",
  "io",
  "pathlib",
  "shutil",
  "subprocess",
  "tempfile",
  "time",
  "json",
  "logging",
  "ml_collections",
  "tqdm",
)

# Why not: nnx breaks on recent jax, and the others are heavy and must not be needed to run.
FORBIDDEN = ("flax.nnx", "tensorflow", "torch")
MESH_AXES = ("data", "fsdp", "tensor")
SHARDING_CALLS = ("PartitionSpec", "P", "NamedSharding", "with_sharding_constraint")


def read_package() -> dict[str, str]:
  """Module name without `caprl_jax.` -> source. A package is named as its folder, the root ''."""
  sources = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
  return sources


def violations(sources: dict[str, str]) -> list[str]:
  """One line for each place that breaks a rule. `sources` is as `read_package` returns it."""
  found, arrows = [], {}
  packages = {""} | {
    name.rpartition(".")[0][:end] for name in sources for end in _ends(name.rpartition(".")[0])
  }
  for name, source in sources.items():
    floor = name.partition(".")[0]
    if floor and floor not in ORDER:
      found.append(f"{name} is not in ORDER; put it where it belongs")
      continue
    package = name if name in packages else name.rpartition(".")[0]
    tree = ast.parse(source)
    for line, imported in _imports(tree, package):
      if imported == "caprl_jax" or imported.startswith("caprl_jax."):
        target = _module_of(imported.removeprefix("caprl_jax").removeprefix("."), packages)
        if target is None:
          continue
        if name in packages:  # its __init__ runs before all of its modules
          found.append(f"{name}:{line} imports {target}, but an __init__ imports nothing of ours")
        elif not _stands_below(target, name):
          found.append(f"{name}:{line} imports {target}, which does not stand below it")
        else:
          arrows.setdefault(name, {})[target] = line
      elif any(imported == f or imported.startswith(f + ".") for f in FORBIDDEN):
        found.append(f"{name}:{line} imports {imported}")
      elif floor in PURE and imported.partition(".")[0] in IMPURE:
        found.append(f"{name}:{line} imports {imported}, but {floor}/ is pure")
    if name != "sharding":
      found += [f"{name}:{line} spells the mesh axis {axis!r}" for line, axis in _mesh_axes(tree)]
  return found + [f"circle of imports: {' -> '.join(circle)}" for circle in _circles(arrows)]


def _ends(dotted: str) -> list[int]:
  """Where a dotted name's parts end: of a.b.c after a, b and c."""
  return [i for i in range(1, len(dotted) + 1) if i == len(dotted) or dotted[i] == "."]


def _stands_below(target: str, name: str) -> bool:
  low, high = target.partition(".")[0], name.partition(".")[0]
  if low not in ORDER or target == name:
    return False
  return ORDER.index(low) < ORDER.index(high) or (low == high and "." in target)


def _circles(arrows: dict[str, dict[str, int]]) -> list[list[str]]:
  """Each circle once, found by walking down from every module."""
  done, found = set(), []

  def walk(name: str, path: list[str]) -> None:
    if name in path:
      found.append([*path[path.index(name) :], name])
    elif name not in done:
      for target in arrows.get(name, ()):
        walk(target, [*path, name])
      done.add(name)

  for name in arrows:
    walk(name, [])
  return found


def _module_of(dotted: str, packages: set[str]) -> str | None:
  """The module that `dotted` is, or is a name of; None for a package or a name of one."""
  package, parts = [], dotted.split(".")
  while parts and ".".join([*package, parts[0]]) in packages:
    package.append(parts.pop(0))
  if not parts or parts[0].startswith("__"):  # '' is the root package
    return None
  return ".".join([*package, parts[0]])


def _imports(tree: ast.AST, package: str):
  """(line, full dotted name) of everything imported, inside functions too."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = ["caprl_jax", *filter(None, package.split("."))]
        parents = parents[: len(parents) - (node.level - 1)]
        base = ".".join([*parents, *filter(None, [node.module])])
      yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
    elif isinstance(node, ast.Attribute) and ast.unparse(node) == "flax.nnx":
      yield node.lineno, "flax.nnx"  # `import flax` alone reaches it


def _mesh_axes(tree: ast.AST):
  """(line, axis) of mesh axes spelled inside calls that make shardings."""
  for node in ast.walk(tree):
    if not isinstance(node, ast.Call):
      continue
    function = node.func.attr if isinstance(node.func, ast.Attribute) else None
    function = node.func.id if isinstance(node.func, ast.Name) else function
    if function in SHARDING_CALLS:
      for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
        for part in ast.walk(argument):
          if isinstance(part, ast.Constant) and part.value in MESH_AXES:
            yield part.lineno, part.value


def test_the_package_keeps_the_rules():
  sources = read_package()
  assert "types" in sources and "models.policy" in sources  # it read the right folder
  assert violations(sources) == []


def test_the_order_is_that_of_the_folders():
  names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
  assert sorted(ORDER) == sorted(name for name in names if not name.startswith("__"))


BASE = {
  name: ""
  for name in (
    "masked",
    "models.layers",
    "rl.loss",
    "hub.load",
    "data.rows",
    "data.readers.jsonl",
    "modes.train.run",
  )
}


@pytest.mark.parametrize(
  "name, source, message",
  [
    ("rl.loss", "from caprl_jax.hub import load", "rl.loss:1 imports hub.load, which does not"),
    ("rl.loss", "import caprl_jax.modes.train.run", "rl.loss:1 imports modes.train.run, which"),
    ("rl.loss", "import caprl_jax.rl.loss", "rl.loss:1 imports rl.loss, which"),
    (
      "rl.loss",
      "def f():\n  from caprl_jax.data.rows import f",
      "rl.loss:2 imports data.rows, which",
    ),
    ("rl.loss", "from ..data import rows", "rl.loss:1 imports data.rows, which"),
    (
      "rl.loss",
      "from ..data.readers.jsonl import f",
      "rl.loss:1 imports data.readers.jsonl, which",
    ),
    (
      "models",
      "from caprl_jax.models import layers",
      "models:1 imports models.layers, but an __init__",
    ),
    ("", "from caprl_jax import types", ":1 imports types, but an __init__"),
    ("masked", "from caprl_jax import sharding", "masked:1 imports sharding, which"),
    ("rl.loss", "from caprl_jax import helpers", "rl.loss:1 imports helpers, which"),
    ("helpers", "", "helpers is not in ORDER"),
    ("data.rows", "from caprl_jax.data.readers.jsonl import f", "circle of imports: data.r"),
    ("rl.loss", "from flax import nnx", "rl.loss:1 imports flax.nnx"),
    ("rl.loss", "import flax\nflax.nnx.Linear", "rl.loss:2 imports flax.nnx"),
    ("hub.load", "import tensorflow as tf", "hub.load:1 imports tensorflow"),
    ("hub.load", "from torch.nn import functional", "hub.load:1 imports torch.nn.functional"),
    ("rl.loss", "import logging", "rl.loss:1 imports logging, but rl/ is pure"),
    (
      "models.layers",
      "from os import path",
      "models.layers:1 imports os.path, but models/ is pure",
    ),
    ("rl.loss", "x = P(None, ('data', 'fsdp'))", "rl.loss:1 spells the mesh axis 'data'"),
    (
      "rl.loss",
      "x = jax.sharding.PartitionSpec('tensor')",
      "rl.loss:1 spells the mesh axis 'tensor'",
    ),
    (
      "rl.loss",
      "x = f(x, NamedSharding(m, spec=g('fsdp')))",
      "rl.loss:1 spells the mesh axis 'fsdp'",
    ),
  ],
)
def test_a_broken_rule_is_found(name, source, message):
  sources = BASE | {"data.readers.jsonl": "from caprl_jax.data.rows import f"} | {name: source}
  found = violations(sources)
  assert found and message in found[0]


@pytest.mark.parametrize(
  "name, source",
  [
    ("rl.step", "from caprl_jax.rl import loss\nfrom caprl_jax.models.policy import Policy"),
    ("rl.step", "from caprl_jax import __version__\nimport caprl_jax"),
    ("rl.step", "from caprl_jax import models\nfrom caprl_jax.models import policy"),
    (
      "data.readers.jsonl",
      "from ...models import layers\nfrom ..rows import Row\nfrom ... import types",
    ),
    (
      "hub.load",
      "import tensorflow_datasets, torchvision_like, json\nfrom flax import linen as nn",
    ),
    ("rl.loss", "x = {'data': 1}['data']\ny = nn.with_partitioning(f, ('tensor',))"),
    ("sharding", "x = P('data')"),
  ],
)
def test_what_is_allowed_is_not_found(name, source):
  assert violations(BASE | {name: source}) == []
