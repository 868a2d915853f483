"""What a log without a terminal says of long work."""

import logging
import re
import time

import pytest

from caprl_jax import progress


@pytest.fixture(autouse=True)
def often(monkeypatch, caplog):
  monkeypatch.setattr(progress, "EVERY_SECS", 0.1)
  caplog.set_level(logging.INFO, "caprl_jax")


@pytest.mark.parametrize("unit, units", [("image", "images"), ("batch", "batches")])
def test_long_work_says_where_it_is_and_when_it_ends(unit, units, caplog):
  with progress.Bar(1000, "checking", unit, done=100) as bar:
    bar.update(400)
    time.sleep(0.15)
    bar.update(400)
  (line,) = caplog.messages
  assert line.startswith(f"checking: 900 of 1,000 {units}, ") and line.endswith(" s left")


def test_short_work_and_that_of_other_processes_says_nothing(caplog):
  assert list(progress.counted([1, 2], "a", "row")) == [1, 2]
  for _ in progress.counted(range(3), "b", "row", shown=False):
    time.sleep(0.06)
  with progress.going_on("compiling"):
    pass
  assert caplog.messages == []


def test_of_an_unknown_number_the_pace_is_said(caplog):
  for _ in progress.counted(iter("ab"), "reading", "row"):
    time.sleep(0.15)
  assert caplog.messages[0].startswith("reading: 1 rows, ")


def test_what_cannot_be_counted_says_that_it_goes_on(caplog):
  with progress.going_on("compiling the step"):
    time.sleep(0.15)
  assert caplog.messages == ["compiling the step, for 0 s so far"]


def test_work_whose_first_part_takes_long_says_so(caplog):
  with progress.Bar(12, "captions", "image", done=3) as bar:
    bar.update(2)
    time.sleep(0.35)
  assert caplog.messages[0] == "captions: 5 of 12 images, no more for 0 s"
  said = len(caplog.messages)
  time.sleep(0.25)
  assert len(caplog.messages) == said < 4


@pytest.mark.parametrize("secs, text", [(5, "5 s"), (300, "5 min"), (9000, "2.5 h")])
def test_durations(secs, text):
  assert progress.duration(secs) == text


def test_when_work_ends_is_said_with_the_day_if_it_is_another():
  assert re.fullmatch(r"ends (\w+ \d\d \w+ )?\d\d:\d\d", progress.ends_at(1))
  assert re.fullmatch(r"ends \w+ \d\d \w+ \d\d:\d\d", progress.ends_at(2 * 86400))
  assert progress.ends_at(1e30).startswith("ends ")
