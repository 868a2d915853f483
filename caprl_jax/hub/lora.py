"""Low-rank adapters: as they begin, merged into their base, and in PEFT's format."""

import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from caprl_jax import sharding
from caprl_jax.atomic_files import whole_file
from caprl_jax.models.layers import LoraConfig
from caprl_jax.models.trainable import split_lora
from caprl_jax.types import Params


def new_lora(abstract: Params, shardings: Any, seed: int = 0) -> Params:
  """Adapters as they begin: A uniform within 1 / sqrt(inputs), as PEFT has it, B zero. Float32
  whatever the base is, as PEFT makes them: bfloat16 would round most of their updates away."""

  def make(path, leaf, sharding):
    if path[-1].key == "lora_b":
      return jnp.zeros(leaf.shape, jnp.float32, device=sharding)
    # the same adapter starts the same in every model
    number = sum("/".join(p.key for p in path).encode())
    key = jax.random.fold_in(jax.random.key(seed), number)
    bound = 1 / math.sqrt(leaf.shape[-2])
    draw = jax.jit(
      lambda k: jax.random.uniform(k, leaf.shape, jnp.float32, -bound, bound),
      out_shardings=sharding,
    )
    return draw(key)

  return jax.tree_util.tree_map_with_path(make, abstract, shardings)


def merge_lora(params: Params, lora: LoraConfig | None) -> Params:
  """kernel + A B * alpha / rank in place of each adapted kernel; no adapters are left."""
  if lora is None:
    return params

  @jax.jit
  def add(kernel, a, b):
    product = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32)) * lora.scale
    return (kernel.astype(jnp.float32) + product).astype(kernel.dtype)

  def walk(tree):
    if not isinstance(tree, dict):
      return tree
    out = {key: walk(value) for key, value in tree.items() if key not in ("lora_a", "lora_b")}
    return (
      {**out, "kernel": add(tree["kernel"], tree["lora_a"], tree["lora_b"])}
      if "lora_a" in tree
      else out
    )

  return walk(params)


def _peft_name(path: str, number: int) -> str:
  """`language_model.layers.self_attn.q_proj.lora_a` of layer 3 -> PEFT's name of it: that of
  transformers' module.
  """
  module, _, leaf = path.rpartition(".")
  module = module.replace("language_model.layers.", f"model.language_model.layers.{number}.")
  return f"base_model.model.{module}.{'lora_A' if leaf == 'lora_a' else 'lora_B'}.weight"


def save_adapters(folder: pathlib.Path, params: Params, lora: LoraConfig, base: str) -> None:
  """Writes adapter_config.json and adapter_model.safetensors, which `peft` loads onto the base
  model. All processes call it, the first one writes.

  Args:
    base: name or directory of the base model, for adapter_config.json.
  """
  _, adapters = split_lora(params)
  adapters = sharding.to_host(adapters)
  if jax.process_index() > 0:
    return
  tensors = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
    name = ".".join(p.key for p in path)
    # every adapter sits in the stack of decoder layers
    for i, layer in enumerate(np.asarray(leaf)):
      tensors[_peft_name(name, i)] = np.ascontiguousarray(layer.T)
  with whole_file(folder / "adapter_model.safetensors") as partial:
    safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    # The language model's only: a tower may have maps of the same names.
    "target_modules": rf".*language_model\..*\.({'|'.join(lora.targets)})",
    "inference_mode": True,
  }
  (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
