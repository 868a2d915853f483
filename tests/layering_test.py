"""The import order of the modules, and what no module of the package may import or spell."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "caprl_jax"

# Top to bottom: a module may import only what stands above it. A new module goes where it belongs.
ORDER = [
  "types", "masked", "files", "configuration", "presets", "config_file", "endpoint", "sharding",
  "data.rows", "data.jsonl", "data.released", "data.generated", "data.parquet", "data.datasets", "data.pictures",
  "data.easy_vqa", "data.chart_drawing", "data.chart_tables", "data.chart_questions", "data.charts", "data.sources",
  "data.benchmarks", "data.images", "data.similar",
  "models.gguf", "models.files", "models.tokenizer",
  "models.layers", "models.attention", "models.decoder",
  "models.family", "models.qwen25_vl", "models.qwen3_vl", "models.internvl", "models.families",
  "models.policy", "models.head", "models.weights", "models.chat", "models.lora", "models.load", "models.compose",
  "models.published", "models.quantize",
  "data.prompts", "data.judge_prompts", "data.questions", "data.batches",
  "sampling", "rollout", "presenting", "judging", "caption_terms", "reward", "advantages", "loss",
  "optimizer", "update", "step",
  "translate", "metrics", "trackers", "checkpoint", "loop", "asking", "scoring", "official_scoring", "intervals",
  "answering", "open_answering",
  "data.conversations", "data.rendering", "data.packing",
  "next_token", "vqa", "writing", "curate", "setup_run", "calibrate",
  "samples", "evaluate", "curves", "report_template", "report", "dataset",
  "sft", "train", "pretrain_policy", "pretrain_record", "pretrain",
  "caption_shards", "caption_formats", "caption_report", "caption",
  "curation_page", "curation", "kept", "prism_figures", "prism_page", "prism", "export", "plan", "gallery_page",
  "gallery", "demo",
  "sections", "main",
]  # fmt: skip

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
  found = []
  packages = {name.rpartition(".")[0] for name in sources} | {""}
  for name, source in sources.items():
    if name not in ORDER and name not in packages:
      found.append(f"{name} is not in ORDER; put it where it belongs")
      continue
    package = name if name in packages else name.rpartition(".")[0]
    tree = ast.parse(source)
    for line, imported in _imports(tree, package):
      own = imported == "caprl_jax" or imported.startswith("caprl_jax.")
      if own:
        target = _module_of(imported.removeprefix("caprl_jax").removeprefix("."), packages)
        if target is not None and not _may_import(name, target):
          found.append(f"{name}:{line} imports {target}, which does not stand above it")
      elif any(imported == f or imported.startswith(f + ".") for f in FORBIDDEN):
        found.append(f"{name}:{line} imports {imported}")
    if name != "sharding":
      found += [f"{name}:{line} spells the mesh axis {axis!r}" for line, axis in _mesh_axes(tree)]
  return found


def _may_import(name: str, target: str) -> bool:
  # A package's __init__ is not in the order: it runs before all of its modules, so it imports none.
  return name in ORDER and target in ORDER and ORDER.index(target) < ORDER.index(name)


def _module_of(dotted: str, packages: set[str]) -> str | None:
  """The module that `dotted` is, or is a name of; None for a package or a name of one."""
  parts = dotted.split(".")
  if len(parts) > 1 and parts[0] in packages:
    return ".".join(parts[:2])
  if parts[0] in packages or parts[0].startswith("__"):  # '' is the root package
    return None
  return parts[0]


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
    elif isinstance(node, ast.Attribute):
      if isinstance(node.value, ast.Name) and (node.value.id, node.attr) == ("flax", "nnx"):
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
  assert "types" in sources and "models" in sources  # it read the right folder
  assert violations(sources) == []


def test_the_order_names_each_module_once():
  assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize(
  "name, source, message",
  [
    ("loss", "from caprl_jax import step", "loss:1 imports step, which does not stand above it"),
    ("loss", "import caprl_jax.train", "loss:1 imports train, which"),
    ("loss", "import caprl_jax.loss", "loss:1 imports loss, which"),
    ("loss", "def f():\n  from caprl_jax.step import train_step", "loss:2 imports step, which"),
    ("loss", "from . import masked, step", "loss:1 imports step, which"),
    ("loss", "from .step import f", "loss:1 imports step, which"),
    ("models.layers", "from ..data import prompts", "models.layers:1 imports data.prompts, which"),
    ("models.layers", "from . import policy", "models.layers:1 imports models.policy, which"),
    ("models.layers", "from caprl_jax.models.policy import X", "1 imports models.policy, which"),
    ("models", "from caprl_jax.models import layers", "models:1 imports models.layers, which"),
    ("", "from caprl_jax import types", ":1 imports types, which"),
    ("loss", "from caprl_jax import helpers", "loss:1 imports helpers, which"),
    ("helpers", "", "helpers is not in ORDER"),
    ("loss", "from flax import nnx", "loss:1 imports flax.nnx"),
    ("loss", "import flax\nflax.nnx.Linear", "loss:2 imports flax.nnx"),
    ("loss", "import tensorflow as tf", "loss:1 imports tensorflow"),
    ("loss", "from torch.nn import functional", "loss:1 imports torch.nn.functional"),
    ("loss", "x = P(None, ('data', 'fsdp'))", "loss:1 spells the mesh axis 'data'"),
    ("loss", "x = jax.sharding.PartitionSpec('tensor')", "loss:1 spells the mesh axis 'tensor'"),
    ("loss", "x = f(x, NamedSharding(m, spec=g('fsdp')))", "loss:1 spells the mesh axis 'fsdp'"),
  ],
)
def test_a_broken_rule_is_found(name, source, message):
  found = violations({"models.layers": "", "data.rows": "", "loss": ""} | {name: source})
  assert found and message in found[0]


@pytest.mark.parametrize(
  "name, source",
  [
    ("step", "from caprl_jax import loss, types\nfrom caprl_jax.models.policy import Policy"),
    ("step", "from caprl_jax import __version__\nimport caprl_jax"),
    ("step", "from caprl_jax import models\nfrom caprl_jax.models import policy"),
    ("data.prompts", "from ..models import tokenizer\nfrom .rows import Row\nfrom .. import types"),
    ("loss", "import tensorflow_datasets, torchvision_like\nfrom flax import linen as nn"),
    ("loss", "x = {'data': 1}['data']\ny = nn.with_partitioning(f, ('tensor',))"),
    ("sharding", "x = P('data')"),
  ],
)
def test_what_is_allowed_is_not_found(name, source):
  assert violations({"models.layers": "", "data.rows": "", "loss": ""} | {name: source}) == []
