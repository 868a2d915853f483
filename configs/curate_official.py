"""Questions as the release made them: its prompt, its way of asking and its thresholds, without our
filters of images and questions that are alike or small.

  python -m caprl_jax.main --config=configs/curate_official.py --workdir=runs/curate \\
    --config.curate.input=IMAGES --config.curate.output=qa.json

The prompt is the released one to the byte: it is downloaded once from github.com/InternLM/CapRL and
known by its digest; where there is no network, --config.curate.prompt=FOLDER/gen_qa.py names a copy
of the release's file. Qwen2.5-VL-72B writes five questions per image at temperature 0.1
(repetition penalty 1.05, 2,048 tokens). Qwen2.5-VL-3B answers each four times with the image and
four times without, over options that are shuffled anew each time; an answer of up to 4 tokens is
right if the right letter is anywhere in it. With the image one option more is shown. Kept are
questions answered right more than 3 times in 4 with the image and less than once in 4 without;
--config.curate.answers_output=FILE.jsonl writes all questions and answers as the release's third
step does. No limit of pixels but the checkpoint's; no image and no question is left out because it
is like another. What the generator wrote is read by our parser, which leaves out what it cannot
read without a guess (left_out.jsonl); the release's own, its second step, was not found, nor its
fourth. configs/curate.py has our defaults.

Not run yet with these checkpoints; tests run it with tiny ones.
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("curate.py"))).unlock()
  config.generator.checkpoint = "Qwen/Qwen2.5-VL-72B-Instruct"
  del config.generator.max_pixels
  del config.answerer.max_pixels
  config.curate.prompt = "official"
  config.curate.answers = dict(protocol="official", permutations=4, none_of_above=True)
  config.curate.similar_bits = None
  config.curate.similar_questions = None
  config.curate.repeated_questions = True
  config.curate.min_side = 1
  return config
