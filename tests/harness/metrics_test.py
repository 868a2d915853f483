"""Tests of metrics.jsonl, the progress line and the stage clock."""

import io
import json
import math

import numpy as np
import pytest

from caprl_jax.harness import metrics as metrics_lib


def test_writes_one_strict_json_object_a_step(tmp_path):
  with metrics_lib.MetricsWriter(tmp_path / "new") as writer:
    writer.write(1, {"reward/mean": np.float32(0.5), "judge/unscored": np.int32(3), "a/flag": True})
    writer.write(np.int64(2), {"update/kl": math.nan, "update/loss": np.array(-np.inf)})
    lines = (tmp_path / "new/metrics.jsonl").read_text().splitlines()  # before close: by the line

  assert lines[0] == '{"step": 1, "reward/mean": 0.5, "judge/unscored": 3, "a/flag": 1}'
  assert lines[1] == '{"step": 2, "update/kl": null, "update/loss": null}'
  assert metrics_lib.read_metrics(tmp_path / "new/metrics.jsonl") == [json.loads(x) for x in lines]


def test_a_jax_bfloat16_scalar_is_a_number(tmp_path):
  jnp = pytest.importorskip("jax.numpy")
  with metrics_lib.MetricsWriter(tmp_path) as writer:
    writer.write(0, {"update/loss": jnp.asarray(0.5, jnp.bfloat16)})
  assert metrics_lib.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "update/loss": 0.5}]


@pytest.mark.parametrize("value", [np.zeros(2), "0.5", 1j, None], ids=repr)
def test_what_is_no_scalar_is_refused_by_name_and_leaves_no_line(tmp_path, value):
  with metrics_lib.MetricsWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match="'reward/mean' of step 7"):
      writer.write(7, {"reward/mean": value})
    writer.write(7, {"reward/mean": 1})
  assert metrics_lib.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 7, "reward/mean": 1}]


def test_steps_only_grow_also_over_a_restart(tmp_path):
  with metrics_lib.MetricsWriter(tmp_path) as writer:
    writer.write(5, {})
  with metrics_lib.MetricsWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match="step 5 cannot follow step 5.*truncate_after"):
      writer.write(5, {})
    with pytest.raises(ValueError, match="'step'"):
      writer.write(6, {"step": 1})


def test_resume_drops_what_the_checkpoint_does_not_know(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(
    "".join(f'{{"step": {step}, "a/b": {step}}}\n' for step in range(1, 8)) + '{"step": 8, "a/'
  )
  with metrics_lib.MetricsWriter(tmp_path) as writer:
    assert writer.truncate_after(5) == 2
    writer.write(6, {"a/b": 60})
  assert [row["a/b"] for row in metrics_lib.read_metrics(path)] == [1, 2, 3, 4, 5, 60]
  assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_to_nothing_and_with_nothing_to_drop(tmp_path):
  with metrics_lib.MetricsWriter(tmp_path) as writer:
    assert writer.truncate_after(0) == 0
    writer.write(1, {})
    assert writer.truncate_after(1) == 0
    assert writer.truncate_after(0) == 1
    writer.write(1, {"a/b": 2})
  assert metrics_lib.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a/b": 2}]


@pytest.mark.parametrize(
  "tail, steps",
  [
    ('{"step": 2, "rew', [1, 3]),
    ('{"step": 2}', [1, 2, 3]),  # whole but for its newline
    ("\0\0\0", [1, 3]),
    ("", [1, 3]),
  ],
)
def test_opening_repairs_a_torn_last_line(tmp_path, tail, steps):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n' + tail)
  assert [row["step"] for row in metrics_lib.read_metrics(path)] == steps[:-1]
  with metrics_lib.MetricsWriter(tmp_path) as writer:
    writer.write(3, {})
  assert [row["step"] for row in metrics_lib.read_metrics(path)] == steps


@pytest.mark.parametrize(
  "line",
  [
    '{"step": 2, "rew',
    "",
    "[2]",
    '{"a/b": 1}',
    '{"step": 2.5}',
    '{"step": 2, "a/b": NaN}',
    '{"step": 2, "a": "b"}',
    "[" * 99_999,
  ],
)
def test_any_other_bad_line_is_an_error_with_file_and_line(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
  with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*delete that line"):
    metrics_lib.read_metrics(path)


class Terminal(io.StringIO):
  def isatty(self):
    return True


class FakeClock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def test_progress_without_a_terminal_is_a_line_every_ten_seconds():
  stream, clock = io.StringIO(), FakeClock()
  with metrics_lib.Progress(100, 70, "train", stream=stream, clock=clock) as progress:
    for step in range(30):
      clock.now += 60 if step == 0 else 4  # the first step compiles
      progress.update(reward=0.5)
  lines = stream.getvalue().splitlines()

  assert lines[0] == "train 71/100 reward 0.500"
  assert lines[1] == "train 74/100 reward 0.500, 4.00 s/step, 2 min left"
  assert lines[-1] == "train 100/100 reward 0.500, 4.00 s/step"
  assert len(lines) == 11  # steps 1, 4, 7, ..., 28 and the last


def test_progress_keeps_its_mean_where_a_reward_is_missing():
  progress = metrics_lib.Progress(4, stream=io.StringIO(), clock=FakeClock())
  for reward in (1.0, None, math.nan):
    progress.update(reward)
  assert progress.reward == 1.0
  progress.update(0.0)
  assert progress.reward == pytest.approx(0.9)


def test_progress_on_a_terminal_is_a_bar():
  stream, clock = Terminal(), FakeClock()
  with metrics_lib.Progress(3, 1, "train", stream=stream, clock=clock) as progress:
    for _ in range(2):
      clock.now += 2
      progress.update(0.25)
  last = stream.getvalue().split("\r")[-1]
  assert "train 100%" in last and "3/3" in last and "reward 0.250, 2.00 s/step" in last


def test_stage_clock_adds_up_also_over_exceptions_and_restarts():
  clock = FakeClock()
  stages = metrics_lib.StageClock({"gate": 1.0}, clock=clock)
  with stages("gate"):
    clock.now += 2
  with pytest.raises(ZeroDivisionError), stages("train"):
    clock.now += 3
    raise ZeroDivisionError
  with stages("train"):
    clock.now += 4
  assert stages.secs == {"gate": 3.0, "train": 7.0}
