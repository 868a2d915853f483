"""Batches: deterministic, resumable, complete, of the shape that was measured."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from caprl_jax.data.batches import (
  ImagePrompt,
  ImageShape,
  QABatcher,
  eval_batches,
  image_shape,
  train_iterator,
)
from caprl_jax.data.judge_questions import TokenizedQuestion, question_shape
from caprl_jax.data.rows import CaptionRow, PixelLimits, QARow, read_image
from caprl_jax.models.policy import PolicyConfig
from caprl_jax.types import Batch

IMAGE = 55
CFG = PolicyConfig.from_hf(
  dict(
    model_type="qwen2_5_vl",
    image_token_id=IMAGE,
    text_config=dict(
      vocab_size=60,
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      rms_norm_eps=1e-6,
      rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
    ),
    vision_config=dict(
      depth=2,
      hidden_size=16,
      intermediate_size=24,
      num_heads=2,
      out_hidden_size=32,
      patch_size=8,
      window_size=32,
      fullatt_block_indexes=[1],
    ),
  ),
  dict(min_pixels=256, max_pixels=64 * 64),
)
SIZES = [(32, 32), (48, 16), (48, 64), (16, 80), (31, 33), (64, 64), (200, 20)]  # width, height
INSTRUCTION = "Say it."


def encode(text):
  """A token a character."""
  return [1 + ord(c) % 50 for c in text]


PIECES = (
  encode("<|im_start|>user\n<|vision_start|>"),
  encode(f"<|vision_end|>{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"),
)


def encoded(size, color=(200, 30, 30)) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", size, color).save(file, "PNG")
  return file.getvalue()


@pytest.fixture(scope="module")
def rows():
  return [QARow(encoded(size, (20 * i, 30, 200)), (), f"row{i}") for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def batcher(rows):
  # Five questions a row of two kinds; the stem says which row and question it is.
  tokenized = [
    [TokenizedQuestion((100 + i, q), ((1,), (2,)), 0, q % 2, (0.0, 0.0)) for q in range(5)]
    for i in range(len(rows))
  ]
  shape = question_shape([q for row in tokenized for q in row])
  prompt = ImagePrompt(CFG, PIECES, image_shape(rows, CFG))
  return QABatcher(rows, tokenized, prompt, 2, shape)


@pytest.mark.parametrize(
  "limits, least, most",
  [
    (PixelLimits(None, 32 * 32), 256, 32 * 32),
    (PixelLimits(60 * 60, None), 60 * 60, 64 * 64),
    (PixelLimits(1, 10**6), 256, 64 * 64),  # no further than the checkpoint's own
    (None, 256, 64 * 64),
  ],
)
def test_a_rows_own_limits_of_pixels(limits, least, most):
  pixels = dataclasses.replace(CFG.vision.pixels, min_pixels=least, max_pixels=most)
  row = CaptionRow(encoded((48, 40)), "", "limited", limits=limits)
  shape = image_shape([row], CFG)
  assert shape == ImageShape(*pixels.shape(40, 48))
  images, _ = ImagePrompt(CFG, PIECES, shape)(row)
  want = pixels.patchify(read_image(row))
  np.testing.assert_array_equal(images.patches_BSE, want.patches_SE)
  other = CaptionRow(row.image, "", "as it is")
  free = image_shape([other], CFG)
  assert image_shape([row, other], CFG).tokens == max(shape.tokens, free.tokens)


def light(index, rng):
  """A row without its image: what the iterator draws."""
  return dict(row=np.int32(index), noise=rng.integers(0, 1 << 30))


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def same(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_same_seed_same_batches():
  first, again, other = (take(train_iterator(light, 10, 5, seed), 6) for seed in (3, 3, 4))
  assert same(first, again)
  assert not same(first, other)


def test_every_epoch_has_every_row_once_in_another_order():
  rows = np.concatenate(
    [batch["row"] for batch in take(train_iterator(light, 12, 4, 0), 9)]
  ).reshape(3, 12)
  np.testing.assert_array_equal(np.sort(rows, 1), np.broadcast_to(np.arange(12), (3, 12)))
  assert len(np.unique(rows, axis=0)) == 3
  noise = np.concatenate([batch["noise"] for batch in take(train_iterator(light, 12, 4, 0), 9)])
  assert len(np.unique(noise)) == 36  # a row is drawn anew in every epoch


def test_a_batch_may_span_epochs():
  batches = take(train_iterator(light, 3, 8, 0), 2)
  assert all(batch["row"].shape == (8,) for batch in batches)
  np.testing.assert_array_equal(
    np.sort(np.concatenate([b["row"] for b in batches])[:15].reshape(5, 3), 1),
    np.broadcast_to(np.arange(3), (5, 3)),
  )


@pytest.mark.parametrize("done", [0, 1, 2, 5])
def test_resumes_exactly(done):
  iterator = train_iterator(light, 10, 4, 1)
  take(iterator, done)
  state = iterator.get_state()
  want = take(iterator, 5)
  fresh = train_iterator(light, 10, 4, 1)
  take(fresh, 3)  # where it stood does not matter
  fresh.set_state(state)
  assert same(take(fresh, 5), want)


def test_real_batches_resume_exactly(batcher):
  iterator = train_iterator(batcher.example, len(SIZES), 3, 5)
  take(iterator, 2)
  state = iterator.get_state()
  want = take(iterator, 2)
  fresh = train_iterator(batcher.example, len(SIZES), 3, 5)
  fresh.set_state(state)
  assert same(take(fresh, 2), want)
  assert isinstance(want[0], Batch)


def test_batches_hold_each_rows_own_image_prompt_and_questions(batcher, rows):
  batch = next(train_iterator(batcher.example, len(SIZES), 4, 0))
  assert len(batch.row_B) == 4
  for i, index in enumerate(batch.row_B):
    np.testing.assert_array_equal(batch.questions.stem_BKQ[i, :, 0], 100 + index)
    assert sorted(batch.questions.kind_BK[i]) == [0, 1]
    with Image.open(io.BytesIO(rows[index].image)) as image:
      patches = CFG.vision.pixels.patchify(image.convert("RGB"))
    slots = len(patches.valid_S)
    np.testing.assert_array_equal(batch.images.patches_BSE[i, :slots], patches.patches_SE)
    assert batch.images.valid_BS[i].sum() == 4 * patches.num_tokens
    tokens = batch.prompts.tokens_BP[i][batch.prompts.valid_BP[i]]
    assert (tokens == IMAGE).sum() == patches.num_tokens
    np.testing.assert_array_equal(tokens[-len(batcher.prompt.after) :], batcher.prompt.after)


def test_evaluation_sees_every_row_once_in_order_and_fills_up():
  batches = list(eval_batches(light, 7, 3, seed=2))
  assert [real for _, real in batches] == [3, 3, 1]
  np.testing.assert_array_equal(
    np.stack([b["row"] for b, _ in batches]), [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
  )
  assert [real for _, real in eval_batches(light, 6, 3, seed=2)] == [3, 3]
  [(batch, real)] = eval_batches(light, 2, 4, seed=2)
  assert real == 2 and batch["row"].tolist() == [0, 1, 1, 1]


def test_what_evaluation_draws_depends_on_seed_and_row_only():
  noise = lambda size, seed: np.concatenate(
    [b["noise"][:real] for b, real in eval_batches(light, 7, size, seed)]
  )
  np.testing.assert_array_equal(noise(3, 2), noise(5, 2))
  assert (noise(3, 2) != noise(3, 9)).any() and len(np.unique(noise(3, 2))) == 7


def test_image_shape_holds_every_image_and_is_the_smallest(rows, tmp_path):
  patches = []
  files = []
  for i, row in enumerate(rows):
    path = tmp_path / f"{i}.png"
    path.write_bytes(row.image)
    files.append(QARow(path, (), row.name))
    with Image.open(path) as image:
      patches.append(CFG.vision.pixels.patchify(image.convert("RGB")))
  want = ImageShape(max(len(p.valid_S) for p in patches), max(p.num_tokens for p in patches))
  assert image_shape(rows, CFG) == image_shape(files, CFG) == want
  # 32 x 32 pixels are 2 x 2 units of 16 pixels: one window of 2 x 2 units of 4 patches
  assert image_shape(rows[:1], CFG) == ImageShape(16, 4)
  # 3 units across need 2 windows
  assert image_shape(rows[2:3], CFG) == ImageShape(2 * 2 * 16, 4 * 3)


def test_image_shape_minds_the_orientation(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by a quarter: 16 x 48 becomes 48 x 16, and the same number of windows
  turned, upright = tmp_path / "turned.jpg", tmp_path / "upright.jpg"
  Image.new("RGB", (64, 20)).save(turned, exif=exif)
  Image.new("RGB", (20, 64)).save(upright)
  row = lambda path: QARow(path, (), path.name)
  assert image_shape([row(turned)], CFG) == image_shape([row(upright)], CFG)
  images, prompts = ImagePrompt(CFG, PIECES, image_shape([row(turned)], CFG))(row(turned))
  assert (prompts.tokens_BP == IMAGE).sum() == 4


def test_an_image_larger_than_the_bucket_names_row_and_remedy(rows):
  prompt = ImagePrompt(CFG, PIECES, ImageShape(16, 4))
  assert prompt(rows[0])[0].valid_BS.shape == (16,)
  with pytest.raises(ValueError, match="row 'row5'.*16 slots and 4 tokens.*max_pixels"):
    prompt(rows[5])


def test_a_prompt_longer_than_the_bucket_is_refused_and_not_cut(rows):
  prompt = ImagePrompt(CFG, PIECES, image_shape(rows, CFG))
  prompt.length = 10
  with pytest.raises(
    ValueError, match="more than the 10 that its batch has room for.*cut its image"
  ):
    prompt(rows[0])


@pytest.mark.parametrize("image", [b"no image", encoded((32, 32))[:60]], ids=["garbage", "cut"])
def test_an_unreadable_image_names_the_row(image, tmp_path):
  path = tmp_path / "broken.png"
  path.write_bytes(image)
  for source in (image, path):
    broken = QARow(source, (), "the broken one")
    with pytest.raises(ValueError, match="row 'the broken one'"):
      ImagePrompt(CFG, PIECES, ImageShape(16, 4))(broken)
  with pytest.raises(ValueError, match="row 'gone'"):
    image_shape([QARow(tmp_path / "gone.png", (), "gone")], CFG)


def test_an_error_in_the_pipeline_reaches_the_caller(batcher, rows):
  broken = QABatcher(
    [*rows[:2], QARow(b"no image", (), "the broken one")],
    batcher.tokenized,
    batcher.prompt,
    2,
    batcher.shape,
  )
  with pytest.raises(Exception, match="the broken one"):
    take(train_iterator(broken.example, 3, 3, 0), 1)


def test_an_extreme_image_names_the_row(rows):
  long = QARow(encoded((2010, 10)), (), "the long one")
  with pytest.raises(ValueError, match="row 'the long one'.*2010x10"):
    ImagePrompt(CFG, PIECES, image_shape(rows, CFG))(long)
  with pytest.raises(
    ValueError, match=r"row 'the long one' \(\d+ bytes in memory\).*2010x10.*200 times the other"
  ):
    image_shape([*rows, long], CFG)


def test_a_share_makes_its_own_examples_only():
  made = []

  def example(index, rng):
    made.append(light(index, rng))
    return made[-1]

  take(train_iterator(example, 12, 4, 0, share=[1, 3]), 3)
  # unique, a place
  whole = np.concatenate([batch["noise"] for batch in take(train_iterator(light, 12, 4, 0), 20)])
  noise = {int(one["noise"]) for one in made}
  assert len(noise) == len(made) >= 6 and noise <= set(whole[1::2].tolist())
