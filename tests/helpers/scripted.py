"""Checkpoints in Qwen3-VL's and Qwen3's own layout, of which the captioner writes what a script
says: questions where a system's turn asks for them, else a caption."""

import json
import pathlib

import safetensors.numpy
import tokenizers
from helpers import tiny
from helpers.captioner_directory import write_checkpoint

from caprl_jax.data.rows import Question
from caprl_jax.modes.curate.generated import format_questions

END = "<|im_end|>"
QUESTIONS = (
  Question("What color is the shape?", ("red", "green", "blue", "teal"), 0),
  Question("What shape is present?", ("circle", "square", "star", "triangle"), 1),
  Question("How many of them are shown?", ("one", "two", "three", "four"), 2),
)
CAPTION = (
  ("The image shows a",),
  (" red", " green", " blue"),
  (" circle", " square"),
  (" on a light background.", " and nothing else."),
)
# It ends in another token where a system's turn comes first, for the script to know what is asked.
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
  "{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
  "{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n"
  "{% if messages[0]['role'] == 'system' %}A{% endif %}{% endif %}"
)


def _script() -> dict[str, tuple[str, ...]]:
  """What may follow each token. A token is a whole line or word here, and none occurs twice."""
  follows: dict[str, tuple[str, ...]] = {}
  begins = []
  for question in QUESTIONS:
    text = format_questions([question])
    lines = [line for line in text.splitlines(keepends=True) if line.strip("-\n")]
    begins.append(lines[0])
    follows |= dict(zip(lines, [(line,) for line in lines[1:]]))
    follows[lines[-1]] = (END,)
  follows["A"] = tuple(begins)
  follows["\n"] = CAPTION[0]
  for part, after in zip(CAPTION, (*CAPTION[1:], (END,))):
    follows |= dict.fromkeys(part, after)
  return follows


def write_captioner(path: pathlib.Path) -> None:
  """A random Qwen3-VL but for what follows what: nothing is added to a token's embedding, and the
  head has the next tokens of each, which are equally likely."""
  write_checkpoint(path, "qwen3_vl")
  (path / "chat_template.jinja").write_text(TEMPLATE)
  follows = _script()
  spec = tiny.read_back(path / "tokenizer.json")
  vocabulary = spec["model"]["vocab"]
  ids = {END: tokenizers.Tokenizer.from_str(json.dumps(spec)).token_to_id(END)}
  ascii_too = {_spelt(chr(i)) for i in range(128)}
  free = iter([token for token in vocabulary if len(token) == 1 and token not in ascii_too])
  for token in (*follows, " E"):  # new ones in the places of bytes that English has not
    if _spelt(token) not in vocabulary:
      vocabulary[_spelt(token)] = vocabulary.pop(next(free))
    ids[token] = vocabulary[_spelt(token)]
  spec["model"]["merges"].append(["Ġ", "E"])  # the letter by which a judge abstains
  (path / "tokenizer.json").write_text(json.dumps(spec))

  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  for name, tensor in tensors.items():
    for place, (token, after) in enumerate(follows.items()):
      if name.endswith("lm_head.weight"):
        tensor[[ids[one] for one in after], place] = 4
      elif name.endswith("embed_tokens.weight"):
        tensor[ids[token]] = 0
        tensor[ids[token], place] = 1
    if name.endswith("language_model.norm.weight"):
      tensor[:] = 1
    elif "language_model" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
      tensor[:] = 0
  safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _spelt(text: str) -> str:
  """A text as a byte-level vocabulary spells it."""
  level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return "".join(piece for piece, _ in level.pre_tokenize_str(text))


def write_judge(path: pathlib.Path, captioner: pathlib.Path) -> None:
  """A random Qwen3 with the captioner's vocabulary."""
  import torch
  from transformers import Qwen3Config, Qwen3ForCausalLM

  torch.manual_seed(0)
  model = Qwen3ForCausalLM(
    Qwen3Config(
      vocab_size=tiny.read_back(captioner / "config.json")["text_config"]["vocab_size"],
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=8,
      initializer_range=0.3,
    )
  )
  model.save_pretrained(path)
  (path / "tokenizer.json").write_bytes((captioner / "tokenizer.json").read_bytes())
