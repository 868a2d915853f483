"""Prism evaluation as in CapRL's paper: 4 captions per image at temperature 1, and a language model
that cannot see the image answers questions from them.

  python -m caprl_jax.main --config=configs/prism.py --workdir=runs/prism    # all twelve
  python -m caprl_jax.main --config=configs/prism.py --workdir=runs/prism \\
    --config.prism.benchmarks=MMStar=json_file/lmm_eval_MMStar.json,ChartQA=json_file/lmm_eval_chartqa.json

The files are internlm/CapRL-Evaluation-Files', downloaded into the working directory (MMStar,
ChartQA, ChartQAPro, CharXiv, InfoVQA, MMMU, MMMU-Pro, SEED, MathVerse, MathVision, WeMath,
VisuLogic; their images in bench_image_folder.zip, prism.image_root). A QA source of
configs/dataset.py may take the place of a file. Writes prism.json, answers.jsonl and prism.html,
with our scores and, if math-verify is installed, the released scorer's beside them. All captioners
are compared with the first one. An interrupted evaluation goes on from cache/. As released, a
captioner is asked in a user's turn alone, without the system turn that Qwen2.5-VL's template would
add, and its images have no limits of pixels but those that a row names and the checkpoint's (12.8
million, 16,384 tokens); --config.policy.max_pixels=1000000 takes much less memory. A captioner that
was trained here has its training's limit written beside it: --config.policy.max_pixels=12845056
gives all Qwen2.5-VL's. Each question is answered from four captions of its own, as released; with
--config.prism.captions_per=image the questions about an image share its captions, which is faster.

Not run yet.
"""

import ml_collections

from caprl_jax.data.readers.benchmarks.row import BENCHMARKS


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "prism"
  config.seed = 0
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  # The paper's instruction in Prism lacks the full stop that training has.
  config.policy = dict(
    checkpoint="unused",  # prism.captioners names them
    instruction="Please describe this image in detail",
    template="bare",
    dtype="bfloat16",
    param_dtype="bfloat16",
  )
  config.judge = dict(source="internlm/CapRL-Eval-3B", dtype="bfloat16")
  config.prism = dict(
    captioners="Qwen2.5-VL-3B=Qwen/Qwen2.5-VL-3B-Instruct,CapRL-3B=internlm/CapRL-3B",
    benchmarks=",".join(f"{name}=json_file/{file}.json" for file, name in BENCHMARKS.items()),
    image_root="bench_image_folder.zip",
    captions_per="question",
  )
  return config
