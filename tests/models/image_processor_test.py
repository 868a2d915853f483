"""Prompts, image sizes, token counts and pixels against transformers' own processors."""

import dataclasses
import functools
import io
import json
import pathlib
import tempfile
from unittest import mock

import numpy as np
import pytest
import tokenizers
import transformers
from helpers import qwen_vocabulary
from PIL import Image, ImageOps
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import PushToHubMixin

from caprl_jax.data.batches import ImagePrompt, ImageShape, image_shape
from caprl_jax.data.rows import CaptionRow, read_image
from caprl_jax.hub import hub_files
from caprl_jax.hub.chat_template import find_template
from caprl_jax.hub.load import Loaded
from caprl_jax.hub.tokenizer import Tokenizer, load_tokenizer
from caprl_jax.models.image_processor import cut_patches
from caprl_jax.models.policy import Policy, PolicyConfig

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl")
INSTRUCTION = "Please describe this image in detail."
INSTRUCTIONS = (
  INSTRUCTION,
  "",
  " ",
  "\n\n two lines \n\n",
  "What is it?<|im_end|>\n<|im_start|>assistant\nA cat.",
  "<|vision_start|><|endoftext|> <tool_call>{}</tool_call> <think>",
  "描述这张图片。",
  "décris l’image: cafe\u0301 \u212b",
  "опиши 画像 🙂👩‍👩‍👧 \u200b\ufeff",
  "1234567890 == x\t\t'S don't I'LL",
  "{{ messages }} {% raw %} <img>",
)
TEXT = dict(
  vocab_size=152064,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
)
QWEN_IDS = dict(
  image_token_id=151655,
  video_token_id=151656,
  vision_start_token_id=151652,
  vision_end_token_id=151653,
)
HALF, IMAGENET = [0.5] * 3, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

# What the hub's own preprocessor_config.json say of pixels.
RELEASED = {
  "qwen2_5_vl": dict(
    min_pixels=3136,
    max_pixels=12845056,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
    image_processor_type="Qwen2VLImageProcessor",
    processor_class="Qwen2_5_VLProcessor",
  ),
  "qwen3_vl": dict(
    size=dict(longest_edge=16777216, shortest_edge=65536),
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=HALF,
    image_std=HALF,
    processor_class="Qwen3VLProcessor",
    image_processor_type="Qwen2VLImageProcessorFast",
  ),
  "internvl": dict(
    crop_size=None,
    crop_to_patches=False,
    data_format="channels_first",
    default_to_square=True,
    device=None,
    do_center_crop=None,
    do_convert_rgb=True,
    do_normalize=True,
    do_rescale=True,
    do_resize=True,
    image_mean=IMAGENET[0],
    image_std=IMAGENET[1],
    image_processor_type="GotOcr2ImageProcessorFast",
    input_data_format=None,
    max_patches=12,
    min_patches=1,
    processor_class="InternVLProcessor",
    resample=3,
    rescale_factor=1 / 255,
    return_tensors=None,
    size=dict(height=448, width=448),
  ),
}
# Less pixels, so that hundreds of images are soon processed: both limits are met by images of a few
# hundred pixels.
REDUCED = {
  "qwen2_5_vl": dict(min_pixels=56 * 56, max_pixels=28 * 28 * 60),
  "qwen3_vl": dict(size=dict(shortest_edge=64 * 64, longest_edge=32 * 32 * 50)),
  "internvl": dict(size=dict(height=56, width=56)),
}


class _NoVideos(PushToHubMixin):
  """In the place of the video processors, which need torchvision; no test has a video."""

  _auto_class = None
  model_input_names = ()

  def to_dict(self) -> dict:
    return dict(video_processor_type="Qwen3VLVideoProcessor")


@functools.cache
def hf_tokenizer(family: str) -> transformers.PreTrainedTokenizerBase:
  return transformers.AutoTokenizer.from_pretrained(qwen_vocabulary.tokenizer_directory(family))


def hf_processor(family: str, pixels: dict, tile: int):
  """transformers' processor of a family from the contents of preprocessor_config.json."""
  kind = {
    "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
    "qwen3_vl": transformers.Qwen3VLProcessor,
    "internvl": transformers.InternVLProcessor,
  }[family]
  image_processor = GotOcr2ImageProcessorPil if family == "internvl" else Qwen2VLImageProcessorPil
  pixels = {
    k: v
    for k, v in pixels.items()
    if k not in ("processor_class", "image_processor_type") and v is not None
  }
  more = dict(image_seq_length=(tile // 28) ** 2) if family == "internvl" else {}
  with mock.patch.object(
    transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *_: None
  ):
    return kind(
      image_processor(**pixels),
      hf_tokenizer(family),
      _NoVideos(),
      chat_template=qwen_vocabulary.TEMPLATES[family],
      **more,
    )


def hf_config(family: str, tile: int) -> dict:
  """config.json of a small model with the real ids."""
  if family == "qwen2_5_vl":
    config = transformers.Qwen2_5_VLConfig(
      text_config=dict(
        TEXT, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2])
      ),
      vision_config=dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=32,
        patch_size=14,
        window_size=112,
        fullatt_block_indexes=[1],
      ),
      **QWEN_IDS,
    )
  elif family == "qwen3_vl":
    config = transformers.Qwen3VLConfig(
      text_config=dict(
        TEXT,
        head_dim=8,
        rope_parameters=dict(
          rope_type="default", rope_theta=5e6, mrope_section=[2, 1, 1], mrope_interleaved=True
        ),
      ),
      vision_config=dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=32,
        patch_size=16,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0],
      ),
      **QWEN_IDS,
    )
  else:
    config = transformers.InternVLConfig(
      text_config=dict(TEXT, model_type="qwen3", head_dim=8),
      vision_config=dict(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        image_size=[tile, tile],
        patch_size=[14, 14],
      ),
      image_token_id=151671,
      image_seq_length=(tile // 28) ** 2,
    )
  return config.to_dict()


@dataclasses.dataclass
class Pair:
  """transformers' processor, and a checkpoint's directory as we read it."""

  theirs: transformers.ProcessorMixin
  ours: Loaded
  path: pathlib.Path

  @property
  def cfg(self) -> PolicyConfig:
    return self.ours.model.cfg

  def their_inputs(self, image: Image.Image | str, instruction: str = INSTRUCTION) -> dict:
    """Ids and pixels by transformers, for a picture as PIL opened it, or for a path."""
    picture = dict(type="image", path=image) if isinstance(image, str) else dict(type="image")
    turn = [dict(role="user", content=[picture, dict(type="text", text=instruction)])]
    if isinstance(image, str):
      return self.theirs.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=True, return_dict=True
      )
    text = self.theirs.apply_chat_template(turn, add_generation_prompt=True)
    return self.theirs(text=[text], images=[image])

  def our_inputs(self, image: Image.Image, instruction: str = INSTRUCTION):
    """Images and prompts of one picture, padded to no more than it takes."""
    prompt = ImagePrompt(
      self.cfg,
      self.ours.prompt_pieces(instruction),
      ImageShape(*self.cfg.vision.pixels.shape(image.height, image.width)),
    )
    return prompt(CaptionRow(b"", "", "a picture"), image)

  def assert_same(self, theirs: dict, images, prompts, pixels: bool = True) -> None:
    """Ids, grid and normalised pixels of one picture."""
    settings = self.cfg.vision.pixels
    assert prompts.valid_BP.all()
    np.testing.assert_array_equal(prompts.tokens_BP, theirs["input_ids"][0])
    units = images.unit_BI
    values = np.stack(theirs["pixel_values"])
    if self.cfg.family.model_type == "internvl":
      patch, merge = settings.patch_size, settings.merge_size
      assert len(values) * settings.tile_tokens == len(units)
      if pixels:
        rows = settings.tile_size // patch // merge
        cut = np.stack([cut_patches(np.moveaxis(tile, 0, -1), patch) for tile in values])
        cut = cut.reshape(len(values), rows, merge, rows, merge, -1)
        values = cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, merge**2, cut.shape[-1])
    else:
      ((_, rows, columns),) = np.asarray(theirs["image_grid_thw"])
      assert rows * columns == len(units) * settings.merge_size**2 == images.valid_BS.sum()
      assert images.position_BS2[images.valid_BS].max(0).tolist() == [rows - 1, columns - 1]
      # Two equal frames, of which we keep one.
      values = values.reshape(len(units), settings.merge_size**2, 3, 2, -1)
      assert (values[:, :, :, 0] == values[:, :, :, 1]).all()
      values = values[:, :, :, 0].reshape(len(units), settings.merge_size**2, -1)
    if pixels:
      patches = images.patches_BSE.reshape(-1, *values.shape[1:])[units]
      mean, std = (
        np.repeat(np.float32(x), patches.shape[-1] // 3) for x in (settings.mean, settings.std)
      )
      np.testing.assert_allclose((patches / 255 - mean) / std, values, rtol=1e-5, atol=1e-5)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix="processor_test_")


@functools.cache
def make_pair(family: str, released: bool = False) -> Pair:
  """A directory that transformers' processor wrote, and what we read of it; with few pixels, or
  those released.
  """
  qwen_vocabulary.tokenizer_directory(family)  # skips where the vocabulary is not installed
  tile = 448 if released else 56
  pixels = (
    RELEASED[family]
    if released
    else {
      **{
        k: v for k, v in RELEASED[family].items() if k not in ("min_pixels", "max_pixels", "size")
      },
      **REDUCED[family],
    }
  )
  theirs = hf_processor(family, pixels, tile)
  path = pathlib.Path(_folder().name) / f"{family}-{tile}"
  theirs.save_pretrained(path)
  (path / "config.json").write_text(json.dumps(hf_config(family, tile)))
  return Pair(
    theirs, read(path, make_pair(family).ours.tokenizer if released else load_tokenizer(path)), path
  )


def read(path: pathlib.Path, tokenizer: Tokenizer) -> Loaded:
  """What `load_policy` reads of a directory, weights and the slow tokenizer aside."""
  config, preprocessor = (
    hub_files.read_json(path / "config.json"),
    hub_files.read_preprocessor(path),
  )
  cfg = PolicyConfig.from_hf(config, preprocessor)
  return Loaded(
    Policy(cfg), {}, tokenizer, config, preprocessor, None, hub_files.read_small_files(path)
  )


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
  return Image.fromarray(
    np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  )


def sizes() -> list[tuple[int, int]]:
  """At least 200 widths and heights; no side over 200 times the other."""
  rng = np.random.default_rng(0)
  edges = [
    (1, 1),
    (1, 2),
    (2, 1),
    (3, 3),
    (1, 3),
    (3, 1),
    (1, 200),
    (200, 1),
    (3, 600),
    (600, 3),
    (2, 399),
    (28, 28),
    (27, 28),
    (28, 29),
    (14, 14),
    (42, 42),
    (56, 56),
    (55, 57),
    (56, 112),
    (448, 448),
    (32, 32),
    (48, 48),
    (16, 16),
    (64, 64),
    (33, 31),
    (840, 56),
    (56, 840),
    (900, 5),
    (5, 900),
    (1, 199),
    (199, 1),
    (70, 70),
    (98, 98),
    (84, 42),
    (42, 126),
    (80, 80),
    (112, 16),
    (16, 48),
    (13, 41),
    (447, 449),
    (640, 480),
    (480, 640),
  ]
  even = [(int(w), int(h)) for w, h in rng.integers(1, 500, (100, 2))]
  thin = [(int(w), int(h)) for w, h in np.exp(rng.uniform(0, np.log(900), (80, 2))).round()]
  return [(w, h) for w, h in dict.fromkeys(edges + even + thin) if max(w, h) <= 200 * min(w, h)]


def test_the_vocabulary_is_the_real_one():
  ranks = qwen_vocabulary.read_ranks()
  vocab, merges = qwen_vocabulary.vocabulary()
  # lines of the hub's vocab.json and merges.txt
  assert len(vocab) == 151643 and len(merges) == 151387
  ours = load_tokenizer(qwen_vocabulary.tokenizer_directory("qwen3_vl"))
  assert ours.encode("Hello world") == [9707, 1879]
  assert ours.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n") == [
    151644,
    8948,
    198,
    2610,
    525,
    264,
    10950,
    17847,
    13,
    151645,
    198,
  ]
  assert ours.encode(
    "<|im_start|>user\nDescribe this image.<|im_end|>\n<|im_start|>assistant\n"
  ) == [151644, 872, 198, 74785, 419, 2168, 13, 151645, 198, 151644, 77091, 198]
  # By tiktoken's rule, from the ranks alone; words as the file's regular expression cuts them.
  words = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex(qwen_vocabulary.WORDS), behavior="isolated"
  )
  for text in (
    "It's 1,234 o'clock…",
    "опиши 画像 🙂👩‍👩‍👧",
    "def f(x):\n    return  x**2\r\n\r\n",
    "Straße \t naïve ﷽",
  ):
    expected = [
      ranks[token]
      for word, _ in words.pre_tokenize_str(text)
      for token in qwen_vocabulary.bpe(word.encode(), ranks)
    ]
    assert ours.encode(text) == expected
    assert ours.decode(expected) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_those_of_transformers(family):
  """Of the directory that transformers' tokenizer was read from, and of that which its processor
  wrote.
  """
  written = make_pair(family).ours.tokenizer
  theirs, ours = hf_tokenizer(family), load_tokenizer(qwen_vocabulary.tokenizer_directory(family))
  ids = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|object_ref_start|>": 151646,
    "<|box_end|>": 151649,
    "<|quad_start|>": 151650,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
    "<tool_call>": 151657,
    "<|file_sep|>": 151664,
  }
  ids |= {"<tool_response>": 151665, "</think>": 151668} if family != "qwen2_5_vl" else {}
  ids |= (
    {"<img>": 151669, "</img>": 151670, "<IMG_CONTEXT>": 151671} if family == "internvl" else {}
  )
  for token, token_id in ids.items():
    assert (
      ours.id_of(token) == written.id_of(token) == theirs.convert_tokens_to_ids(token) == token_id
    )
  assert ours.special_ids == written.special_ids == set(range(151643, len(theirs)))
  for text in (*INSTRUCTIONS, *ids, "".join(ids)):
    assert ours.encode(text) == written.encode(text) == theirs(text)["input_ids"], text


def test_tokens_from_vocab_and_merges(tmp_path):
  """As older repositories have them: vocab.json, merges.txt and the added tokens in
  tokenizer_config.json.
  """
  path = qwen_vocabulary.tokenizer_directory("qwen2_5_vl")
  vocab, merges = qwen_vocabulary.vocabulary()
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  (tmp_path / "merges.txt").write_text(
    "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n"
  )
  (tmp_path / "tokenizer_config.json").write_bytes((path / "tokenizer_config.json").read_bytes())
  ours, theirs = load_tokenizer(tmp_path), hf_tokenizer("qwen2_5_vl")
  assert ours.special_ids == set(range(151643, len(theirs)))
  for text in (*INSTRUCTIONS, "".join(qwen_vocabulary.SPECIAL + qwen_vocabulary.QWEN25)):
    assert ours.encode(text) == theirs(text)["input_ids"], text
    assert ours.special_ids.isdisjoint(ours.encode_plain(text))


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt(family, instruction):
  pair, image = make_pair(family), noise(70, 130)
  pair.assert_same(pair.their_inputs(image, instruction), *pair.our_inputs(image, instruction))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_token_in_the_instruction_is_refused(family):
  """As transformers does: there would be more image tokens than image features."""
  pair = make_pair(family)
  token = pair.ours.tokenizer.backend.id_to_token(pair.cfg.image_token)
  for instruction in (token, f"Describe {pair.cfg.family.marker} this."):
    with pytest.raises(ValueError, match="number of images"):
      pair.their_inputs(noise(56, 56), instruction)
    with pytest.raises(ValueError, match="instruction"):
      pair.ours.prompt_pieces(instruction)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(family):
  """Ids, grids, token counts and pixels."""
  pair, tried = make_pair(family), sizes()
  assert len(tried) >= 200
  for seed, (width, height) in enumerate(tried):
    image = noise(width, height, seed)
    try:
      pair.assert_same(pair.their_inputs(image), *pair.our_inputs(image))
    except AssertionError as error:
      raise AssertionError(f"{width}x{height}: {error}") from error


@pytest.mark.parametrize("family", FAMILIES)
def test_token_counts_with_the_released_limits(family):
  """Of images too large and too many to make."""
  pair = make_pair(family, released=True)
  rng = np.random.default_rng(1)
  large = [(int(w), int(h)) for w, h in np.exp(rng.uniform(3, np.log(20000), (2000, 2))).round()]
  tried = [(w, h) for w, h in sizes() + large if max(w, h) <= 200 * min(w, h)]
  theirs = pair.theirs._get_num_multimodal_tokens(image_sizes=[(h, w) for w, h in tried])
  # InternVL's processor counts the tokens around the image's
  around = 2 if family == "internvl" else 0
  for (width, height), tokens, patches in zip(
    tried, theirs.num_image_tokens, theirs.num_image_patches, strict=True
  ):
    assert pair.cfg.vision.pixels.shape(height, width)[1] == tokens - around, (width, height)
    if family != "internvl":
      rows, columns = pair.cfg.vision.pixels.units(height, width)
      assert rows * columns * 4 == patches, (width, height)


@pytest.mark.parametrize("family", FAMILIES)
def test_released_files_say_the_same_in_every_layout(family, tmp_path):
  """The hub's layout (preprocessor_config.json, chat_template.json) and that of transformers 5
  (processor_config.json, chat_template.jinja)."""
  pair = make_pair(family, released=True)
  for name in ("tokenizer_config.json", "config.json"):
    (tmp_path / name).write_bytes((pair.path / name).read_bytes())
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(RELEASED[family]))
  (tmp_path / "chat_template.json").write_text(
    json.dumps({"chat_template": qwen_vocabulary.TEMPLATES[family]})
  )
  if family == "internvl":
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(image_seq_length=256)))
  hub = read(tmp_path, pair.ours.tokenizer)
  assert hub.model.cfg == pair.cfg
  assert hub.prompt_pieces(INSTRUCTION) == pair.ours.prompt_pieces(INSTRUCTION)
  (tmp_path / "chat_template.json").unlink()
  config = json.loads((pair.path / "tokenizer_config.json").read_bytes())
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({**config, "chat_template": qwen_vocabulary.TEMPLATES[family]})
  )
  assert read(tmp_path, pair.ours.tokenizer).prompt_pieces(INSTRUCTION) == pair.ours.prompt_pieces(
    INSTRUCTION
  )


def test_released_image_of_full_size():
  """One picture a family with the pixels as released."""
  for family in FAMILIES:
    pair, image = make_pair(family, released=True), noise(700, 400)
    pair.assert_same(pair.their_inputs(image), *pair.our_inputs(image))


@pytest.mark.parametrize(
  "present",
  [
    ("chat_template.jinja",),
    ("chat_template.json", "chat_template.jinja"),
    ("processor_config.json",),
    ("processor_config.json", "chat_template.json", "chat_template.jinja"),
    ("processor_config.json", "chat_template.jinja", "tokenizer_config.json"),
  ],
)
def test_the_template_is_the_one_that_transformers_takes(present, tmp_path):
  for name in present:
    (tmp_path / name).write_text(
      name if name.endswith(".jinja") else json.dumps(dict(chat_template=name))
    )
  found, _ = transformers.Qwen2_5_VLProcessor.get_processor_dict(tmp_path)
  assert find_template(hub_files.read_small_files(tmp_path)) == found["chat_template"]


def test_the_image_processor_is_the_one_that_transformers_takes(tmp_path):
  """transformers 5 saves processor_config.json next to a preprocessor_config.json that was there
  before.
  """
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(max_pixels=1)))
  (tmp_path / "processor_config.json").write_text(
    json.dumps(dict(image_processor=dict(max_pixels=2)))
  )
  found, _ = Qwen2VLImageProcessorPil.get_image_processor_dict(tmp_path)
  assert hub_files.read_preprocessor(tmp_path)["max_pixels"] == found["max_pixels"]


@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3_vl"))
def test_extreme_aspect_is_refused(family):
  pair = make_pair(family)
  for width, height in ((201, 1), (1, 201), (401, 2), (2, 401), (3, 601), (5000, 24)):
    image = noise(width, height)
    with pytest.raises(ValueError, match="aspect ratio"):
      pair.their_inputs(image)
    for ours in (
      lambda: pair.our_inputs(image),
      lambda: pair.cfg.vision.pixels.patchify(image),
      lambda: pair.cfg.vision.pixels.shape(height, width),
    ):
      with pytest.raises(ValueError, match="200 times"):
        ours()


def test_internvl_takes_any_aspect():
  pair = make_pair("internvl")
  for width, height in ((201, 1), (1, 5000), (5000, 1), (3, 900)):
    image = noise(width, height)
    pair.assert_same(pair.their_inputs(image), *pair.our_inputs(image))


def _turned(orientation: int) -> bytes:
  exif = Image.Exif()
  exif[0x0112] = orientation
  out = io.BytesIO()
  noise(70, 40, orientation).save(out, "JPEG", exif=exif)
  return out.getvalue()


def _encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
  out = io.BytesIO()
  image.save(out, kind, **options)
  return out.getvalue()


def _alpha(width: int, height: int) -> Image.Image:
  return Image.fromarray(
    np.random.default_rng(9).integers(0, 256, (height, width, 4), dtype=np.uint8)
  )


def opaque() -> dict[str, bytes]:
  """Encoded pictures that hold no transparency, by what is special of them."""
  picture = noise(61, 47)
  made = {
    "RGB": _encode(picture),
    "L": _encode(picture.convert("L")),
    "1": _encode(picture.convert("1")),
    "P": _encode(picture.quantize(200)),
    "P of 2 colors": _encode(picture.quantize(2)),
    "P of one row": _encode(noise(90, 1).quantize(9)),
    "L of one pixel": _encode(Image.new("L", (1, 1), 77)),
    "L of 3 rows": _encode(noise(40, 3).convert("L")),
    "L of 3 columns": _encode(noise(3, 40).convert("L")),
    "GIF": _encode(picture.quantize(64), "GIF"),
    "BMP": _encode(picture, "BMP"),
    "CMYK JPEG": _encode(picture.convert("CMYK"), "JPEG"),
    "CMYK TIFF": _encode(picture.convert("CMYK"), "TIFF"),
    "L JPEG": _encode(picture.convert("L"), "JPEG"),
    "1 TIFF": _encode(picture.convert("1"), "TIFF"),
    "YCbCr TIFF": _encode(picture.convert("YCbCr"), "TIFF"),
    "LAB TIFF": _encode(Image.frombytes("LAB", (61, 47), picture.tobytes()), "TIFF"),
    "WebP": _encode(picture, "WEBP"),
    "PNG with EXIF": _encode(picture, exif=_exif(6)),
  }
  return made | {f"EXIF {i}": _turned(i) for i in range(1, 9)}


def _exif(orientation: int) -> Image.Exif:
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif


def transparent() -> dict[str, bytes]:
  picture, alpha = noise(61, 47), _alpha(61, 47)
  return {
    "RGBA": _encode(alpha),
    "LA": _encode(alpha.convert("LA")),
    "clear RGBA": _encode(Image.new("RGBA", (40, 40))),
    "P, one colour": _encode(picture.quantize(16), transparency=3),
    "P, alpha a colour": _encode(picture.quantize(16), transparency=bytes(range(0, 256, 16))),
    "L, one grey": _encode(picture.convert("L").quantize(4).convert("L"), transparency=0),
    "L, a grey it has": _encode(
      Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)), transparency=9
    ),
    "RGB, one colour": _encode(picture, transparency=picture.getpixel((3, 4))),
    "GIF": _encode(picture.quantize(16), "GIF", transparency=2),
    "WebP": _encode(alpha, "WEBP", lossless=True),
    "turned": _encode(alpha, exif=_exif(8)),
    "TIFF": _encode(alpha, "TIFF"),
  }


def _difference(pair: Pair, path: pathlib.Path, image) -> str:
  """Where ours and transformers' differ; "" where they do not."""
  row = CaptionRow(path, "", path.name)
  prompt = ImagePrompt(pair.cfg, pair.ours.prompt_pieces(INSTRUCTION), image_shape([row], pair.cfg))
  try:
    pair.assert_same(pair.their_inputs(image), *prompt(row))
  except (AssertionError, ValueError) as error:
    return str(error)
  return ""


@pytest.mark.parametrize("family", FAMILIES)
def test_modes_without_transparency(family, tmp_path):
  """Read by us and by transformers from one file."""
  pair = make_pair(family)
  for name, data in opaque().items():
    path = tmp_path / name
    path.write_bytes(data)
    assert _difference(pair, path, str(path)) == "", name


@pytest.mark.parametrize("family", FAMILIES)
def test_transparency_is_laid_over_white(family, tmp_path):
  """As transformers does with a PIL image. From a path its `load_image` drops the alpha channel
  instead, and what lies beneath is seen (mostly black); we take a file as the image that it holds.
  """
  pair = make_pair(family)
  for name, data in transparent().items():
    path = tmp_path / name.replace(" ", "_")
    path.write_bytes(data)
    with Image.open(path) as image:
      assert "A" in image.getbands() or "transparency" in image.info
      assert _difference(pair, path, ImageOps.exif_transpose(image)) == "", name
  row = CaptionRow(transparent()["clear RGBA"], "", "clear")
  assert np.asarray(read_image(row)).min() == 255
  assert not np.asarray(
    transformers.image_utils.load_image(Image.open(io.BytesIO(row.image)))
  ).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_more_than_8_bits_are_scaled(family, tmp_path):
  """Here we differ from transformers, for which PIL cuts values off at 255, so that such images are
  nearly white.
  """
  pair = make_pair(family)
  grey = np.random.default_rng(3).integers(0, 65536, (30, 40)).astype(np.uint16)
  made = {
    "I;16.png": Image.fromarray(grey),
    "I;16.tiff": Image.fromarray(grey),
    "I;16B.tiff": Image.fromarray(grey.astype(">u2")),
    "I.tiff": Image.fromarray(grey.astype(np.int32)),
    "F.tiff": Image.fromarray(grey.astype(np.float32)),
  }
  expected = Image.fromarray(np.round(grey / 257).astype(np.uint8)).convert("RGB")
  for name, image in made.items():
    path = tmp_path / name
    image.save(path)
    with Image.open(path) as opened:
      assert opened.mode.startswith(name[0])
    np.testing.assert_array_equal(read_image(CaptionRow(path, "", name)), expected)
    assert _difference(pair, path, expected) == "", name
    cut_off = np.asarray(transformers.image_utils.load_image(str(path)))
    assert np.median(cut_off) == 255
