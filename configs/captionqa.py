"""CaptionQA as its authors publish it (arXiv 2511.21025): one caption per image, whose questions a
language model answers by a letter, "cannot answer" among them.

  python -m caprl_jax.main --config=configs/captionqa.py --workdir=runs/captionqa

Reads the four domains of Borise/CaptionQA on the hub (657 images, 8,492 questions are public);
a copy of the files is read with --config.prism.benchmarks=natural=captionqa:FOLDER and the like.
The column CaptionQA is their score by their reading of the answers, `official` their accuracy; the
mean is ours. Captions as their caption.py has them by default: "Describe this image in detail.", at
temperature 0.7, up to 500 tokens. Their answering model is Qwen2.5-72B-Instruct, greedy, 4 tokens:
--config.judge.source names a smaller one, whose figures cannot stand beside published ones.
docs/evaluation.md says what of it is known from where.

Not run yet.
"""

import ml_collections

from caprl_jax.data.readers.benchmarks.captionqa import DOMAINS, PREFIX


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "prism"
  config.seed = 0
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.policy = dict(
    checkpoint="unused",  # prism.captioners names them
    instruction="Describe this image in detail.",
    dtype="bfloat16",
    param_dtype="bfloat16",
  )
  config.judge = dict(source="Qwen/Qwen2.5-72B-Instruct", dtype="bfloat16")
  config.prism = dict(
    captioners="Qwen2.5-VL-3B=Qwen/Qwen2.5-VL-3B-Instruct,CapRL-3B=internlm/CapRL-3B",
    benchmarks=",".join(f"{domain}={PREFIX}{domain}" for domain in DOMAINS),
    captions=1,
    temperature=0.7,
    max_tokens=500,
    answers="write",
    answer_tokens=4,
    answer_temperature=0.0,
    bad_rows="drop",  # their program passes over questions whose answer is none of the choices
    gallery=24,
  )
  return config
