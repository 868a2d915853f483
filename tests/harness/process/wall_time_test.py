"""Minutes between checkpoints, by a clock that is asked rarely."""

import pytest

from caprl_jax.harness import checkpoints
from caprl_jax.harness.checkpoints import CheckpointConfig, Checkpoints
from caprl_jax.harness.process import wall_time
from caprl_jax.harness.process.wall_time import WallTime


def steps_at(monkeypatch, minutes, secs_of, count):
  """The steps after which the minutes were over, and how often the processes had to agree."""
  now, asked, over = [0.0], [], []
  monkeypatch.setattr(wall_time, "from_first", lambda look: asked.append(1) or look())
  timer = WallTime(minutes, lambda: now[0])
  for step in range(1, count + 1):
    now[0] += secs_of(step)
    if timer.over(step):
      over.append(step)
      timer.begin(step)
  return over, len(asked)


def test_it_is_over_in_time_and_seldom_asked(monkeypatch):
  over, asked = steps_at(monkeypatch, 10, lambda step: 1.0, 3000)
  assert over == [601, 1201, 1801, 2401] and asked < 70
  over, _ = steps_at(monkeypatch, 10, lambda step: 3.0 if step > 100 else 1.0, 700)
  assert len(over) == 2 and over[0] < 350  # steps that become slower
  assert steps_at(monkeypatch, 1, lambda step: 90.0, 5)[0] == [2, 3, 4, 5]


def test_without_minutes_nobody_is_asked(monkeypatch):
  assert steps_at(monkeypatch, None, lambda step: 1e9, 10) == ([], 0)


def test_checkpoints_are_due_by_steps_or_by_time(tmp_path, monkeypatch):
  now = [0.0]
  timer = lambda minutes: WallTime(minutes, lambda: now[0])
  monkeypatch.setattr(checkpoints, "WallTime", timer)
  made = Checkpoints(tmp_path, CheckpointConfig(every_steps=4, every_minutes=1))
  due = []
  for step in range(1, 7):
    now[0] += 40
    due.append(made.due(step))
  made.close()
  assert due == [False, False, True, True, True, True]


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(every_steps=0), "checkpoint.every_steps = 0 must be at least 1"),
    (dict(every_minutes=0.0), "checkpoint.every_minutes = 0.0 must be above 0"),
  ],
)
def test_what_makes_no_sense_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    CheckpointConfig(**settings)
