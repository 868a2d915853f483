"""Good inputs of each kind, tiny; made once per process."""

import functools
import io
import json
import pathlib
import tempfile
import zipfile

import numpy as np
from helpers.paths import ROOT
from PIL import Image

from fuzz.mutations import tar_of

Files = dict[str, bytes]
WARM_START = ROOT / "configs" / "quickstart_policy"


@functools.cache
def picture(form: str = "PNG", size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
  """An encoded image with some texture."""
  rng = np.random.default_rng(0)
  file = io.BytesIO()
  pixels = rng.integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
  image = Image.fromarray(pixels, "RGBA").convert(mode)
  more = {"save_all": True, "append_images": [image] * 2} if form in ("GIF", "TIFF") else {}
  image.save(file, form, **more)
  return file.getvalue()


def _lines(rows: list) -> bytes:
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _json(value) -> bytes:
  return json.dumps(value, indent=1, ensure_ascii=False).encode()


PICTURES = {"a.png": picture(), "b.jpg": picture("JPEG", (20, 33))}


def rows() -> Files:
  questions = [
    {"stem": "What colour?", "options": ["red", "green", "blue"], "gold": 1, "kind": "colour"},
    {"stem": "形は?", "options": ["円", "A square"], "gold": "A", "provenance": "us"},
  ]
  lines = [
    {"image": "a.png", "questions": questions, "name": "one", "facts": {"colour": "green"}},
    {"image": "b.jpg", "questions": questions[:1]},
  ]
  return {"rows.jsonl": _lines(lines), **PICTURES}


def release_rows() -> Files:
  text = "What colour is it?\n   - A) red\n   - B) blue\n   - C) Can not answer"
  turns = [
    {"role": "system", "content": "You see."},
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text"}]},
    {"role": "answer", "content": repr([(text, "A"), (text, "B")])},
  ]
  listed = [
    {"image_path": "a.png", "qa_list": [{"question": text, "answer": "A"}]},
    {"message": json.dumps(turns)},
    {"message": turns},
  ]
  return {"rows.json": _json(listed), **PICTURES}


def conversations() -> Files:
  lines = [
    {"image": "a.png", "caption": "A picture."},
    {
      "id": 7,
      "image": "b.jpg",
      "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "Noise."},
      ],
    },
    {
      "messages": [
        {"role": "system", "content": "See."},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, _part("What?")]},
        {"role": "assistant", "content": "Noise."},
      ],
    },
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
  ]
  return {"talk.jsonl": _lines(lines), **PICTURES}


def _part(text: str) -> dict:
  return {"type": "text", "text": text}


def captions() -> Files:
  lines = [
    {"image": "a.png", "caption": "A picture.", "tokens": [1, 2], "finish": "end"},
    {"image": "b.jpg", "caption": "第二。", "name": "b"},
  ]
  return {"captions.jsonl": _lines(lines), **PICTURES}


def benchmark() -> Files:
  prompt = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which?\nA. one\nB. two"
    "<|im_end|>\n<|im_start|>assistant\n"
  )
  listed = [
    {"image": "a.png", "prompt": prompt, "answer": "A"},
    {"image": [{"image": "b.jpg"}], "prompt": prompt, "answer": ["B", 2]},
  ]
  asked = {"question": "Which?", "choices": ["one", "two"], "answer": "two", "source": "x"}
  captionqa = [
    {"id": "nat_1", "images": ["a.png"], "questions": [asked | {"category": ["Spatial - Layout"]}]},
    {"id": "nat_2", "image": "b.jpg", "questions": [asked, asked], "domain": "natural"},
  ]
  packed = io.BytesIO()
  with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
    for name, data in PICTURES.items():
      file.writestr(f"images/{name}", data)
  files = {"lmm_eval_MMStar.json": _json(listed), "images.zip": packed.getvalue()}
  return files | {"captionqa.json": _json(captionqa), **PICTURES}


FORMS = (("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "L"), ("JPEG", "RGB"))
FORMS += (("JPEG", "CMYK"), ("WEBP", "RGBA"), ("GIF", "P"), ("TIFF", "RGB"), ("BMP", "RGB"))
FORMS += (("PPM", "RGB"), ("ICO", "RGBA"), ("TGA", "RGB"), ("JPEG2000", "RGB"))


def tars() -> Files:
  members = {"a.png": PICTURES["a.png"], "a.txt": b"words", "d/b.jpg": PICTURES["b.jpg"]}
  return {"shards/0.tar": tar_of(members), "shards/1.tar": tar_of({"c.png": PICTURES["a.png"]})}


def metrics() -> Files:
  lines = [{"step": i, "reward/mean": 0.1 * i, "time/step_secs": 1.0, "x/y": None} for i in (1, 2)]
  answers = [{"question": 0, "choice": 1, "correct": True, "valid": True}]
  answers += [{"question": 0, "choice": -1, "correct": False, "valid": True}]
  text = {"text": "A.", "length_tokens": 2, "reward": 0.5, "advantage": -0.1, "answers": answers}
  asked = [{"stem": "What?", "options": ["a", "b"], "gold": 1, "kind": "k"}]
  row = {"row": 0, "name": "a", "image": "images/a.png", "questions": asked, "captions": [text]}
  samples = _json({"stage": "train", "step": 1, "rows": [row]})
  summary = {
    "gate": {"empty": 0.1, "generic": 0.2, "ideal": 0.9, "questions": 10},
    "before": {"accuracy": 0.3, "accuracy/colour": 0.2, "length_tokens": 5.0},
    "after": {"accuracy": 0.6, "length_tokens": 7.0},
    "wall_secs": {"gate": 1.5, "train": 70.0},
    "counts": {"kept/colour": 3, "dropped/colour": 1, "images": 4},
    "config": {"mode": "train"},
    "versions": {"jax": "0"},
  }
  files = {"metrics.jsonl": _lines(lines), "summary.json": _json(summary)}
  files |= {f"samples/{name}.json": samples for name in ("before", "after", "step_000001")}
  return files | {"samples/images/a.png": PICTURES["a.png"]}


def records() -> Files:
  """What modes leave in their workdirs to go on from, beside metrics."""
  stage = {"finished": True, "config": {"data": "a", "steps": 3}}
  pretrain = {"seed": 0, "pretrain_policy": {"vision": "v"}, "stages": {"first": stage}}
  job = {"version": 1, "settings": {"prompt": "p"}, "rows": "abc", "shard_rows": 2}
  files = {"best/best.json": {"step": 3, "accuracy": 0.5}, "pretrain.json": pretrain}
  start = {"at": "2026", "versions": {"jax": "0"}}
  record = {"config": {"seed": 0}, "made_of": {"a": "b"}, "starts": [start]}
  files["record_train.json"] = record | {"complete": {"step": 3}}
  kept = {"settings": {"seed": 0}, "counts": {"kept/a": 1}, "splits": [{"a": [0, 1]}]}
  files["kept_questions.json"] = kept
  return {name: _json(value) for name, value in (files | {"shards/settings.json": job}).items()}


@functools.cache
def parquet() -> Files:
  from caprl_jax.data.readers import caprl_parquet, jsonl

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for file, data in rows().items():
      (folder / file).write_bytes(data)
    found = jsonl.read_jsonl(folder / "rows.jsonl")
    caprl_parquet.write_parquet(folder / "rows.parquet", found)
    return {"rows.parquet": (folder / "rows.parquet").read_bytes()}


def _weights(files: Files, config: dict, init, keys) -> Files:
  """A checkpoint of zeros beside its small files, in the folder `model`."""
  import flax.linen as nn
  import jax
  import safetensors.numpy

  from caprl_jax import sharding
  from caprl_jax.hub import weights

  shapes = nn.unbox(sharding.abstract_params(lambda: init(jax.random.key(0))))
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  tensors = dict(weights.TensorsOfParams(params, keys))
  out = {f"model/{name}": data for name, data in files.items()}
  out["model/config.json"] = _json(config)
  out["model/model.safetensors"] = safetensors.numpy.save(tensors, {"format": "pt"})
  return out


def _small_files() -> Files:
  skip = ("recognition.json", "config.json")
  return {p.name: p.read_bytes() for p in WARM_START.glob("*.json") if p.name not in skip}


def captioner() -> Files:
  """The warm start's small files, and weights of fewer and narrower layers."""
  from caprl_jax.hub import load
  from caprl_jax.models.policy import PolicyConfig

  files = _small_files()
  config = json.loads((WARM_START / "config.json").read_bytes())
  size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
  config["text_config"] |= {**size, "num_key_value_heads": 1}
  config["text_config"]["rope_parameters"]["mrope_section"] = [1, 1, 2]
  config["vision_config"] |= dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2)
  config["vision_config"] |= dict(out_hidden_size=16, fullatt_block_indexes=[1])
  cfg = PolicyConfig.from_hf(config, json.loads(files["preprocessor_config.json"]))
  return _weights(files, config, load.init_policy(cfg), cfg.family.keys)


def judge() -> Files:
  """A tiny language model in two shards, with the tokenizer in its older two files as well."""
  import safetensors.numpy

  from caprl_jax.hub import load
  from caprl_jax.models.decoder import DecoderConfig
  from caprl_jax.models.family import DECODER_KEYS

  files = _small_files()
  del files["preprocessor_config.json"]
  vocab_size = 1 + max(json.loads(files["tokenizer.json"])["model"]["vocab"].values())
  vocab_size += len(json.loads(files["tokenizer.json"])["added_tokens"])
  config = dict(model_type="llama", vocab_size=vocab_size, hidden_size=16, intermediate_size=24)
  config |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
  config |= dict(rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False, eos_token_id=2)
  cfg = DecoderConfig.from_hf(config)
  files = _weights(files, config, load.init_decoder(cfg), DECODER_KEYS)
  tensors = safetensors.numpy.load(files.pop("model/model.safetensors"))
  names = sorted(tensors)
  places = {}
  for number, part in enumerate((names[::2], names[1::2])):
    shard = f"model-{number + 1:05d}-of-00002.safetensors"
    files[f"model/{shard}"] = safetensors.numpy.save({name: tensors[name] for name in part})
    places |= dict.fromkeys(part, shard)
  files["model/model.safetensors.index.json"] = _json({"metadata": {}, "weight_map": places})
  return files


def adapters() -> Files:
  """A folder of an adapter in PEFT's format, with its base beside it."""
  import safetensors.numpy

  files = {f"base/{name.removeprefix('model/')}": data for name, data in captioner().items()}
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "BASE",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "bias": "none",
  }
  name = "base_model.model.model.language_model.layers.{}.self_attn.q_proj.lora_{}.weight"
  tensors = {name.format(i, "A"): np.ones((2, 16), np.float32) for i in range(2)}
  tensors |= {name.format(i, "B"): np.ones((16, 2), np.float32) for i in range(2)}
  files["model/adapter_config.json"] = _json(config)
  files["model/adapter_model.safetensors"] = safetensors.numpy.save(tensors)
  return files


def old_tokenizer() -> Files:
  """tokenizer.json, and in another folder the vocab.json and merges.txt that stand for it."""
  files = _small_files()
  spec = json.loads(files["tokenizer.json"])
  merges = [
    merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]
  ]
  settings = json.loads(files["tokenizer_config.json"])
  settings["added_tokens_decoder"] = {str(token.pop("id")): token for token in spec["added_tokens"]}
  return {
    "new/tokenizer.json": files["tokenizer.json"],
    "new/tokenizer_config.json": files["tokenizer_config.json"],
    "new/generation_config.json": files["generation_config.json"],
    "old/vocab.json": _json(spec["model"]["vocab"]),
    "old/merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    "old/tokenizer_config.json": _json(settings),
  }


def templates() -> Files:
  text = json.loads((WARM_START / "tokenizer_config.json").read_bytes())["chat_template"]
  return {"chat_template.jinja": text.encode()}


def gguf_file() -> Files:
  """A model of one layer in llama.cpp's format."""
  import gguf

  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(20)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["a", "b", "Ġ", "ab", "1", "<|im_end|>", "<|im_start|>", "<tool>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1, 1, 1, 1, 1, 3, 3, 4])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(5)
    shapes = {"token_embd": (8, 16), "output_norm": (16,), "blk.0.attn_norm": (16,)}
    shapes |= {"blk.0.attn_q": (16, 16), "blk.0.attn_k": (8, 16), "blk.0.attn_v": (8, 16)}
    shapes |= {"blk.0.attn_output": (16, 16), "blk.0.ffn_norm": (16,)}
    shapes |= {"blk.0.ffn_gate": (20, 16), "blk.0.ffn_up": (20, 16), "blk.0.ffn_down": (16, 20)}
    for name, shape in shapes.items():
      writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"model.gguf": path.read_bytes()}


def configs() -> Files:
  found = {f"configs/{p.name}": p.read_bytes() for p in (ROOT / "configs").glob("*.py")}
  return {name: data for name, data in found.items() if b"get_config" in data}
