"""launch/colab.ipynb: a valid notebook that runs from top to bottom on a CPU; kaggle.ipynb is the
same, with other settings."""

import ast
import html
import json
import re
import sys

import pytest
from helpers import tiny
from helpers.paths import ROOT

from caprl_jax.config import keys, loading, shipped

for needed in ("nbformat", "nbclient", "ipykernel"):
  pytest.importorskip(
    needed,
    reason=f"{needed} is missing: {sys.executable} -m pip install nbformat nbclient ipykernel",
  )
import nbclient  # noqa: E402  # pylint: disable=wrong-import-position
import nbformat  # noqa: E402  # pylint: disable=wrong-import-position

NOTEBOOK = ROOT / "launch" / "colab.ipynb"
KAGGLE = ROOT / "launch" / "kaggle.ipynb"

CONFIG = """
import json
import ml_collections

def get_config():
  return ml_collections.ConfigDict(json.loads({config!r}))
"""


def read(path=NOTEBOOK):
  return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def by_id(notebook):
  return {cell.id: cell for cell in notebook.cells}


def printed(cell):
  return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def shown(cell):
  return "".join(
    output.data.get("text/html", "")
    for output in cell.outputs
    if output.output_type == "display_data"
  )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp("colab") / "run"


@pytest.fixture(scope="module")
def executed(workdir):
  """The cells by id, run in order by a kernel as Jupyter does, with tiny models and two steps."""
  folder = workdir.parent
  config = tiny.write_all(folder / "tiny")
  (folder / "config.py").write_text(CONFIG.format(config=config.to_json()))
  notebook = read()
  [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
  parameters.source = (
    f"CONFIG, WORKDIR = {str(folder / 'config.py')!r}, {str(workdir)!r}\n"
    "OVERRIDES = ['--config.train.steps=2', "
    "'--config.checkpoint.every_steps=4']"
  )
  with pytest.MonkeyPatch.context() as patch:  # the kernel inherits it
    patch.setenv("JAX_PLATFORMS", "cpu")
    patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "jupyter"))
    patch.setenv("IPYTHONDIR", str(folder / "ipython"))
    client = nbclient.NotebookClient(
      notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()  # raises what a cell raises
  return by_id(notebook)


@pytest.mark.parametrize("path", [NOTEBOOK, KAGGLE], ids=lambda path: path.stem)
def test_it_is_valid_and_holds_no_outputs(path):
  notebook = read(path)
  nbformat.validate(notebook)
  assert notebook.nbformat == 4 and notebook.nbformat_minor >= 5
  ids = [cell["id"] for cell in json.loads(path.read_text())["cells"]]
  assert len(set(ids)) == len(ids)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  for cell in code:
    assert not cell.outputs and cell.execution_count is None, cell.id
    ast.parse(cell.source)
  assert [cell.id for cell in code if cell.metadata.get("tags") == ["parameters"]] == ["parameters"]


def test_what_it_names_exists():
  cells = by_id(read())
  values = {}
  exec(cells["parameters"].source, values)  # pylint: disable=exec-used
  assert (values["CONFIG"], values["WORKDIR"], values["OVERRIDES"]) == (
    "caprl_jax:quickstart",
    "runs/colab",
    [],
  )
  for path in (NOTEBOOK, KAGGLE):
    text = path.read_text()
    named = set(re.findall(r"caprl_jax:([a-z_]+)", text))
    named |= set(re.findall(r'caprl\(\\n",\s+" +\\"([a-z_]+)\\"', text))
    assert named == {"quickstart", "colab_lora", "export", "curate", "caption"}
    assert named <= set(shipped.names())
    for key in re.findall(r"--config\.([a-z_.]+)=", text):
      assert keys.annotation_of(key) is not None, key
  # The judge's package as in launch/quickstart.sh.
  [package] = re.findall(
    r'^judge_package="(.*)"$', (ROOT / "launch" / "quickstart.sh").read_text(), re.MULTILINE
  )
  assert f'"--no-deps", "{package}"' in cells["install"].source


def test_kaggle_differs_in_settings_alone():
  """Its code is the notebook's that is executed; batches are shared by its eight chips."""
  colab, kaggle = by_id(read()), by_id(read(KAGGLE))
  assert list(colab) == list(kaggle)
  differ = {name for name in colab if colab[name].source != kaggle[name].source}
  code = {name for name in differ if colab[name].cell_type == "code"}
  assert code == {"parameters", "lora", "export", "mine-parameters"}
  values = {}
  exec(kaggle["parameters"].source, values)  # pylint: disable=exec-used
  exec(kaggle["lora"].source.partition("\n\n")[0], values)  # pylint: disable=exec-used
  overridden = {"CONFIG": values["OVERRIDES"], "LORA_CONFIG": values["LORA_OVERRIDES"]}
  for name, overrides in overridden.items():
    config = loading.load_config(values[name])
    loading.apply_overrides(config, [loading.OVERRIDE.fullmatch(one) for one in overrides], name)
    images = config.data.batch_size
    assert images % 8 == 0 and config.evaluate.batch_size % 8 == 0
    assert images // config.policy_update.microbatches % 8 == 0


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(executed, workdir):
  code = [cell for cell in executed.values() if cell.cell_type == "code"]
  assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
  assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
  assert f"caprl_jax is here already, in {ROOT}" in printed(executed["install"])
  log = printed(executed["train"])
  assert (
    "mode train" in log and "before: accuracy" in log and "CapRL 2/2" in log and "report: " in log
  )
  # the overrides were passed on
  assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_it_shows_images_with_captions_before_and_after(executed, workdir):
  table = shown(executed["captions"])
  assert table.count('src="data:image/png;base64,iVBOR') == 8 and table.count("<tr>") == 9
  rows = {
    stage: tiny.read_back(workdir / "samples" / f"{stage}.json")["rows"]
    for stage in ("before", "after")
  }
  cells = re.findall(r"<td[^>]*>(.*?)</td>", table, re.DOTALL)
  assert len(cells) == 8 * 4
  for i, (before, after) in enumerate(zip(rows["before"][:8], rows["after"])):
    _, questions, *captions = cells[4 * i : 4 * i + 4]
    assert "what color is the shape? (" in questions and "what shape is present? (" in questions
    for row, cell in zip((before, after), captions):
      text, _, right = cell.partition("<br>")
      assert text == html.escape(row["captions"][0]["text"])
      assert right.startswith(
        f"<small>{sum(a['correct'] for a in row['captions'][0]['answers'])} of 2 right"
      )
  summary = tiny.read_back(workdir / "summary.json")
  lines = printed(executed["captions"]).splitlines()
  assert [line.partition(" tokens")[0] for line in lines] == [
    f"{stage}: the judge answers {100 * summary[stage]['accuracy']:.1f}% of 24 questions right, "
    f"{summary[stage]['length_tokens']:.1f}"
    for stage in ("before", "after")
  ]
  [page] = re.findall(r'<iframe srcdoc="([^"]*)"', shown(executed["report"]))
  assert html.unescape(page) == (workdir / "report.html").read_text() and "&lt;svg" in page


@pytest.mark.slow
def test_lora_asks_for_an_accelerator_and_starts_nothing(executed):
  assert "needs an accelerator with 16 GB" in printed(executed["lora"])
  assert "mode train" not in printed(executed["lora"]) and not shown(executed["lora"])
  assert "nothing to export" in printed(executed["export"])
  assert "Set IMAGES in the cell above" in printed(executed["mine-questions"])
  assert not printed(executed["mine-train"]) and not printed(executed["mine-export"])
