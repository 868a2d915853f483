"""What captions of charts are worth as pretraining data; questions are asked and answered in words,
no options shown.

  python -m caprl_jax.main --config=configs/pretrain_language.py \\
    --workdir=runs/pretrain_language_charts \\
    --config.pretrain.stages.read.data=data/charts/train.jsonl \\
    --config.pretrain.stages.read.context_text="{description}"
  python -m caprl_jax.main --config=configs/pretrain_charts.py --workdir=runs/charts_none

configs/pretrain_letters.py on the charts of configs/charts_sft.py, with the tower of that
captioner: run configs/charts_sft.py first. Stage `further` repeats the language model's lessons on
400 charts (max_rows). To add captions, write those 400 lessons to a file of their own and set
max_rows=None, since max_rows also limits captions. Stage `instruct` asks what a chart shows ("which
bar is tallest?"), and the model says it ("red"). About 7 minutes on 2 CPU cores without captions.
benchmarks/captions_teach.py compares captioners with it.

Expected: without captions, about 0.46 of 1,445 open questions about 300 held-out charts
(docs/results.md, which compares captioners).
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("pretrain_letters.py"))).unlock()
  config.pretrain_policy = dict(
    vision="runs/charts_sft/policy", language="runs/pretrain_language_charts/read"
  )
  common = dict(data="data/charts/train.jsonl", kinds=None)
  config.pretrain.stages.further.update(
    context_text="{description}", max_rows=400, steps=300, **common
  )
  config.pretrain.stages.instruct.update(open_question="{question}", **common)
  config.pretrain.update(
    eval="data/charts/test.jsonl",
    eval_kinds=None,
    eval_open_question="{question}",
    eval_max_tokens=8,
  )
  config.pretrain.answer.questions_per_row = 5
  return config
