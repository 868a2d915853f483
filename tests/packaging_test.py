"""What `python -m build` makes: a source distribution that is whole, and a wheel that works from
anywhere."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from helpers.paths import ROOT

import caprl_jax

pytest.importorskip("build", reason=f"build is missing: {sys.executable} -m pip install build")

pytestmark = pytest.mark.slow

# What a build leaves behind, environments and runs: all that .gitignore names, and git itself.
NOT_SOURCE = shutil.ignore_patterns(
  ".git", ".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
)

IMPORT_ALL = """
import importlib, pkgutil, caprl_jax
names = [m.name for m in pkgutil.walk_packages(caprl_jax.__path__, "caprl_jax.")]
for name in names:
  importlib.import_module(name)
print(caprl_jax.__file__)
print(*names)
"""


def sources(suffix: str = ".py") -> set[str]:
  """Paths of the package's modules, relative to the repository."""
  return {str(path.relative_to(ROOT)) for path in (ROOT / "caprl_jax").rglob(f"*{suffix}")}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> pathlib.Path:
  """A folder with both distributions; the wheel is built from the source distribution, not from
  the repository."""
  folder = tmp_path_factory.mktemp("built")
  shutil.copytree(ROOT, folder / "copy", ignore=NOT_SOURCE)
  done = subprocess.run(
    [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "copy"],
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return folder


@pytest.fixture(scope="module")
def installed(built) -> pathlib.Path:
  """A folder in which the wheel, and nothing else, is installed."""
  [wheel] = built.glob("*.whl")
  command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
  done = subprocess.run(
    [*command, "--target", built / "installed", wheel], capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  return built / "installed"


def run_elsewhere(installed: pathlib.Path, folder: pathlib.Path, *arguments: str) -> str:
  """What Python prints in another folder, with the installed wheel before anything else."""

  environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return done.stdout


def configs() -> set[str]:
  """Paths in the wheel of what comes along from configs/: all of it but a picture."""
  folder = ROOT / "configs"
  found = [*folder.rglob("*.py"), *(folder / "quickstart_policy").iterdir()]
  return {f"caprl_jax/_configs/{path.relative_to(folder)}" for path in found if path.is_file()}


def test_the_wheel_holds_the_package_and_its_configs_and_nothing_else(built):
  [wheel] = built.glob("*.whl")
  names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
  assert names == sources() | sources(".pyi") | configs()
  entry_points = zipfile.ZipFile(wheel).read(
    f"caprl_jax-{caprl_jax.__version__}.dist-info/entry_points.txt"
  )
  assert b"caprl_jax = caprl_jax.main:console" in entry_points


def test_the_source_distribution_holds_all_that_the_repository_does(built):
  [archive] = built.glob("*.tar.gz")
  with tarfile.open(archive) as tar:
    names = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
  kept = {
    str(path.relative_to(ROOT))
    for top in ("configs", "docs", "launch", "tests", "benchmarks", ".ci", ".github")
    for path in (ROOT / top).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
  }
  kept |= {path.name for path in ROOT.glob("*.md")} | {"LICENSE", "CITATION.cff", "pyproject.toml"}
  assert not (kept | sources() | sources(".pyi")) - names
  assert not [name for name in names if name.endswith(".pyc") or name.startswith("runs/")]


def test_the_installed_command_helps_from_another_folder(installed, tmp_path):
  printed = run_elsewhere(installed, tmp_path, "-m", "caprl_jax.main", "--help")
  assert "Modes (config.mode" in printed
  # Its examples need no clone.
  assert "  caprl_jax --config=caprl_jax:quickstart --workdir=runs/quickstart\n" in printed
  assert "--config=configs/" not in printed


def test_the_installed_command_trains_from_its_own_configs_in_an_empty_folder(installed, tmp_path):
  """The first seconds of the quickstart: its config, its captioner and its questions are found; the
  judge is named wrong, which is what ends it."""
  command = [installed / "bin" / "caprl_jax", "--config=caprl_jax:quickstart", "--workdir=run"]
  environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
  run = lambda *arguments: subprocess.run(
    [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
  )
  done = run("--config.judge.source=package:nowhere")
  assert done.returncode == 2 and "nowhere" in done.stderr, done.stderr[-3000:]
  assert (tmp_path / "run" / "log.txt").is_file() and not (tmp_path / "configs").exists()
  kept = (tmp_path / "run" / "log.txt").read_text()
  assert str(installed / "caprl_jax" / "_configs" / "quickstart_policy") in kept
  wrong = run("--config=caprl_jax:quickstrat")
  assert wrong.returncode == 2 and "did you mean 'quickstart'" in wrong.stderr
  assert "ablations/judge_size" in wrong.stderr


def test_every_installed_module_can_be_imported(installed, tmp_path):
  place, names = run_elsewhere(installed, tmp_path, "-c", IMPORT_ALL).splitlines()
  assert pathlib.Path(place).is_relative_to(installed)
  modules = {
    path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sources()
  }
  assert set(names.split()) == modules - {"caprl_jax"}
