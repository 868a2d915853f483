"""Captions for images in folders, archives or datasets, on one machine or many.

  python -m caprl_jax.main --config=configs/caption.py --config.policy.checkpoint=DIR_OR_HUB_NAME \\
    --config.caption.input=IMAGES --config.caption.output=captions.jsonl

IMAGES is an image or a folder of them, a list (.jsonl or .json with an `image` in each row, .csv,
.tsv, .txt), a .tar (WebDataset), a .parquet, a folder or a pattern of those ('shards/*.tar'),
tfds:FOLDER:SPLIT or hf:OWNER/NAME:SPLIT. The output is a .jsonl or a .parquet;
--config.caption.format can also be txt (a .txt per image), hf (a folder for datasets.load_dataset),
webdataset, tfds or caprl_2m (JSON lines of image and caption alone). A JSON row has `image`,
`caption`, `tokens` (ids) and `finish` ("end", or "length" where it was cut at max_tokens); an image
that failed has `error`. Next to the output are captions.stats.json and captions.html.
docs/captioning.md: captions that are there already, text before and after, several prompts,
filters, a dry run, repairs, images from the web, upload to the hub.

--config.caption.prompt is `detailed`, `medium`, `short`, `document` or any text. The same command
goes on where it was stopped. Several machines that see one folder share the work: automatically
under jax.distributed, otherwise with --config.caption.host=0 --config.caption.hosts=4 and so on. On
an accelerator, --config.policy.dtype=bfloat16 --config.policy.param_dtype=bfloat16 halve the memory
of the weights. docs/configuration.md has every key.

Expected: of 64x64 images, the quickstart's captioner captions about 146 per second on two CPU cores
(docs/results.md). Not run yet with the checkpoint below.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "caption"
  config.seed = 0
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.policy = dict(checkpoint="internlm/CapRL-3B")
  config.caption = dict(
    input="images",
    output="captions.jsonl",
    prompt="detailed",
    max_tokens=2048,  # what Prism allows; a caption of CapRL-3B has several hundred
  )
  return config
