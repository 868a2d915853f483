"""summary.json: what is put into it, or taken away, is on the disk at once."""

import json

import pytest

from caprl_jax.harness.training.summary import Summary, summary_path


def test_all_stages_named_are_taken_away(tmp_path):
  summary = Summary(tmp_path)
  summary.put(before={"accuracy": 0.5}, after={"accuracy": 0.75}, gate={})
  assert Summary(tmp_path).values["after"] == {"accuracy": 0.75}
  summary.drop("gate", "after")
  assert summary.values == {"before": {"accuracy": 0.5}}
  assert json.loads(summary_path(tmp_path).read_text()) == summary.values


def test_nothing_is_written_where_nothing_is_taken_away(tmp_path):
  Summary(tmp_path).drop("gate", "after")
  assert not summary_path(tmp_path).exists()


@pytest.mark.parametrize(
  "text, message",
  [
    ("[", r"summary.json: not JSON"),
    ("[" * 99_999, r"summary.json: not JSON that can be read: it is nested too deeply"),
    ("[1]", r"summary.json: holds \[1\], not an object"),
    ('{"gate": 3}', r"summary.json: gate is 3, not an object"),
    ('{"counts": {"kept/x": "3"}}', r"summary.json: counts.kept/x is '3', not a number"),
    ('{"seed": 1e400}', r"summary.json: .*'1e400' is no finite number"),
  ],
)
def test_a_file_that_is_no_summary_is_named(tmp_path, text, message):
  summary_path(tmp_path).write_text(text)
  with pytest.raises(ValueError, match=message):
    Summary(tmp_path)


def test_a_byte_order_mark_is_no_harm(tmp_path):
  summary_path(tmp_path).write_text('{"counts": {"images": 3}}', encoding="utf-8-sig")
  assert Summary(tmp_path).values == {"counts": {"images": 3}}
