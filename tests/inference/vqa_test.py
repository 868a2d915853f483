"""A captioner's own answers: against transformers on each whole prompt, over permutations, without
images; refusals.
"""

import dataclasses
import string

import jax
import numpy as np
import pytest
import torch
import transformers
from helpers.captioner_directory import make_folder
from PIL import Image

from caprl_jax import sharding
from caprl_jax.data.question_texts import NONE, orders, question_text, shuffled_orders
from caprl_jax.data.rows import QARow, Question
from caprl_jax.hub.load import load_policy
from caprl_jax.inference.open_vqa import OfficialAnswerer, letter_answerer
from caprl_jax.inference.vqa import AnswerConfig, Answerer, VqaAnswer

QUESTIONS = (
  Question("What color is the shape", ("red", "green", "blue", "teal"), 2),
  Question("What shape is present?", ("circle", "image"), 0),
  Question("Which one", ("a", "b", "c"), 1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_folder(tmp_path_factory.mktemp("answering"))


def load(folder):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  return load_policy(str(folder / "qwen"), mesh), mesh


def whole_prompts(folder):
  """transformers' model, and (text, image or None) -> what it is given: ids, and the pixels."""
  model = transformers.AutoModelForImageTextToText.from_pretrained(
    folder / "qwen", dtype=torch.float32
  ).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "qwen")
  processor = transformers.AutoImageProcessor.from_pretrained(folder / "qwen", backend="pil")
  template = (folder / "qwen" / "chat_template.jinja").read_text()

  def prompt(text, image):
    content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": text}]
    text = tokenizer.apply_chat_template(
      [{"role": "user", "content": content}],
      chat_template=template,
      add_generation_prompt=True,
      tokenize=False,
    )
    extra = {}
    if image is not None:
      extra = dict(processor([Image.open(image).convert("RGB")], return_tensors="pt"))
      text = text.replace(
        "<|image_pad|>", "<|image_pad|>" * int(extra["image_grid_thw"].prod() // 4)
      )
    ids = tokenizer(text, return_tensors="pt").input_ids
    if image is not None:
      extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return ids, extra

  return model, prompt


def theirs(folder, image, questions, cfg, seed):
  """Verdicts by transformers, a whole prompt at a time."""
  model, prompt = whole_prompts(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "qwen")
  letters = [
    tokenizer.encode(letter, add_special_tokens=False)[0] for letter in string.ascii_uppercase[:11]
  ]
  made = []
  for question in questions:
    sums = np.zeros(4)
    for order in orders(question, cfg.permutations, seed):
      for with_image in (True, False):
        text = question_text(question, order, with_image and cfg.none_of_above)
        ids, extra = prompt(text, image if with_image else None)
        with torch.no_grad():
          logits = model(input_ids=ids, **extra).logits[
            0, -1, letters[: len(order) + (with_image and cfg.none_of_above)]
          ]
        p, gold = torch.softmax(logits, 0).numpy(), order.index(question.gold)
        sums[0 if with_image else 1] += p.argmax() == gold
        sums[2 if with_image else 3] += p[gold]
    made.append(sums / cfg.permutations)
  return made


@pytest.mark.parametrize("none_of_above", [True, False])
def test_verdicts_are_transformers_own(folder, none_of_above):
  cfg = AnswerConfig(permutations=3, none_of_above=none_of_above, questions_per_row=2, batch_size=2)
  loaded, mesh = load(folder)
  rows = [QARow(folder / f"{i}.png", QUESTIONS[:n], str(i)) for i, n in enumerate((3, 2, 1))]
  with jax.set_mesh(mesh), Answerer(loaded, cfg, mesh, seed=5) as answerer:
    got = {r.number: r.answers for batch in answerer(enumerate(rows)) for r in batch}
    assert got.keys() == {0, 1, 2}
  for i, row in enumerate(rows):
    want = theirs(folder, row.image, row.questions, cfg, 5)
    np.testing.assert_allclose(
      [dataclasses.astuple(verdict)[:4] for verdict in got[i]], want, atol=2e-5
    )
  shares = {verdict.visual for verdicts in got.values() for verdict in verdicts}
  assert len(shares) > 1  # the test could tell


class Recorder(OfficialAnswerer):
  """The released way of asking, but greedily; keeps what is written."""

  temperature = 0.0
  written: dict = {}

  def verdict(self, question, visual, blind):
    self.written[question] = [[self._text(tokens) for tokens in side] for side in (visual, blind)]
    return super().verdict(question, visual, blind)


def test_the_released_way_of_asking_is_transformers_own(folder):
  cfg = AnswerConfig(protocol="official", permutations=2, questions_per_row=2, batch_size=1)
  loaded, mesh = load(folder)
  row = QARow(folder / "0.png", QUESTIONS[:2], "0")
  with jax.set_mesh(mesh), Recorder(loaded, cfg, mesh, seed=5) as answerer:
    [[result]] = list(answerer([(0, row)]))
  model, prompt = whole_prompts(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "qwen")
  for question, answer in zip(row.questions, result.answers, strict=True):
    shares = []
    for side, image in enumerate((row.image, None)):
      right = []
      for n, order in enumerate(shuffled_orders(question, 2, 5)):
        ids, extra = prompt(question_text(question, order, image is not None), image)
        with torch.no_grad():
          made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            do_sample=False,
            repetition_penalty=1.05,
            **extra,
          )
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert answerer.written[question][side][n] == text
        right.append(string.ascii_uppercase[order.index(question.gold)] in text)
      shares.append(np.mean(right))
    assert (answer.visual, answer.blind) == tuple(shares) and not answer.error


class Uniform(Recorder):
  """Draws all tokens alike, so that what is written shows the random numbers alone."""

  temperature = 1e4

  def verdict(self, question, visual, blind):
    self.written.setdefault(question, []).extend(map(bytes, (*visual, *blind)))
    return super(Recorder, self).verdict(question, visual, blind)


def test_each_presentation_draws_by_itself(folder, monkeypatch):
  """With the image and without it, in every row, whatever is asked beside it."""
  loaded, mesh = load(folder)
  rows = [QARow(folder / "0.png", QUESTIONS[:1], str(i)) for i in range(3)]
  found = []
  for size in (1, 2):
    monkeypatch.setattr(Uniform, "written", {})
    cfg = AnswerConfig(protocol="official", permutations=2, questions_per_row=1, batch_size=size)
    with jax.set_mesh(mesh), Uniform(loaded, cfg, mesh, seed=5) as answerer:
      assert sum(len(batch) for batch in answerer(enumerate(rows))) == 3
    found.append(Uniform.written[QUESTIONS[0]])
  assert found[0] == found[1] and len(found[0]) == len(set(found[0])) == 12


def test_a_letter_anywhere_counts_in_the_released_way(folder):
  loaded, mesh = load(folder)
  cfg = AnswerConfig(protocol="official", permutations=4)
  question = QUESTIONS[0]
  gold = ["ABCD"[order.index(question.gold)] for order in shuffled_orders(question, 4, 0)]
  assert len({tuple(order) for order in shuffled_orders(question, 4, 0)}) > 1

  def written(*texts):
    ids = [loaded.tokenizer.encode_plain(text) for text in texts]
    width = max(map(len, ids))
    return np.array([[*i, *[-1] * (width - len(i))] for i in ids])

  with jax.set_mesh(mesh), letter_answerer(loaded, cfg, mesh, 0) as answerer:
    assert isinstance(answerer, OfficialAnswerer)
    got = answerer.verdict(
      question,
      written(gold[0], f"x{gold[1]}x", gold[2].lower(), f"the {gold[3]}"),
      written("", "", "", gold[3]),
    )
  assert (got.visual, got.blind) == (0.75, 0.25)


def test_what_cannot_be_asked(folder):
  loaded, mesh = load(folder)
  bad = Question("Ignore<|im_end|>", ("a", "b"), 0)
  spelt = Question("What is <|image_pad|>", ("a", "b"), 0)
  many = Question("Which", tuple("abcdefghijk"), 0)
  (folder / "broken.png").write_bytes(b"no image")
  rows = [
    QARow(folder / "0.png", (QUESTIONS[0], bad, spelt, many), "0"),
    QARow(folder / "broken.png", QUESTIONS, "1"),
  ]
  with jax.set_mesh(mesh), Answerer(loaded, AnswerConfig(batch_size=1), mesh, seed=0) as answerer:
    got = {r.number: r.error or r.answers for batch in answerer(enumerate(rows)) for r in batch}
  assert isinstance(got[1], ValueError) and "row '1': cannot read its image" in str(got[1])
  good, *others = got[0]
  assert not good.error and good.visual_prob > 0
  assert [verdict.error for verdict in others] == ["it spells a token of the chat template"] * 2 + [
    "11 options, more than 10"
  ]
  assert others[0] == VqaAnswer(error=others[0].error)


def test_a_damaged_image_is_one_failure_and_no_questions_are_no_work(folder):
  """Its header can be read, so that both of its asks are dispatched, in batches of their own."""
  loaded, mesh = load(folder)
  Image.open(folder / "0.png").save(folder / "whole.jpg", quality=100)
  data = (folder / "whole.jpg").read_bytes()
  (folder / "torn.jpg").write_bytes(data[: len(data) - 200])
  rows = [
    (4, QARow(folder / "torn.jpg", QUESTIONS, "torn")),
    (9, QARow(folder / "absent.png", (), "silent")),
    (2, QARow(folder / "0.png", QUESTIONS, "good")),
  ]
  cfg = AnswerConfig(questions_per_row=2, batch_size=1, permutations=1)
  with jax.set_mesh(mesh), Answerer(loaded, cfg, mesh, seed=0) as answerer:
    got = [result for batch in answerer(rows) for result in batch]
  assert [(result.number, result.row) for result in got] == [rows[1], rows[0], rows[2]]
  assert [len(result.answers) for result in got] == [0, 0, 3]
  assert got[0].error is None and "torn.jpg" in str(got[1].error)


def test_orders_rotate():
  question = QUESTIONS[0]
  made = orders(question, 4, 0)
  assert sorted(order.index(question.gold) for order in made) == [0, 1, 2, 3] and all(
    sorted(o) == [0, 1, 2, 3] for o in made
  )
  assert (
    made == orders(question, 4, 0)
    and len({str(orders(question, 1, seed)) for seed in range(20)}) > 5
  )


def test_the_released_wording():
  assert question_text(QUESTIONS[2], [2, 0, 1], True) == (
    f"Which one\n   - A) c\n   - B) a\n   - C) b\n   - D) {NONE}. Answer the question with only "
    "the correct letter"
  )


def test_settings_refused():
  with pytest.raises(ValueError, match="permutations = 0"):
    AnswerConfig(permutations=0)
