"""A language model that can read, for configs/pretrain_letters.py: 1.7M parameters, text only, no
image ever shown.

  python -m caprl_jax.main --config=configs/pretrain_language.py --workdir=runs/pretrain_language

It learns to answer multiple-choice questions by letter about a sentence that it is told, such as
"The image shows a red circle.". The model is written to runs/pretrain_language/read (a captioner's
directory, whose tower is random).

Expected: about 15 minutes on 2 CPU cores; the loss ends at 0.045, which is 0.09 nats per letter.
"""

import pathlib

import ml_collections

from caprl_jax.config.loading import load_config


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "pretrain"
  config.seed = 0
  # The quickstart's captioner; only its decoder is of use here.
  captioner = load_config(str(pathlib.Path(__file__).with_name("quickstart_sft.py"))).policy
  config.pretrain_policy = dict(
    tokenizer=captioner.tokenizer,
    compact=captioner.compact,
    architecture=captioner.architecture,
    preprocessor=captioner.preprocessor,
  )
  optimizer = dict(
    name="muon",
    learning_rate=0.01,
    adam_learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=20,
    final_fraction=0.05,
  )
  config.pretrain = dict(
    order=("read",),
    stages=dict(
      read=dict(
        data="easy_vqa:train",
        context_text="The image shows a {color} {shape}.",
        questions=1,
        trained="decoder",
        steps=1200,
        batch_size=24,
        optimizer=optimizer,
        pack=dict(tokens=256),
      )
    ),
    output_dtype="bfloat16",
    checkpoint_every_steps=200,
  )
  return config
