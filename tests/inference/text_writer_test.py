"""Texts of a language model: transformers' own greedy ones, in every batch and bucket."""

import jax
import numpy as np
import tokenizers
import torch
import transformers
from helpers import tiny

from caprl_jax import sharding
from caprl_jax.hub.load import load_judge
from caprl_jax.inference import text_writer
from caprl_jax.inference.engine.engine import Listed
from caprl_jax.inference.text_writer import TextWriter, length_bucket
from caprl_jax.rl.sampling import SamplingConfig


def test_texts_are_transformers_own(tmp_path):
  folder = tiny.write_judge(tmp_path / "judge")
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  loaded = load_judge(str(folder), mesh)
  rng = np.random.default_rng(0)
  prompts = [
    rng.integers(0, loaded.tokenizer.vocab_size - 4, n).tolist() for n in (3, 20, 17, 40, 5)
  ]
  with jax.set_mesh(mesh):
    writer = TextWriter(
      loaded, SamplingConfig(12, temperature=0.0), batch_size=2, mesh=mesh, seed=0
    )
    got = dict(item for batch in writer(prompts) for item in batch)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  ends = list(loaded.tokenizer.end_ids)
  for n, prompt in enumerate(prompts):
    with torch.no_grad():
      ids = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0],
      )[0, len(prompt) :].tolist()
    ended = ids[-1] in ends
    assert got[n].text == loaded.tokenizer.decode(ids) and got[n].finish == (
      "end" if ended else "length"
    )
  assert len({text.text for text in got.values()}) > 1


class Hesitant(Listed):
  """Says now and then that the next prompts are not there yet."""

  asked = 0

  def take(self, wait):
    self.asked += 1
    return super().take(wait) if wait or self.asked % 3 == 0 else None


def test_a_drawn_text_is_of_its_number(tmp_path, monkeypatch):
  folder = tiny.write_judge(tmp_path / "judge")
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  loaded = load_judge(str(folder), mesh)
  prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [3, 1, 4], [5, 3], [5, 8, 9, 7], [9, 3, 2, 3, 8]]
  with jax.set_mesh(mesh):
    writer = TextWriter(
      loaded, SamplingConfig(20, temperature=1.0), batch_size=4, mesh=mesh, seed=1
    )
    all_of_them = dict(item for some in writer(prompts) for item in some)
    assert len({text.text for text in all_of_them.values()}) == len(prompts)
    monkeypatch.setattr(text_writer, "Listed", Hesitant)
    some = dict(
      item for part in writer([prompts[n] for n in (4, 2, 0)], (4, 2, 0)) for item in part
    )
  assert [some[place] for place in range(3)] == [all_of_them[n] for n in (4, 2, 0)]


def test_a_thought_s_end_stays_in_the_text(tmp_path):
  """Qwen3's tokenizers have `</think>` as an added token that is not flagged special."""
  folder = tiny.write_judge(tmp_path / "judge")
  backend = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text())
  backend.add_tokens(["</think>"])
  think = backend.token_to_id("</think>")
  (folder / "tokenizer.json").write_text(backend.to_str())
  model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  model.resize_token_embeddings(think + 1, mean_resizing=False)
  prompt = [3, 1, 4, 1, 5]
  with torch.no_grad():
    first = model(torch.tensor([prompt])).logits[0, -1]
    assert first.max() > 0
    # the likeliest token of all
    model.lm_head.weight[think] = 2 * model.lm_head.weight[first.argmax()]
  model.save_pretrained(folder)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    (batch,) = TextWriter(
      load_judge(str(folder), mesh),
      SamplingConfig(3, temperature=0.0),
      batch_size=1,
      mesh=mesh,
      seed=0,
    )([prompt])
  with torch.no_grad():
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[
      0, len(prompt) :
    ].tolist()
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend).decode(
    ids, skip_special_tokens=True
  )
  assert ids[0] == think and batch[0][1].text == theirs and theirs.startswith("</think>")


def test_buckets_are_few_and_wide_enough():
  sizes = [length_bucket(n) for n in range(1, 3000)]
  assert (
    all(n <= size < n + max(16, n / 4 + 1) for n, size in enumerate(sizes, 1))
    and len(set(sizes)) < 50
  )
