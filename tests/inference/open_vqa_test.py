"""A captioner's answers in words: transformers' likeliest tokens after whole prompts, with the
image and without.
"""

import copy
import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from helpers.captioner_directory import make_folder
from PIL import Image

from caprl_jax import sharding
from caprl_jax.data.question_texts import check_open_question, open_text, speaks_of_options
from caprl_jax.data.rows import QARow, Question
from caprl_jax.hub.load import load_policy
from caprl_jax.inference.open_vqa import OpenAnswerer, is_right
from caprl_jax.inference.vqa import AnswerConfig, VqaAnswer
from caprl_jax.modes.pretrain import vqa

WORDING = "Look! {question}\nBe short."
STEMS = ("What color is the shape", "What shape is present?", "Which one")
TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_folder(tmp_path_factory.mktemp("open"))


@pytest.fixture(scope="module")
def loaded(folder):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  return load_policy(str(folder / "qwen"), mesh), mesh


@pytest.fixture(scope="module")
def theirs(folder):
  """(image or None, stem) -> what transformers writes, a whole prompt at a time."""
  model = transformers.AutoModelForImageTextToText.from_pretrained(
    folder / "qwen", dtype=torch.float32
  ).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "qwen")
  processor = transformers.AutoImageProcessor.from_pretrained(folder / "qwen", backend="pil")
  template = (folder / "qwen" / "chat_template.jinja").read_text()
  ends = np.ravel(model.generation_config.eos_token_id).tolist()

  def write(image, stem):
    text = WORDING.replace("{question}", stem)
    turn = [
      {
        "role": "user",
        "content": [{"type": "image"}] * (image is not None) + [{"type": "text", "text": text}],
      }
    ]
    text = tokenizer.apply_chat_template(
      turn, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    extra = {}
    if image is not None:
      extra = dict(processor([Image.open(image).convert("RGB")], return_tensors="pt"))
      text = text.replace(
        "<|image_pad|>", "<|image_pad|>" * int(extra["image_grid_thw"].prod() // 4)
      )
    ids, written = tokenizer(text, return_tensors="pt").input_ids, []
    while len(written) < TOKENS and (not written or written[-1] not in ends):
      if image is not None:
        extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
      with torch.no_grad():
        written.append(int(model(input_ids=ids, **extra).logits[0, -1].argmax()))
      ids = torch.cat([ids, torch.tensor([[written[-1]]])], 1)
    return tokenizer.decode(written, skip_special_tokens=True).strip()

  return write


def test_answers_are_transformers_likeliest(folder, loaded, theirs, tmp_path):
  images = [folder / f"{i}.png" for i in range(3)]
  want = {
    (i, stem): (theirs(image, stem), theirs(None, stem))
    for i, image in enumerate(images)
    for stem in STEMS
  }
  assert len(set(want.values())) > 4  # the test could tell
  # The right option is what is written with the image, without it, or neither.
  options = lambda i, k, stem: (*dict.fromkeys([*want[i, stem], "neither"]),)
  rows = [
    QARow(
      image,
      tuple(
        Question(
          stem,
          options(i, k, stem),
          options(i, k, stem).index([*want[i, stem], "neither"][(i + k) % 3]),
        )
        for k, stem in enumerate(STEMS[: 3 - i])
      ),
      f"row {i}",
    )
    for i, image in enumerate(images)
  ]
  policy, mesh = loaded
  cfg = AnswerConfig(questions_per_row=2, batch_size=2)
  with (
    jax.set_mesh(mesh),
    OpenAnswerer(policy, cfg, mesh, 0, wording=WORDING, max_tokens=TOKENS) as answerer,
  ):
    got = {r.number: r.answers for batch in answerer(enumerate(rows)) for r in batch}
  for i, row in enumerate(rows):
    for question, verdict in zip(row.questions, got[i], strict=True):
      assert (verdict.written, verdict.blind_written) == want[i, question.stem]
      gold = question.options[question.gold]
      assert verdict.visual == (verdict.written == gold) and verdict.blind == (
        verdict.blind_written == gold
      )
  assert {verdict.visual for verdicts in got.values() for verdict in verdicts} == {0.0, 1.0}

  with jax.set_mesh(mesh):
    figures = vqa.ask(
      policy,
      rows,
      tmp_path / "vqa.json",
      source="here",
      cfg=cfg,
      seed=0,
      mesh=mesh,
      open_question=WORDING,
      max_tokens=TOKENS,
    )
  assert figures["accuracy"] == np.mean([v.visual for found in got.values() for v in found])
  assert "probability" not in figures
  assert figures["answer"] == {"open_question": WORDING, "max_tokens": TOKENS}
  assert figures["examples"][0] == {
    "image": "row 0",
    "question": STEMS[0],
    "right": rows[0].questions[0].options[rows[0].questions[0].gold],
    "written": want[0, STEMS[0]][0],
    "without the image": want[0, STEMS[0]][1],
  }
  assert len(figures["examples"]) == figures["questions"] == 6


def test_what_cannot_be_asked(folder, loaded):
  policy, mesh = loaded
  (folder / "broken.png").write_bytes(b"no image")
  bad, good = (
    Question("Ignore<|im_end|>", ("a", "b"), 0),
    Question("What", tuple("abcdefghijklm"), 0),
  )
  rows = [QARow(folder / "0.png", (bad, good), "0"), QARow(folder / "broken.png", (good,), "1")]
  with (
    jax.set_mesh(mesh),
    OpenAnswerer(
      policy, AnswerConfig(batch_size=1), mesh, 0, wording=WORDING, max_tokens=2
    ) as answerer,
  ):
    got = {r.number: r.error or r.answers for batch in answerer(enumerate(rows)) for r in batch}
  assert (
    got[0][0] == VqaAnswer(error="it spells a token of the chat template") and not got[0][1].error
  )
  assert "row '1': cannot read its image" in str(got[1])
  silent = dataclasses.replace(policy, tokenizer=copy.copy(policy.tokenizer))
  silent.tokenizer.__dict__["end_ids"] = ()  # a cached property's value
  with pytest.raises(
    ValueError, match="no end token: its answers would never stop; add eos_token_id"
  ):
    OpenAnswerer(silent, AnswerConfig(), mesh, 0)


def test_what_is_right():
  shown = Question("Which language?", ("C", "C#", "the B"), 1)
  assert is_right("c#", shown) and not is_right("C", shown) and not is_right("c #", shown)
  assert is_right("b.", Question("Which language?", ("C", "C#", "the B"), 2)) and not is_right(
    "", shown
  )


def test_stems_about_options_that_are_not_shown():
  about = (
    "Which of these has the highest value?",
    "Which of the following is red?",
    "From those, choose one.",
  )
  plain = ("which bar is tallest?", "What is made of wood?", "Who follows the dog?")
  assert [speaks_of_options(Question(stem, ("a", "b"), 0)) for stem in about + plain] == [
    True
  ] * 3 + [False] * 3


def test_the_wording():
  question = Question("How many {bars}?", ("2", "3"), 1)
  assert open_text(WORDING, question) == "Look! How many {bars}?\nBe short."
  check_open_question(WORDING)
  check_open_question(None)
  for wording in ("Look!", "{question} {question}"):
    with pytest.raises(ValueError, match="must have one place {question}, as "):
      check_open_question(wording)
