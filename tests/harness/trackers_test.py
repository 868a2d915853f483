"""Numbers and samples read back from TensorBoard's and W&B's own files."""

import io
import json
import logging
import math
import os
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from caprl_jax.harness import trackers


def save_some_samples(folder, stage="train", advantage=True):
  """As `samples.save_samples` writes them: two images; the second caption of the first one was not
  scored.
  """
  questions = [
    {"stem": "What colour?", "options": ["red", "a|b"], "gold": 0, "kind": "colour"},
    {"stem": "What shape?", "options": ["disc", "ring"], "gold": 1, "kind": "shape"},
  ]
  answer = lambda question, choice, correct, valid: {
    "question": question,
    "choice": choice,
    "correct": correct,
    "valid": valid,
  }
  right, wrong = answer(0, 0, True, True), answer(1, 0, False, True)
  none, unscored = answer(0, -1, False, True), answer(1, -1, False, False)
  rows = [
    {
      "row": 7,
      "name": "a/x.png",
      "image": "images/a_x.png",
      "questions": questions,
      "captions": [
        {
          "text": "A *red* <b>|\nring.",
          "length_tokens": 5,
          "reward": 0.5,
          "answers": [right, wrong],
        },
        {"text": "", "length_tokens": 1, "reward": None, "answers": [none, unscored]},
      ],
    },
    {
      "row": 9,
      "name": "y.png",
      "image": "images/y.png",
      "questions": [],
      "captions": [
        {"text": "A disc.", "length_tokens": 3, "reward": None, "answers": []},
        {"text": "A disc.", "length_tokens": 3, "reward": None, "answers": []},
      ],
    },
  ]
  if advantage:
    for row in rows:
      for caption in row["captions"]:
        caption["advantage"] = 0.25
  (folder / "images").mkdir(parents=True)
  for shade, row in enumerate(rows):
    Image.new("RGB", (3 + shade, 2), (10 + shade, 20, 30)).save(folder / row["image"])
  path = folder / "step_000003.json"
  path.write_text(json.dumps({"stage": stage, "step": 3, "rows": rows}))
  return path


# TensorBoard


def open_tensorboard(workdir, start_step=0):
  pytest.importorskip("tensorboardX")
  (tracker,) = trackers.open_trackers(["tensorboard"], workdir, {}, start_step)
  return tracker


def read_tensorboard(workdir):
  accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  read = accumulator.EventAccumulator(
    str(workdir / "tensorboard"), size_guidance={"images": 0, "tensors": 0}
  )
  return read.Reload()


def scalars(workdir, name):
  return [(event.step, event.value) for event in read_tensorboard(workdir).Scalars(name)]


def test_tensorboard_has_the_finite_numbers_at_once(tmp_path):
  tracker = open_tensorboard(tmp_path / "new")
  tracker.write(
    1, {"reward/mean": 0.5, "update/kl": math.nan, "judge/x": None, "update/loss": -math.inf}
  )
  tracker.write(np.int64(2), {"reward/mean": np.float32(0.75), "update/kl": 1})

  assert scalars(tmp_path / "new", "reward/mean") == [(1, 0.5), (2, 0.75)]  # before close
  assert scalars(tmp_path / "new", "update/kl") == [(2, 1.0)]
  assert sorted(read_tensorboard(tmp_path / "new").Tags()["scalars"]) == [
    "reward/mean",
    "update/kl",
  ]
  tracker.close()


@pytest.mark.parametrize("start, kept", [(2, [1, 2]), (0, [])])
def test_tensorboard_forgets_what_the_checkpoint_does_not_know(tmp_path, start, kept):
  first = open_tensorboard(tmp_path)
  for step in (1, 2, 3, 4):  # and then a kill: no close
    first.write(step, {"reward/mean": step})
  second = open_tensorboard(tmp_path, start)
  second.write(start + 1, {"reward/mean": 30})
  second.close()

  assert len(list((tmp_path / "tensorboard").iterdir())) == 2
  assert scalars(tmp_path, "reward/mean") == [*((step, step) for step in kept), (start + 1, 30)]


def test_tensorboard_has_images_and_a_table(tmp_path):
  tracker = open_tensorboard(tmp_path)
  tracker.samples(3, save_some_samples(tmp_path / "samples"))
  tracker.close()
  read = read_tensorboard(tmp_path)

  images = [read.Images(f"samples/train/{i}") for i in range(2)]
  assert [(event.step, event.width, event.height) for (event,) in images] == [(3, 3, 2), (3, 4, 2)]
  pixels = np.asarray(Image.open(io.BytesIO(images[1][0].encoded_image_string)))
  np.testing.assert_array_equal(pixels, np.full((2, 4, 3), (11, 20, 30)))
  (event,) = read.Tensors("samples/train/text_summary")
  assert event.step == 3
  assert event.tensor_proto.string_val[0].decode().splitlines() == [
    "| image | caption | reward | advantage | question | gold | chosen | right |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
    r"| a/x.png | A \*red\* &lt;b&gt;\| ring. | 0.500 | 0.250 | What colour? | red | red | yes |",
    "|  |  |  |  | What shape? | ring | disc | no |",
    "| a/x.png |  | - | 0.250 | What colour? | red | - | no |",
    "|  |  |  |  | What shape? | ring | - | - |",
    "| y.png | A disc. | - | 0.250 | - | - | - | - |",
    "| y.png | A disc. | - | 0.250 | - | - | - | - |",
  ]  # twice the same caption: two lines


def test_samples_of_an_evaluation_have_no_advantage(tmp_path):
  tracker = open_tensorboard(tmp_path)
  tracker.samples(0, save_some_samples(tmp_path / "samples", "eval", advantage=False))
  tracker.close()
  (event,) = read_tensorboard(tmp_path).Tensors("samples/eval/text_summary")
  assert "ring. | 0.500 | - | What colour?" in event.tensor_proto.string_val[0].decode()


@pytest.mark.skipif(
  not os.path.exists("/dev/full"), reason="no /dev/full, the disk that is always full"
)
def test_a_full_disk_is_one_warning_and_the_run_goes_on(tmp_path, caplog):
  tracker = open_tensorboard(tmp_path)
  path = save_some_samples(tmp_path / "samples")
  tracker._file._py_recordio_writer._writer = open("/dev/full", "wb")
  for step in range(1, 40):  # with SummaryWriter the eleventh would wait for ever
    tracker.write(step, {"reward/mean": 0.5})
    tracker.samples(step, path)
  tracker.close()
  (warning,) = caplog.records
  assert "tensorboard did not take numbers (OSError: [Errno 28]" in warning.getMessage()


# W&B


@pytest.fixture
def wandb(monkeypatch):
  monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")  # restored: opening may change it
  monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
  return pytest.importorskip("wandb")


def open_wandb(workdir, start_step=0):
  (tracker,) = trackers.open_trackers(
    ["wandb"], workdir, {"seed": 7, "rollout": {"group": [2]}}, start_step
  )
  return tracker


def read_wandb(workdir):
  """All records of a workdir, oldest run first, each run whole: W&B's own process may still write
  after `close`.
  """
  runs = []
  for path in (workdir / "wandb").glob("offline-run-*/run-*.wandb"):
    deadline = time.monotonic() + 60
    while not (records := read_wandb_file(path)) or not records[-1].HasField("exit"):
      assert time.monotonic() < deadline, f"{path} has no end"
      time.sleep(0.05)
    (start,) = [record.run.start_time for record in records if record.HasField("run")]
    runs.append((start.ToNanoseconds(), records))
  return [record for _, records in sorted(runs, key=lambda run: run[0]) for record in records]


def read_wandb_file(path):
  """The whole records of a file, which has the log format of LevelDB: blocks of 32 KiB, records cut
  to fit.
  """
  from wandb.proto import wandb_internal_pb2

  data, at, records, whole = path.read_bytes(), 7, [], b""
  while at + 7 <= len(data):
    if (left := 32768 - at % 32768) < 7:
      at += left
      continue
    length, kind = struct.unpack_from("<HB", data, at + 4)
    whole += data[at + 7 : at + 7 + length]
    at += 7 + length
    if at > len(data):
      break
    if kind in (1, 4):  # whole, or the last part
      records.append(wandb_internal_pb2.Record.FromString(whole))
      whole = b""
  return records


def history(records):
  """What was logged, less what W&B adds; a table is a dict."""
  rows = []
  for record in records:
    if record.HasField("history"):
      rows.append({})
      for item in record.history.item:
        *above, name = item.nested_key or [item.key]
        folder = rows[-1].setdefault(above[0], {}) if above else rows[-1]
        if above or not name.startswith("_"):
          folder[name] = json.loads(item.value_json)
  return rows


def test_wandb_offline_has_config_numbers_and_step_axis(tmp_path, wandb, capfd):
  tracker = open_wandb(tmp_path / "new")
  tracker.write(1, {"reward/mean": 0.5, "update/kl": math.nan, "judge/x": None})
  tracker.write(2, {"reward/mean": np.float32(0.75), "update/kl": 1})
  tracker.close()
  records = read_wandb(tmp_path / "new")

  assert history(records) == [
    {"reward/mean": 0.5, "step": 1},
    {"reward/mean": 0.75, "update/kl": 1, "step": 2},
  ]
  (run,) = [record.run for record in records if record.HasField("run")]
  assert run.project == "caprl_jax"
  config = {item.key: json.loads(item.value_json) for item in run.config.update}
  assert config["seed"] == 7 and config["rollout"] == {"group": [2]}
  axes = {
    record.metric.glob_name or record.metric.name: record.metric.step_metric
    for record in records
    if record.HasField("metric")
  }
  assert axes.pop("step") == "" and axes["*"] == "step" and set(axes.values()) == {"step"}
  assert os.environ["WANDB_ERROR_REPORTING"] == "false"  # no telemetry: offline is no network
  assert capfd.readouterr() == ("", "")


def test_wandb_goes_on_with_the_same_run(tmp_path, wandb):
  for start in (0, 2):
    tracker = open_wandb(tmp_path, start)
    for step in (start + 1, start + 2, start + 3):
      tracker.write(step, {"reward/mean": step})
    tracker.close()
  records = read_wandb(tmp_path)

  saved = (tmp_path / "wandb_id.txt").read_text().strip()
  runs = [record.run for record in records if record.HasField("run")]
  assert [(run.run_id, bool(run.resume)) for run in runs] == [(saved, True)] * 2
  # no step is refused for being old
  assert [row["step"] for row in history(records)] == [1, 2, 3, 3, 4, 5]
  other = open_wandb(tmp_path / "other")
  other.close()
  assert (tmp_path / "other/wandb_id.txt").read_text().strip() != saved


def test_wandb_has_a_table_with_images(tmp_path, wandb):
  tracker = open_wandb(tmp_path)
  tracker.samples(3, save_some_samples(tmp_path / "samples"))
  tracker.close()
  records = read_wandb(tmp_path)
  (row,) = history(records)

  assert (
    row["step"] == 3
    and row["samples/train"]["_type"] == "table-file"
    and row["samples/train"]["nrows"] == 6
  )
  (artifact,) = [record.artifact for record in records if record.HasField("artifact")]
  files = {content.path: content.local_path for content in artifact.manifest.contents}
  # none in the home directory
  assert all(path.startswith(str(tmp_path / "wandb") + "/") for path in files.values())
  assert "WANDB_DATA_DIR" not in os.environ
  table = json.loads(open(files["samples/train.table.json"]).read())
  assert table["columns"] == list(trackers.COLUMNS)
  assert [line[1:] for line in table["data"]] == [
    ["A *red* <b>|\nring.", 0.5, 0.25, "What colour?", "red", "red", True],
    ["A *red* <b>|\nring.", 0.5, 0.25, "What shape?", "ring", "disc", False],
    ["", None, 0.25, "What colour?", "red", "-", False],
    ["", None, 0.25, "What shape?", "ring", "-", None],
    ["A disc.", None, 0.25, None, None, None, None],
    ["A disc.", None, 0.25, None, None, None, None],
  ]
  images = [line[0] for line in table["data"]]
  assert [(image["width"], image["caption"]) for image in images] == [(3, "a/x.png")] * 4 + [
    (4, "y.png")
  ] * 2
  assert Image.open(files[images[4]["path"]]).getpixel((0, 0)) == (11, 20, 30)
  assert (tmp_path / "samples/images/y.png").exists()  # not moved away


def test_wandb_leaves_a_run_of_the_users_alone(tmp_path, wandb):
  theirs = wandb.init(
    project="theirs", dir=str(tmp_path), mode="offline", settings={"silent": True, "console": "off"}
  )
  try:
    tracker = open_wandb(tmp_path / "ours")
    tracker.write(1, {"reward/mean": 0.5})
    tracker.close()
    theirs.log({"loss": 1.0})
  finally:
    theirs.finish()
  assert history(read_wandb(tmp_path)) == [{"loss": 1.0}]
  assert history(read_wandb(tmp_path / "ours")) == [{"reward/mean": 0.5, "step": 1}]


def test_wandb_that_does_not_start_is_an_error_and_closes_what_is_open(
  tmp_path, wandb, monkeypatch
):
  def refuse(**_):
    raise wandb.Error("No API key configured.")

  closed = []
  monkeypatch.setattr(wandb, "init", refuse)
  monkeypatch.setattr(
    trackers, "TensorBoard", lambda *_: type("Open", (), {"close": lambda _: closed.append(1)})()
  )
  with pytest.raises(ValueError, match="'online'.*No API key configured. Run `wandb login`"):
    trackers.open_trackers(["tensorboard", "wandb"], tmp_path, {}, 0, "online")
  assert closed == [1]


def test_a_wandb_id_that_is_none_is_an_error(tmp_path, wandb):
  (tmp_path / "wandb_id.txt").write_text("a b\n")
  with pytest.raises(ValueError, match="wandb_id.txt holds 'a b'.*delete it"):
    open_wandb(tmp_path)


# Both


class Failing(trackers.Tracker):
  name = "failing"

  def _write(self, step, numbers):
    raise OSError(f"disk full at {step}")

  def _samples(self, step, path):
    json.loads(path.read_text())

  def _close(self):
    raise RuntimeError("lost")


def test_a_failure_is_said_once_and_goes_on(tmp_path, caplog):
  tracker = Failing()
  with caplog.at_level(logging.WARNING, "caprl_jax.harness.trackers"):
    for step in range(3):
      tracker.write(step, {})
      tracker.samples(step, tmp_path / "absent.json")
    tracker.close()
  said = [record.getMessage() for record in caplog.records]
  assert [
    "disk full at 0" in said[0],
    "absent.json" in said[1],
    "RuntimeError: lost" in said[2],
  ] == [True] * 3
  assert len(said) == 3 and "failing did not take numbers" in said[0] and "samples" in said[1]

  class Interrupted(Failing):
    def _write(self, step, numbers):
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    Interrupted().write(1, {})


def test_an_image_that_is_gone_costs_no_numbers(tmp_path, caplog):
  tracker = open_tensorboard(tmp_path)
  path = save_some_samples(tmp_path / "samples")
  (tmp_path / "samples/images/a_x.png").unlink()
  tracker.samples(1, path)
  tracker.write(1, {"reward/mean": 0.5})
  tracker.close()
  assert "a_x.png" in caplog.records[0].getMessage()
  assert scalars(tmp_path, "reward/mean") == [(1, 0.5)]


@pytest.mark.parametrize(
  "names, mode, message",
  [
    (
      ["tensorboard", "mlflow"],
      "offline",
      "'mlflow' does not exist; choose from 'tensorboard', 'wandb'",
    ),
    (["wandb", "wandb"], "offline", "'wandb' is named twice"),
    ([], "of", "wandb_mode = 'of': choose from 'offline', 'online', 'disabled'"),
  ],
)
def test_wrong_names_are_errors_before_anything_is_opened(tmp_path, names, mode, message):
  with pytest.raises(ValueError, match=message):
    trackers.open_trackers(names, tmp_path / "new", {}, 0, mode)
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_names_its_remedy(tmp_path, monkeypatch, name, package):
  monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
  for module in [module for module in sys.modules if module.partition(".")[0] == package]:
    monkeypatch.delitem(sys.modules, module)
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ValueError, match=rf"tracker '{name}'.*`pip install -e \.\[{name}\]`"):
    trackers.open_trackers([name], tmp_path, {}, 0)


def test_no_trackers_need_no_packages_and_modes_start_without_what_few_runs_need(tmp_path):
  program = (
    "import pathlib, sys; from caprl_jax.harness import trackers;assert "
    "trackers.open_trackers([], pathlib.Path(sys.argv[1]), {}, 0) == [];"
    "from caprl_jax.modes.train import run; from caprl_jax.modes.caption import run;"
    "from caprl_jax.modes.curate import run; from caprl_jax.modes.gallery import run;print([m for "
    "m in ('tensorboardX', 'wandb', 'torch', 'tensorflow', 'tensorflow_datasets', 'matplotlib', "
    "'transformers') if m in sys.modules])"
  )
  output = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True
  )
  assert output.stdout.strip() == "[]"
