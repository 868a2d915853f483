"""What a training run may change when it goes on, and what it must not."""

import json
import logging
import shutil

import jax
import pytest
from helpers import tiny

from caprl_jax import sharding
from caprl_jax.config import schema
from caprl_jax.harness import setup
from caprl_jax.harness.process.run_record import RunRecord
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.training import chosen_rows
from caprl_jax.harness.training.made_of import bind_models
from caprl_jax.harness.training.summary import Summary
from caprl_jax.modes.train import run as train


@pytest.fixture
def config(tmp_path):
  return tiny.write_all(tmp_path / "tiny")


def changed(config, **values):
  """The settings with other values, by dotted key with __ for the dot."""
  made = config.copy_and_resolve_references()
  with made.unlocked():
    for key, value in values.items():
      section, _, name = key.partition("__")
      if section not in made:
        made[section] = {}
      made[section][name] = value
  return read_settings(made)


def begin(workdir, settings, config):
  """A start that leaves what one leaves after its set-up."""
  record = train._begin_record(Summary(workdir), settings, workdir)
  Summary(workdir).put(config=schema.to_plain(config), gate={})
  return record


def test_what_changes_no_step_may_change(config, tmp_path, caplog):
  caplog.set_level(logging.INFO)
  begin(tmp_path, read_settings(config), config)
  free = dict(
    mesh__fsdp=1,
    policy__remat=True,
    policy__tower_remat=False,
    optimizer__moment_memory="host",
    policy_update__microbatches=2,
    judge__microbatches=4,
    checkpoint__every_steps=7,
    evaluate__batch_size=4,
    data__bad_rows="drop",
    data__shape_buckets=2,
    train__sample_every=1,
  )
  begin(tmp_path, changed(config, **free), config)
  assert "policy_update.microbatches was 1 and is 2" in caplog.text
  with pytest.raises(ValueError, match=r"differing: data.questions was 2 and is 1; rollout.group"):
    begin(tmp_path, changed(config, data__questions=1, rollout__group_size=2), config)


def test_the_record_of_an_older_version_is_its_summary(config, tmp_path):
  plain = schema.to_plain(config)
  plain["update"] = plain.pop("policy_update")  # an old name
  Summary(tmp_path).put(config=plain, gate={})
  settings = changed(config, optimizer__learning_rate=0.5)
  with pytest.raises(ValueError, match="differing: optimizer.learning_rate was 0.001 and is 0.5"):
    train._begin_record(Summary(tmp_path), settings, tmp_path)
  train._begin_record(Summary(tmp_path), read_settings(config), tmp_path)


def test_more_steps_say_what_becomes_of_the_learning_rate(config, tmp_path, caplog):
  cosine = dict(optimizer__schedule="cosine", optimizer__final_fraction=0.0)
  begin(tmp_path, changed(config, **cosine), config)
  (tmp_path / "checkpoints" / "4").mkdir(parents=True)
  begin(tmp_path, changed(config, train__steps=8, **cosine), config)
  assert (
    "schedule had 4 optimizer steps and has 8 now: the rate is 0.0005 in step 5 and 3.81e-05 in "
    "the last one, where it would have been 0 and 0; --config.optimizer.schedule_steps=4 keeps"
  ) in caplog.text
  caplog.clear()
  begin(tmp_path, changed(config, train__steps=9, optimizer__schedule_steps=8, **cosine), config)
  assert "schedule had" not in caplog.text  # that of 8 steps stays
  begin(tmp_path, changed(config, train__steps=9, optimizer__schedule_steps=20, **cosine), config)
  assert "schedule had 8 optimizer steps and has 20 now" in caplog.text
  caplog.clear()
  constant = tmp_path / "constant"
  begin(constant, read_settings(config), config)
  (constant / "checkpoints" / "4").mkdir(parents=True)
  begin(constant, changed(config, train__steps=8), config)
  assert "schedule had" not in caplog.text


def test_a_judge_or_a_base_that_was_trained_again_is_refused(config, tmp_path, caplog):
  record = begin(tmp_path, read_settings(config), config)
  lora = changed(config, policy__trainable="lora", policy__lora=dict(rank=2, alpha=4.0))
  bind_models(record, lora, goes_on=True)
  shutil.copytree(config.policy.checkpoint, tmp_path / "elsewhere")
  moved = changed(config, policy__checkpoint=str(tmp_path / "elsewhere"))
  bind_models(begin(tmp_path, moved, config), moved, goes_on=True)
  tiny.train_anew(tmp_path / "elsewhere")
  bind_models(record, moved, goes_on=True)  # a checkpoint has all of it
  assert "nothing of it is used any more" in caplog.text
  kl = changed(config, policy_update__loss=dict(kl=0.1))
  tiny.train_anew(tmp_path / "tiny" / "policy")
  for settings, goes_on in ((lora, True), (kl, True), (read_settings(config), False)):
    with pytest.raises(ValueError, match=r"policy.checkpoint is not what this run was begun with"):
      bind_models(record, settings, goes_on=goes_on)
  tiny.train_anew(tmp_path / "tiny" / "judge")
  with pytest.raises(ValueError, match="judge.source is not what .* another judge's; bring its"):
    bind_models(record, moved, goes_on=True)


def test_questions_are_chosen_once(config, tmp_path, monkeypatch):
  with config.unlocked():
    config.question_filter = dict(
      informed=("The image shows a {color} {shape}.",), min_informed=-1.0, max_blind=1.1
    )
    config.data.questions_per_image = 1
  settings = read_settings(config)
  record = begin(tmp_path, settings, config)
  with jax.set_mesh(sharding.make_mesh(settings.mesh)):
    made = setup.set_up(settings, workdir=tmp_path, record=record)
    kept = json.loads((tmp_path / "kept_questions.json").read_text())
    assert all(len(row.questions) == 1 for row in made.train_rows)
    assert sum(map(len, kept["splits"][0].values())) == len(made.train_rows)

    def ask(*_):
      raise AssertionError

    monkeypatch.setattr(chosen_rows, "filter_questions", ask)
    again = setup.set_up(settings, workdir=tmp_path, record=RunRecord(tmp_path, "train"))
  assert again.train_rows == made.train_rows and again.eval_rows == made.eval_rows
  assert again.counts == made.counts and again.digests == made.digests
