"""docs/notebooks/captions_and_judge.ipynb, run by a kernel as Jupyter does, with tiny models."""

import ast
import sys

import pytest
from helpers import tiny
from helpers.paths import ROOT

for needed in ("nbformat", "nbclient", "ipykernel", "pandas"):
  pytest.importorskip(
    needed, reason=f"{needed} is missing: {sys.executable} -m pip install {needed}"
  )
import nbclient  # noqa: E402
import nbformat  # noqa: E402

NOTEBOOK = ROOT / "docs" / "notebooks" / "captions_and_judge.ipynb"


def read():
  return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def test_it_is_valid_and_what_it_names_exists():
  notebook = read()
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert not any(cell.outputs or cell.execution_count for cell in code)
  names = {}
  exec(code[0].source, names)
  for path in (names["CAPTIONER"], names["CONFIG"]):
    assert (NOTEBOOK.parent / path).exists(), path
  for cell in code:
    ast.parse(cell.source)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
  judge, policy = tiny.write_judge(tmp_path / "judge"), tiny.write_policy(tmp_path / "policy")
  notebook = read()
  cells = {cell.id: cell for cell in notebook.cells}
  cells["parameters"].source = (
    f"CAPTIONER, JUDGE, SETTINGS = {str(policy)!r}, {str(judge)!r}, {{}}\n"
    f"CONFIG, WORKDIR, STEPS = {str(ROOT / 'configs' / 'quickstart.py')!r}, 'runs', 0"
  )
  with pytest.MonkeyPatch.context() as patch:  # the kernel inherits it
    patch.setenv("JAX_PLATFORMS", "cpu")
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    patch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    nbclient.NotebookClient(
      notebook,
      timeout=200,
      kernel_name="python3",
      resources={"metadata": {"path": str(tmp_path)}},
    ).execute()  # raises what a cell raises
  shown = lambda cell: "".join(
    output.data.get("text/html", "")
    for output in cell.outputs
    if output.output_type == "display_data"
  )
  assert shown(cells["captions"]).count("<tr") == 5
  assert shown(cells["judge"]).count("The image shows a red circle.") == 1
  assert "steps: 50" in "".join(
    output.text for output in cells["train"].outputs if output.output_type == "stream"
  )
