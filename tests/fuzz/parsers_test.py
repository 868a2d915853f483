"""Parsers of texts and values, on whatever hypothesis can think of: a value or a ValueError of
ours."""

import json
import pathlib
import re

import hypothesis
import ml_collections
import pytest
from hypothesis import strategies as st

from caprl_jax import json_files
from caprl_jax.config import loading, registry, schema
from caprl_jax.config.named_values import parse_named
from caprl_jax.data.readers import conversations, jsonl, qa_sources
from caprl_jax.harness import metrics
from caprl_jax.harness.sections import DataSection

quick = hypothesis.settings(
  max_examples=150,
  deadline=None,
  database=None,
  derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.none())
texts = st.one_of(st.text(max_size=30), st.sampled_from(["a.png", "A", "red", "<image>", "user"]))
keys = st.one_of(
  texts,
  st.sampled_from(
    "image questions stem options gold caption messages role content from value".split()
  ),
)
values = st.recursive(
  numbers | texts,
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
  max_leaves=25,
)


def read_or_refused(read, *arguments):
  """What `read` returns; None where it raised a ValueError that is ours and short."""
  try:
    return read(*arguments)
  except ValueError as error:
    assert type(error) is ValueError, repr(error)
    frame = error.__traceback__
    while frame.tb_next:
      frame = frame.tb_next
    assert "/caprl_jax/" in frame.tb_frame.f_code.co_filename, repr(error)
    assert len(str(error)) <= 1500
    return None


@quick
@hypothesis.given(st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode()))
def test_json(data):
  found = read_or_refused(json_files.parse_json, data, "here")
  assert json.dumps(found)  # a value, or None


@quick
@hypothesis.given(values)
def test_json_of_a_value_is_the_value(value):
  hypothesis.assume("NaN" not in json.dumps(value))
  found = read_or_refused(json_files.parse_json, json.dumps(value, ensure_ascii=False), "here")
  assert found is None or found == value


@quick
@hypothesis.given(values, st.integers(min_value=40, max_value=200))
def test_values_in_messages(value, limit):
  assert len(json_files.shown(value, limit)) <= limit + 20
  assert len(json_files.cut(value, limit)) <= limit


@quick
@hypothesis.given(rows=st.lists(values, min_size=1, max_size=3))
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows(rows, suffix, tmp_path):
  path = tmp_path / f"rows{suffix}"
  text = "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows)
  path.write_text(text)
  scan = lambda: list(qa_sources.scan_qa_rows(str(path), 0))
  for row in read_or_refused(scan) or ():
    message = getattr(row, "message", str(path))
    assert message.startswith(str(path)) and len(message) <= 1500
  read_or_refused(lambda: list(conversations.scan_conversations(path, "Describe.")))
  read_or_refused(jsonl.read_caption_jsonl, path)
  read_or_refused(metrics.read_metrics, path)


@quick
@hypothesis.given(st.one_of(st.text(max_size=60), st.from_regex(r"[0-9.e]*\*?\w+( \+ \w+)*")))
def test_mixtures(text):
  parts = read_or_refused(qa_sources.parse_mixture, text)
  assert parts is None or all(part.source for part in parts)


@quick
@hypothesis.given(st.text("ab=,{}.!: é\0\n", max_size=40))
def test_named_values_and_facts(text):
  named = read_or_refused(lambda: parse_named(text, key="config.x", example="a=b"))
  facts = read_or_refused(conversations.context_facts, text)
  assert all(named or {}) and all((named or {}).values()) and all(facts or ())  # none is ""


@quick
@hypothesis.given(
  key=st.sampled_from(["data.batch_size", "data.train", "seed", "mode", "data.nothing", "data"]),
  text=st.text(max_size=40) | values.map(repr),
)
def test_flags(key, text):
  config = ml_collections.ConfigDict({"mode": "train", "seed": 0, "data": {"batch_size": 8}})
  match = loading.OVERRIDE.fullmatch(f"--config.{key}={text}")
  hypothesis.assume(match)

  def read():
    loading.apply_overrides(config, [match], "file.py")
    registry.check_top_level(config)
    return schema.load_section(config, "data", DataSection)

  found = read_or_refused(read)
  assert found is None or isinstance(found, DataSection)


def test_places_are_said_once(tmp_path):
  path = pathlib.Path(tmp_path / "rows.jsonl")
  path.write_text('{"image": 3}\n[]\n{\n')
  for row in qa_sources.scan_qa_rows(str(path), 0):
    assert len(re.findall(re.escape(str(path)), row.message)) == 1
