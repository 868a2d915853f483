"""Habits that a reader feels: one format, short functions, short files, folders that fit on a
screen."""

import ast
import pathlib
import shutil
import subprocess
import sys

import pytest
from helpers.paths import ROOT

PACKAGE = ROOT / "caprl_jax"
FUNCTION_LINES = 60  # without its docstring
FILE_LINES = 450
FOLDER_FILES = 14
REASON = "Long because"  # in the docstring, or in the comment above `def`


def ruff(*arguments: str) -> subprocess.CompletedProcess:
  program = pathlib.Path(sys.executable).with_name("ruff")
  if not program.exists():
    found = shutil.which("ruff")
    if found is None:
      pytest.skip(f"ruff is missing: {sys.executable} -m pip install 'ruff==0.17.*'")
    program = pathlib.Path(found)
  return subprocess.run(
    [program, *arguments, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120
  )


def long_functions(source: str) -> list[tuple[str, int]]:
  """(dotted name, lines) of functions that are too long and do not say why."""
  lines, found = source.splitlines(), []

  def walk(node: ast.AST, prefix: str) -> None:
    for child in ast.iter_child_nodes(node):
      name = prefix
      if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        name = f"{prefix}{child.name}."
      if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
        length = _length(child)
        if length > FUNCTION_LINES and not _says_why(child, lines):
          found.append((name[:-1], length))
      walk(child, name)

  walk(ast.parse(source), "")
  return found


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
  first = function.body[0]
  documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
  docstring = first.end_lineno - first.lineno + 1 if documented else 0
  return function.end_lineno - function.lineno + 1 - docstring


def _says_why(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> bool:
  first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
  above = first - 2
  while above >= 0 and lines[above].strip().startswith("#"):
    if REASON in lines[above]:
      return True
    above -= 1
  return REASON in (ast.get_docstring(function) or "")


def test_ruff_finds_nothing():
  done = ruff("check", "--output-format=concise", ".")
  assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_would_change_nothing():
  done = ruff("format", "--check", ".")
  assert done.returncode == 0, done.stdout + done.stderr


def test_functions_are_short_or_say_why():
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    for name, length in long_functions(path.read_text()):
      found[f"{path.relative_to(PACKAGE)}:{name}"] = length
  assert found == {}, f"longer than {FUNCTION_LINES} lines: split it, or say why in it"


def test_files_are_short():
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    lines = path.read_text().count("\n")
    if lines > FILE_LINES:
      found[str(path.relative_to(PACKAGE))] = lines
  assert found == {}, f"longer than {FILE_LINES} lines: split it where a second idea begins"


def test_a_folder_fits_on_a_screen():
  for top in (
    "caprl_jax",
    "tests",
    "benchmarks",
    "launch",
  ):  # configs and docs have lists of their own
    for folder in [ROOT / top, *(ROOT / top).rglob("*/")]:
      if folder.name != "__pycache__":
        files = {path.name for path in folder.iterdir() if path.is_file()} - {"__init__.py"}
        assert len(files) <= FOLDER_FILES, f"{folder.relative_to(ROOT)} has {len(files)} files"


@pytest.mark.parametrize(
  "head, found",
  [
    ("def f():", [("f", 62)]),
    ("# Long because of this.\ndef f():", []),
    ("# Long because of this.\n# Really.\n@cache\ndef f():", []),
    ('def f():\n  """Does it.\n\n  Long because of this.\n  """', []),
    ("# Long because of this.\n\ndef f():", [("f", 62)]),
    ('def f():\n  """Does it.\n\n  A long story.\n  """', [("f", 62)]),
  ],
)
def test_a_long_function_is_found_unless_it_says_why(head, found):
  assert long_functions(head + "\n  x = 1" * 61) == found


def test_a_function_of_sixty_lines_and_a_method_are_told_apart():
  assert long_functions("def f():" + "\n  x = 1" * 59) == []
  assert long_functions("class A:\n  def f(self):" + "\n    x = 1" * 60) == [("A.f", 61)]
