"""What captions are worth as pretraining data, at small size, in the paper's arrangement: tower,
language model, new projector.

  python -m caprl_jax.main --config=configs/pretrain_language.py \\
    --workdir=runs/pretrain_language  # once
  python -m caprl_jax.main --config=configs/pretrain_letters.py --workdir=runs/letters_none
  python -m caprl_jax.main --config=configs/pretrain_letters.py --workdir=runs/letters_captions \\
    --config.pretrain.stages.further.data="captions.jsonl + easy_vqa:train"

The tower of the quickstart's warm start, a language model that can read and has seen no image, a
new projector. Stage `further` repeats the language model's lessons, which have no images, so that
it does not forget to read, and reads captions, if there are any; all parameters are trained. Stage
`instruct` asks colour and shape questions about images of the training split, answered by letter.
In the end the same kinds of questions are asked about 300 held-out images, with the image and
without (vqa.json). About 3 minutes on 2 CPU cores. benchmarks/captions_teach.py compares captioners
with it.

Expected: without captions, accuracy 0.701 [0.658, 0.745] on 788 questions about 289 images, 0.316
without the image (docs/pretraining.md).
"""

import pathlib

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "pretrain"
  config.seed = 0
  config.pretrain_policy = dict(
    vision=str(pathlib.Path(__file__).resolve().parent / "quickstart_policy"),
    language="runs/pretrain_language/read",
  )
  optimizer = lambda rate: dict(
    name="muon",
    learning_rate=rate,
    adam_learning_rate=rate / 10,
    schedule="cosine",
    warmup_steps=5,
    final_fraction=0.05,
  )
  common = dict(
    data="easy_vqa:train",
    max_rows=None,  # benchmarks/captions_teach.py reads it
    questions=1,
    kinds=("color", "shape"),
    trained="full",
    examples=64,
    pack=dict(tokens=256),
  )
  config.pretrain = dict(
    order=("further", "instruct"),
    stages=dict(
      further=dict(
        context_text="The image shows a {color} {shape}.",
        steps=150,
        optimizer=optimizer(0.01),
        **common,
      ),
      instruct=dict(context_text=None, steps=120, optimizer=optimizer(0.005), **common),
    ),
    eval="easy_vqa:test",
    eval_rows=300,
    eval_kinds=("color", "shape"),
    answer=dict(permutations=2, none_of_above=False, questions_per_row=4, batch_size=16),
  )
  return config
