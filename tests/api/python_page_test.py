"""docs/python.md, run from top to bottom with tiny models; what its examples do not show."""

import doctest
import hashlib
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
from caprl_jax.data.rows import CaptionRow
from caprl_jax.inference.captioner import CaptionerOutput, WrittenCaption

PAGE = ROOT / "docs" / "python.md"
# The stand-in for the quickstart has a reward of its own, so that one training run shows both.
OWN = """
def reward(accuracy_BG, length_BG, ended_BG):
  return 0.25 * length_BG, length_BG != 3
"""
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
  config.evaluate.batch_size, config.data.max_eval_rows = 4, 4
  config.data.batch_size, config.rollout.group_size = 4, 2
  (folder / "own.py").write_text(OWN)
  config.reward.custom, config.reward.custom_weight = f"{folder / 'own.py'}:reward", 2.0
  del config.advantage  # as if the file left a section out
  shutil.copytree(folder / "tiny" / "policy", folder / "internlm" / "CapRL-3B")
  shutil.copytree(folder / "tiny" / "judge", folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
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
  output = CaptionerOutput(0, CaptionRow(b"", "", "a"), (WrittenCaption("b", [1], "end"),) * 2)
  assert [type(one) for one in names["several"]._captions(output)] == [caprl_jax.Caption] * 2


@pytest.mark.slow
def test_a_reward_function_of_arrays_is_part_of_the_step(names, place, monkeypatch):
  """The run of the page, whose config has one."""
  result, workdir = names["result"], place / "runs" / "python"
  log = (workdir / "log.txt").read_text()
  assert "is a function of arrays: a part of the step's program" in log
  monkeypatch.chdir(place)
  for row in result.metrics:
    captions = result.samples(f"step_{row['step']:06d}")
    scored = [caption.reward for caption in captions if caption.reward is not None]
    assert row["reward/unscored"] == pytest.approx(1 - len(scored) / len(captions))
    assert row["reward/mean"] == pytest.approx(np.mean(scored))
    assert row["reward/mean"] == pytest.approx(row["reward/accuracy"] + 2 * row["reward/custom"])
    assert "time/judge_secs" not in row  # one program
  made_of = tiny.read_back(workdir / "record_train.json")["made_of"]
  assert made_of["reward.custom"] == hashlib.sha256(OWN.encode() + b"\0reward").hexdigest()
  (place / "own.py").write_text(OWN.replace("0.25", "0.5"))
  longer = names["config"].copy_and_resolve_references()
  longer.train.steps = 3
  with pytest.raises(ValueError, match="reward.custom is not what this run was begun with"):
    caprl_jax.train(longer, "runs/python")
  (place / "own.py").write_text(OWN)


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
def test_a_stream_is_refused_or_left_without_harm(names, place):
  captioner = names["captioner"]
  left = captioner.stream(Image.open(place / "photos" / "1.png"))
  assert next(left) and captioner(str(place / "photos" / "1.png")).text  # in between
  del left
  with pytest.raises(ValueError, match="missing.png"):
    list(captioner.stream(place / "missing.png"))
  with pytest.raises(ValueError, match="image is of type list; give one path"):
    captioner.stream([place / "photos" / "1.png"])
  with pytest.raises(ValueError, match=r"captions = 2: one caption is streamed; use with_settings"):
    names["several"].stream(place / "photos" / "1.png")


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
