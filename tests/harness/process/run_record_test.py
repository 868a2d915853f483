"""The record of a run: what may change when it goes on, what must not, when it is complete."""

import dataclasses
import json
import logging

import pytest

from caprl_jax.harness.process import run_record
from caprl_jax.harness.process.run_record import RunRecord, differences
from caprl_jax.harness.process.versions import revision, versions


@dataclasses.dataclass(frozen=True)
class Optimizer:
  rate: float = 0.1
  betas: tuple[float, ...] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Data:
  source: str
  rows: int | None = None
  stages: dict[str, Optimizer] = dataclasses.field(default_factory=dict)


def sections(rate=0.1, **data):
  return {"seed": 0, "optimizer": Optimizer(rate), "data": Data(**{"source": "a", **data})}


def begun(tmp_path, **made_of):
  record = RunRecord(tmp_path, "train")
  record.begin(sections(), ())
  record.bind({"judge": "1" * 64, **made_of}, {}, {})
  return record


def test_what_differs_is_named_with_both_values():
  then = {
    "seed": 0,
    "optimizer": {"rate": 0.5, "betas": [0.9, 0.99]},
    "data": {"source": "a", "rows": None, "stages": {"one": {"rate": 0.1, "betas": [0.9, 0.95]}}},
  }
  now = sections(stages={"one": Optimizer(0.2), "two": Optimizer()})
  assert [str(one) for one in differences(then, now)] == [
    "optimizer.rate was 0.5 and is 0.1",
    "optimizer.betas.1 was 0.99 and is 0.95",
    "data.stages.one.rate was 0.1 and is 0.2",
    "data.stages.two was None and is {'rate': 0.1, 'betas': [0.9, 0.95]}",
  ]


def test_a_key_that_is_newer_than_the_record_had_its_default():
  then = {"seed": 0, "optimizer": {"rate": 0.1}, "data": {"source": "a", "gone": 3}}
  assert list(differences(then, sections())) == []
  assert [one.key for one in differences(then, sections(rows=4))] == ["data.rows"]


def test_bound_keys_are_refused_together_and_free_ones_said(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  begun(tmp_path)
  before = (tmp_path / "record_train.json").read_bytes()
  with pytest.raises(
    ValueError,
    match=r"another config \(differing: optimizer.rate was 0.1 and is 0.2; data.source was 'a' and "
    r"is 'b'\); use another --workdir, or give these keys their old values",
  ):
    RunRecord(tmp_path, "train").begin(sections(0.2, source="b", rows=3), ("data.rows",))
  assert (tmp_path / "record_train.json").read_bytes() == before
  found = RunRecord(tmp_path, "train").begin(sections(rows=3), ("data.*",))
  assert [one.key for one in found] == ["data.rows"]
  assert "goes on with another config: data.rows was None and is 3" in caplog.text
  assert RunRecord(tmp_path, "train").begin(sections(rows=3), ()) == []  # the new one counts


def test_a_run_that_left_nothing_and_one_that_is_older(tmp_path):
  begun(tmp_path)
  record = RunRecord(tmp_path, "train")
  assert record.begin(sections(0.2), (), goes_on=False) == [] and record.digest("judge") == ""
  other = RunRecord(tmp_path / "old", "train")
  with pytest.raises(ValueError, match="optimizer.rate was 0.3 and is 0.1"):
    other.begin(sections(), (), older={**record.values["config"], "optimizer": {"rate": 0.3}})


def test_what_a_run_is_made_of_must_stay(tmp_path, caplog):
  begun(tmp_path, policy="2" * 64)
  record = RunRecord(tmp_path, "train")
  record.bind({"judge": "1" * 64, "rows": "3"}, {"judge": "bring it back"}, {})
  with pytest.raises(
    ValueError, match=r"judge is not what .* \(111111111111, now 4444\): bring it"
  ):
    record.bind({"judge": "4444"}, {"judge": "bring it back"}, {})
  record.bind({"policy": "5"}, {}, {"policy": "it is not used any more"})
  assert "policy is not what this run was begun with (222222222222, now 5)" in caplog.text
  held = json.loads((tmp_path / "record_train.json").read_text())["made_of"]
  assert held == {"judge": "1" * 64, "policy": "2" * 64, "rows": "3"}  # the first start counts
  record.renew({"judge": "6"})
  assert RunRecord(tmp_path, "train").values["made_of"] == {"judge": "6"}


def test_it_is_complete_when_it_is_said(tmp_path):
  record = begun(tmp_path)
  assert RunRecord(tmp_path, "train").complete_step is None
  record.finish(0)
  assert RunRecord(tmp_path, "train").complete_step == 0
  assert RunRecord(tmp_path, "sft").complete_step is None
  RunRecord(tmp_path, "train").reopen()
  assert RunRecord(tmp_path, "train").complete_step is None


def test_each_start_with_other_versions_is_noted(tmp_path, monkeypatch, caplog):
  begun(tmp_path)
  begun(tmp_path)
  monkeypatch.setattr(run_record, "versions", lambda: {**versions(), "jax": "9.9"})
  starts = begun(tmp_path).values["starts"]
  assert [start["versions"]["jax"] == "9.9" for start in starts] == [False, True]
  assert f"with other versions: jax was '{versions()['jax']}' and is '9.9'" in caplog.text
  assert versions()["revision"] == revision()


@pytest.mark.parametrize(
  "text, message",
  [
    ("[", "not JSON"),
    ("[1]", r"holds \[1\], not an object"),
    ('{"config": 3}', "config is 3"),
    ('{"made_of": {"a": 3}}', "made_of holds what is no digest"),
    ('{"complete": {"step": "x"}}', "complete.step is no integer"),
    ('{"starts": [3]}', "starts holds 3"),
  ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, text, message):
  (tmp_path / "record_train.json").write_text(text)
  with pytest.raises(ValueError, match=f"record_train.json: .*{message}"):
    RunRecord(tmp_path, "train")
