"""A judge that sees the image: its scores against transformers' logits on whole prompts; what is
refused.
"""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from helpers.captioner_directory import write_checkpoint
from PIL import Image

from caprl_jax import sharding
from caprl_jax.data.batches import ImagePrompt, QABatcher, image_shape, stack
from caprl_jax.data.judge_questions import TokenizedQuestion, question_shape
from caprl_jax.data.rows import QARow
from caprl_jax.hub.load import load_policy
from caprl_jax.inference.image_judge import (
  CAPTION,
  KIND,
  ScorePrompt,
  score_text,
  with_score,
  written_answers,
)
from caprl_jax.inference.judge import JudgeSection, open_judge
from caprl_jax.rl.image_judge.branches import ImageJudge
from caprl_jax.rl.image_judge.scores import score_with_images
from caprl_jax.rl.image_judge.texts import write_about_captions
from caprl_jax.rl.judge import JudgeIds
from caprl_jax.rl.judge_protocol import JudgeConfig

SCORES = ("A", "B", "C", "D")
TEXT, ANSWER = f"Please describe this image.\nCaption:\n{CAPTION}\nAnswer:", "The answer is "
CFG = JudgeConfig(sees_image=True, reading="letter_prob", blind=True)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl-tied"])
def folder(request, tmp_path_factory):
  path = tmp_path_factory.mktemp(request.param)
  write_checkpoint(path, request.param)
  rng = np.random.default_rng(0)
  for i, (w, h) in enumerate([(40, 30), (120, 90)]):
    Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path / f"{i}.png")
  return path


def load(folder):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  return load_policy(str(folder), mesh), mesh


def captions(size, seed=0):
  """Ids and which count, [2 images, 3 captions, 6 tokens]: one empty, holes in the middle."""
  rng = np.random.default_rng(seed)
  keep = np.arange(6) < np.array([[6, 2, 0], [5, 3, 1]])[..., None]
  keep[0, 0, 2:4] = False
  return JudgeIds(rng.integers(10, size, (2, 3, 6)).astype(np.int32), keep)


def batch_of(loaded, score, rows):
  """The rows as the step sees them; their captioner is the judge itself."""
  cfg = loaded.model.cfg
  shape = image_shape(rows, cfg)
  tokenized = [[TokenizedQuestion((1,), ((1,), (2,)), 1, 0, (0.0, 0.0))] for _ in rows]
  sight = ImagePrompt(cfg, score.image, shape)
  prompt = ImagePrompt(cfg, loaded.prompt_pieces("Say it."), shape)
  batcher = QABatcher(rows, tokenized, prompt, 2, question_shape(tokenized[0]), sight)
  rng = np.random.default_rng(0)
  return stack([batcher.example(i, rng) for i in range(len(rows))])


def their_inputs(folder, score, image, caption):
  """The model and the whole prompt with a caption, by transformers."""
  model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
  processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
  pixels = dict(processor([Image.open(image).convert("RGB")], return_tensors="pt"))
  pad = [model.config.image_token_id] * int(pixels["image_grid_thw"].prod() // 4)
  before, between = score.image
  ids = torch.tensor([[*before, *pad, *between, *caption, *score.prompt.tail_L.tolist()]])
  kinds = (ids == model.config.image_token_id).int()
  return model.eval(), dict(input_ids=ids, mm_token_type_ids=kinds, **pixels)


def their_logprobs(folder, score, image, caption):
  """Of each score."""
  model, inputs = their_inputs(folder, score, image, caption)
  with torch.no_grad():
    logits = model(**inputs).logits[0, -1]
  return torch.log_softmax(logits, -1)[score.prompt.letter_A.tolist()].numpy()


def test_scores_are_transformers_own(folder):
  loaded, mesh = load(folder)
  rows = [QARow(folder / f"{i}.png", (), f"{i}") for i in range(2)]
  with jax.set_mesh(mesh):
    score = ScorePrompt.of(loaded, TEXT, ANSWER, SCORES)
    batch = batch_of(loaded, score, rows)
    asked = captions(loaded.tokenizer.vocab_size - 20)
    judge = ImageJudge(loaded.model, loaded.params, score.prompt)
    answer = jax.jit(functools.partial(score_with_images, cfg=CFG))
    valid_BK = batch.questions.valid_BK
    got = jax.device_get(answer(judge, asked, batch.sight, valid_BK, key=jax.random.key(0)))
  for b, row in enumerate(rows):
    for g in range(3):
      caption = asked.tokens_BGT[b, g][asked.keep_BGT[b, g]].tolist()
      want = their_logprobs(folder, score, row.image, caption)
      np.testing.assert_allclose(got.score_BGKA[b, g, 0], want, atol=2e-4)
      share = np.exp(want) / np.exp(want).sum()
      np.testing.assert_allclose(got.credit_BGK[b, g, 0], share @ [0, 1 / 3, 2 / 3, 1], atol=1e-4)
      assert got.choice_BGK[b, g, 0] == want.argmax()
      assert got.correct_BGK[b, g, 0] == (want.argmax() == 3)
  # an empty caption is what `blind` asks about, and what no caption of the first image says
  np.testing.assert_allclose(got.blind.score_BGKA[0, 0], got.score_BGKA[0, 2], atol=1e-5)
  assert got.asked_BGK[..., 0].all() and not got.asked_BGK[..., 1].any()  # one question each
  assert np.ptp(got.credit_BGK[..., 0]) > 0.01  # the test could tell


@pytest.mark.parametrize("microbatches", [1, 2])
def test_texts_are_transformers_own(folder, microbatches):
  loaded, mesh = load(folder)
  rows = [QARow(folder / f"{i}.png", (), f"{i}") for i in range(2)]
  # as good as greedy
  cfg = JudgeConfig(
    sees_image=True,
    reading="generate",
    temperature=1e-4,
    max_tokens=8,
    microbatches=microbatches,
  )
  with jax.set_mesh(mesh):
    score = ScorePrompt.of_writer(loaded, TEXT)
    batch = batch_of(loaded, score, rows)
    asked = captions(loaded.tokenizer.vocab_size - 20)
    judge = ImageJudge(loaded.model, loaded.params, score.prompt)
    write = jax.jit(functools.partial(write_about_captions, cfg=cfg))
    tokens, valid = jax.device_get(write(judge, asked, batch.sight, jax.random.key(0)))
  assert tokens.shape == valid.shape == (2, 4, 8)  # the last is about an empty caption
  found = set()
  for b, row in enumerate(rows):
    for g in range(4):
      caption = asked.tokens_BGT[b, g][asked.keep_BGT[b, g]].tolist() if g < 3 else []
      model, inputs = their_inputs(folder, score, row.image, caption)
      ends = loaded.tokenizer.end_ids
      with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=[*ends])
      want = out[0, inputs["input_ids"].shape[1] :].tolist()
      assert tokens[b, g][valid[b, g]].tolist() == want
      found.add(tuple(want))
  assert len(found) > 2  # the test could tell


def test_what_was_written_becomes_answers(caplog):
  texts = [
    ['{"factuality": 1, "temporal_alignment": 1, "coverage": 1, "hallucination_penalty": 1}', "no"],
    ['{"factuality": 0.5}', '```json\n{"coverage": 0.8, "factuality": 0.5}\n```'],
  ]
  valid_BK = np.array([[True, False], [True, False]])
  weights = {"factuality": 0.5, "coverage": 0.5}

  def answers(zero, blind=False):
    return written_answers(texts, valid_BK, 5, weights, unread_is_zero=zero, blind=blind)

  got, unread_B = answers(zero=False)
  np.testing.assert_allclose(got.credit_BGK[..., 0], [[1, 0], [0, 0.65]])
  np.testing.assert_array_equal(got.valid_BGK[..., 0], [[True, False], [False, True]])
  np.testing.assert_array_equal(got.choice_BGK[..., 0], [[4, -1], [-1, 3]])  # "5" and "4" of 1 to 5
  np.testing.assert_array_equal(got.correct_BGK[..., 0], [[True, False], [False, False]])
  assert got.asked_BGK[..., 0].all() and not got.asked_BGK[..., 1].any()
  np.testing.assert_array_equal(unread_B, [0.5, 0.5])
  assert (
    "2 of 4 texts of the judge lack scores, and what they lack is left out: 'no';" in caplog.text
  )
  released, _ = answers(zero=True)
  np.testing.assert_allclose(released.credit_BGK[..., 0], [[1, 0], [0.25, 0.65]])
  assert released.valid_BGK[..., 0].all()
  apart, _ = answers(zero=False, blind=True)
  np.testing.assert_array_equal(apart.blind.credit_BGK, got.credit_BGK[:, 1:])
  np.testing.assert_array_equal(apart.credit_BGK, got.credit_BGK[:, :1])


def test_what_a_judge_that_writes_is_asked(tmp_path):
  assert score_text(None, ["truth", "detail"]).count("truth, detail") == 1
  (tmp_path / "serve_rm.py").write_text('VL_JUDGE_PROMPT = """Like {{"a": 1}}.\n{}"""')
  assert score_text(str(tmp_path / "serve_rm.py"), ["a"]) == f'Like {{"a": 1}}.\n{CAPTION}'
  for text in ("{a}", "no place", "{} and {}", "{"):
    (tmp_path / "other.py").write_text(f"VL_JUDGE_PROMPT = {text!r}")
    with pytest.raises(ValueError, match="VL_JUDGE_PROMPT must have one place {}"):
      score_text(str(tmp_path / "other.py"), ["a"])


def test_the_prompt_is_the_templates(folder):
  loaded, _ = load(folder)
  score = ScorePrompt.of(loaded, TEXT, ANSWER, SCORES)
  decode = lambda ids: loaded.tokenizer.backend.decode(list(ids), skip_special_tokens=False)
  before, between = map(decode, score.image)
  assert before.endswith("<|im_start|>user\n<|vision_start|>")
  assert between == "<|vision_end|>Please describe this image.\nCaption:\n"
  tail = decode(score.prompt.tail_L)
  assert tail.rstrip() == "\nAnswer:<|im_end|>\n<|im_start|>assistant\nThe answer is"
  assert [decode([i]).strip() for i in score.prompt.letter_A] == list(SCORES)
  with pytest.raises(ValueError, match="does not write each as one token"):
    ScorePrompt.of(loaded, TEXT, ANSWER, ("A", "circle rectangle"))
  with pytest.raises(ValueError, match="must stand in it once"):
    ScorePrompt.of(loaded, "No caption.", ANSWER, SCORES)


def test_a_row_is_one_question():
  row = with_score(QARow(b"", (), "x", {"color": "red"}), SCORES)
  [question] = row.questions
  assert (question.options, question.gold, question.kind) == (SCORES, 3, KIND)
  assert row.facts == {"color": "red"}


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(reading="option_pmi"), "sees_image: the judge gives each caption one score: set reading"),
    (dict(prompt="official"), "prompt = 'plain'"),
    (dict(draws=8), "draws = 0"),
    (dict(int8=True), "int8 and sees_image"),
    (dict(scores=("1",)), "name two or more that differ"),
    (dict(score_prompt="Good?"), "must hold {caption} once"),
    (dict(score_weights="a=1,b"), "score_weights: 'b' must be name=value"),
    (dict(score_weights="a=much"), "score_weights = 'a=much': could not convert"),
    (dict(score_weights="a=0.7,b=0.7"), "add up to 1 at most"),
    (dict(score_weights="a=nan"), "add up to 1 at most"),
    (dict(score_weights="a=-0.5,b=1"), "weights are 0 or more"),
    (dict(score_weights=""), "name one score at least"),
  ],
)
def test_settings_refused(change, message):
  settings = dict(source="x", sees_image=True, reading="letter_prob") | change
  with pytest.raises(ValueError, match=message):
    JudgeSection(**settings)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(max_tokens=10), "writes 2 scores as JSON needs 32 tokens at least; set 256"),
    (dict(score_prompt="official", max_tokens=32), "writes 4 scores as JSON needs 64 tokens"),
    (dict(score_prompt="official", score_weights="truth=1"), "names truth, for which score_prompt"),
    (dict(score_prompt="official", reading="letter_prob"), "set reading = 'generate'"),
  ],
)
def test_settings_refused_of_a_judge_that_writes(change, message):
  settings = dict(source="x", sees_image=True, reading="generate", max_tokens=256) | change
  with pytest.raises(ValueError, match=message):
    JudgeSection(**settings)


def test_what_a_judge_that_writes_is_asked_for():
  settings = dict(source="x", sees_image=True, reading="generate", max_tokens=256)
  assert JudgeSection(**settings).weights == {"truth": 0.5, "completeness": 0.5}
  asked = JudgeSection(**settings).score_text()
  assert asked.count(CAPTION) == 1 and "truth, completeness" in asked
  assert sum(JudgeSection(**settings, score_prompt="official").weights.values()) == 1
  JudgeSection(**settings, score_prompt="Rate {caption} as in score.py")


def test_it_answers_no_questions():
  section = JudgeSection(source="x", sees_image=True, reading="letter_prob")
  with pytest.raises(ValueError, match="only scores captions, in modes train and evaluate"):
    open_judge(section, kinds=(), mesh=None, seed=0)
