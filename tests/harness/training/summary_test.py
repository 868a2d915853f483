"""summary.json: what is put into it, or taken away, is on the disk at once."""

import json

from caprl_jax.harness.training.summary import Summary, summary_path


def test_all_stages_named_are_taken_away(tmp_path):
  summary = Summary(tmp_path)
  summary.put(before={"accuracy": 0.5}, after={"accuracy": 0.75}, complete={"step": 4})
  assert Summary(tmp_path).complete_step == 4
  summary.drop("complete", "after")
  assert summary.values == {"before": {"accuracy": 0.5}} and summary.complete_step == 0
  assert json.loads(summary_path(tmp_path).read_text()) == summary.values


def test_nothing_is_written_where_nothing_is_taken_away(tmp_path):
  Summary(tmp_path).drop("complete", "after")
  assert not summary_path(tmp_path).exists()
