"""pyright finds nothing in the folders that pyproject.toml names."""

import pathlib
import subprocess
import sys

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.slow

PYRIGHT = pathlib.Path(sys.executable).with_name("pyright")


def check(*arguments: str) -> subprocess.CompletedProcess:
  """Runs pyright in the repository, with the packages of this environment."""
  if not PYRIGHT.exists():
    pytest.skip(f"pyright is missing: {sys.executable} -m pip install 'pyright[nodejs]'")
  return subprocess.run(
    [PYRIGHT, "--pythonpath", sys.executable, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )


def test_pyright_finds_nothing():
  done = check()
  assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_pyright_finds_a_wrong_type(tmp_path):
  (tmp_path / "wrong.py").write_text("def f(x: int) -> str:\n  return x\n")
  done = check(str(tmp_path / "wrong.py"))
  assert done.returncode == 1 and "reportReturnType" in done.stdout, done.stdout + done.stderr
