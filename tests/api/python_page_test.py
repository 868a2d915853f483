"""docs/python.md, run from top to bottom with tiny models; what its examples do not show."""

import doctest
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from docs_test import blocks_of
from helpers import tiny
from helpers.paths import ROOT
from PIL import Image

import caprl_jax

PAGE = ROOT / "docs" / "python.md"
CONFIG = """
import json, ml_collections
def get_config():
  return ml_collections.ConfigDict(json.loads({text!r}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with what the page names."""
  folder = tmp_path_factory.mktemp("python")
  config = tiny.write_all(folder / "tiny")
  config.evaluate.batch_size = 4
  config.data.max_eval_rows = 4
  del config.advantage  # as if the file left a section out
  shutil.copytree(folder / "tiny" / "policy", folder / "internlm" / "CapRL-3B")
  shutil.copytree(folder / "tiny" / "judge", folder / "Qwen" / "Qwen2.5-3B-Instruct")
  shutil.copytree(folder / "tiny" / "data" / "images", folder / "photos")
  (folder / "configs").mkdir()
  text = CONFIG.format(text=json.dumps(config.to_dict()))
  (folder / "configs" / "quickstart.py").write_text(text)
  return folder


@pytest.fixture(scope="module")
def names(place):
  """What the page's examples have made, once all of them have printed what the page shows."""
  found = {}
  parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
  said = []
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(place)
    for block in blocks_of(PAGE, PAGE.read_text()):
      if block.language == "pycon":
        example = parser.get_doctest(block.text + "\n", found, block.place, str(PAGE), block.line)
        runner.run(example, out=said.append, clear_globs=False)
        found.update(example.globs)
  assert runner.summarize(verbose=False).failed == 0, "".join(said)
  return found


@pytest.mark.slow
def test_the_page_is_true(names, place):
  result = names["result"]
  assert caprl_jax.TrainingResult.read(place / "runs" / "python") == caprl_jax.TrainingResult(
    **vars(result) | {"workdir": place / "runs" / "python"}
  )
  log = (place / "runs" / "python" / "log.txt").read_text()
  assert "CapRL: 0 compilations after the first step" in log
  assert len(result.counts) > 0 and names["config"].mode == "train"


@pytest.mark.slow
def test_images_of_every_kind_get_the_same_caption(names, place):
  """A path, its bytes, its Pillow image and its array."""
  path = place / "photos" / "1.png"
  image = Image.open(path)
  kinds = [path, str(path), path.read_bytes(), image, np.asarray(image)]
  captioner = names["captioner"]
  captions = captioner(kinds)
  assert len({(caption.text, tuple(caption.tokens)) for caption in captions}) == 1
  assert [caption.image for caption in captions] == [str(path)] * 2 + [
    "image 2",
    str(path),
    "image 4",
  ]
  with pytest.raises(ValueError, match="missing.png"):
    captioner(str(place / "missing.png"))
  with pytest.raises(ValueError, match="'temprature' is no setting .* did you mean 'temperature'"):
    captioner.with_settings(temprature=1)


@pytest.mark.slow
def test_the_judge_is_the_host_judge(names):
  judge, color = names["judge"], names["color"]
  caption = "The image shows a red circle."
  (choice,) = judge.host.choices([(caption, caprl_jax.Question(color.stem, color.options, 0))])
  answer = judge.answer(caption, color)
  assert answer.choice == choice and answer.correct == (choice == 0)
  wrong = [caprl_jax.Question(color.stem, color.options, gold) for gold in range(3)]
  assert judge.reward(caption, wrong, misled=1.0) == pytest.approx(1 / 3 - 2 / 3)
  assert judge.reward([caption, caption], [[color], []]) == [float(choice == 0), None]
  for questions, message in (
    ([{"stem": "a?", "options": ["x", "y"]}], r"questions\[0\].*gold"),
    ([[color]], "1 lists of questions for 2 captions"),
    ([caprl_jax.Question("a?", ("x",), 0)], r"questions\[0\].*at least 2"),
    ([3], "a question is a caprl_jax.Question"),
  ):
    with pytest.raises(ValueError, match=message):
      judge.reward([caption, caption], questions)


def test_a_config_with_a_wrong_key_or_value_is_refused(place, monkeypatch):
  monkeypatch.chdir(place)
  with pytest.raises(ValueError, match="'train.stps' is no key of a config; did you mean"):
    caprl_jax.load_config("configs/quickstart.py", {"train.stps": 1})
  config = caprl_jax.load_config("configs/quickstart.py", {"policy_update.loss.kl": 0.1})
  assert config.policy_update.loss.kl == 0.1
  config.train.stps = 3
  with pytest.raises(ValueError, match="config.train.stps is not a known key"):
    caprl_jax.train(config, "runs/wrong")
  with pytest.raises(ValueError, match="holds no finished training run"):
    caprl_jax.TrainingResult.read("runs/wrong")


def test_a_frame_without_pandas(monkeypatch):
  monkeypatch.setitem(sys.modules, "pandas", None)
  with pytest.raises(ValueError, match="run `pip install pandas`"):
    caprl_jax.Results([]).to_pandas()


def test_importing_the_package_imports_nothing_large():
  program = (
    "import sys, caprl_jax; assert 'Captioner' in dir(caprl_jax);"
    "print(*{'jax', 'numpy', 'transformers', 'PIL'} & set(sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == ""
  with pytest.raises(AttributeError, match="no attribute 'Captionr'"):
    caprl_jax.Captionr  # noqa: B018


def test_what_editors_are_told_is_there():
  """`__init__.pyi` names what the package has."""
  stub = (ROOT / "caprl_jax" / "__init__.pyi").read_text()
  listed = {line.rpartition(" as ")[2] for line in stub.splitlines() if " as " in line}
  assert listed == set(caprl_jax._NAMES)
  for name in listed:
    module = f"caprl_jax.{caprl_jax._NAMES[name]}"
    assert f"from {module} import {name} as {name}" in stub
