"""The section `caption` of a config."""

import dataclasses
import re

from caprl_jax.config import schema as configuration
from caprl_jax.data.readers.inputs.fetch import FetchConfig
from caprl_jax.modes.caption.columns import CAPTION, Column
from caprl_jax.modes.caption.formats.place import Existing, Format
from caprl_jax.modes.caption.selection import FilterConfig
from caprl_jax.modes.caption.texts import TextConfig
from caprl_jax.modes.caption.upload import UploadConfig

# What `caption.prompt` may name in place of a text of its own.
STYLES = {
  # CapRL's own: what its captioners were trained with
  "detailed": "Please describe this image in detail.",
  "medium": "Describe this image in three to five sentences.",
  "short": "Describe this image in one sentence.",
  "document": "Describe this chart, table or document in detail: its kind, its structure, and "
  "all text, labels and numbers in it.",
}
# Keys of the section `caption` that the captioner has, too.
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
_TAKEN = ("image", "name", "error", "tokens", "finish")


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
  """The section `caption`.

  input: see `readers.image_sources.list_images`: folders, lists (JSON lines, JSON, CSV, text), tar
    (WebDataset), parquet, tfds:FOLDER:SPLIT.
  output: the file, or the folder of a `txt`, `hf`, `webdataset` or `tfds` one.
  prompt: a style (`detailed`, `medium`, `short`, `document`) or any other text; None asks
    `policy.instruction`. A prompt asks for a length; max_tokens cuts. It may have {folder} and
    other fields as `text.before` has, with 32 different values at most: each makes a prompt.
  prompts: several prompts in one pass, in place of `prompt`, by the name of the column that each
    one's captions go to; None: one, whose column is `caption`.
  captions: written of each image with each prompt. Several want a temperature above 0.
  existing: where a text is there already (format `txt`), or a row has a caption in its input:
    `skip` keeps it, `overwrite` writes a new one in its place, `append` and `prepend` join both,
    `refuse` stops before anything is captioned. None refuses texts that are there, and writes new
    captions of rows that have some.
  text: what is done with every caption's text.
  filter: which images are captioned.
  max_tokens: longest caption.
  temperature: 0 is greedy, and a caption then depends on its image alone. A sampled one depends on
    `seed` and on its row's number in the input as well, and on nothing else.
  top_p: the likeliest tokens that have this probability together are drawn from; 1: all.
  top_k: the likeliest tokens that are drawn from; 0: all.
  repetition_penalty: None takes the checkpoint's own (generation_config.json). Captioners of CapRL
    (checkpoints that are called CapRL-..., as on the hub) and those of training runs here are
    sampled without one, as they were trained, whatever their files say.
  batch_size: captions that are written at once: when one has ended, the next image takes its
    place. More of them are faster, as far as memory reaches. A quarter as many images, all of one
    bucket of shapes, are encoded at once; at the end of a shard fewer and fewer are written, so
    shards should be much longer than this. It may be changed when a job goes on.
  skip_bad_images: a bad image gets a row with `error` in place of a caption; False stops at the
    first one.
  format: see `formats.Output`; None takes that of the output's suffix (.jsonl, .parquet).
  embed_images: `hf` datasets hold the images' bytes, not their names.
  image_key, caption_key: the keys of `caprl_2m`. How the released CapRL-2M spells them is not known
    to us, so these are a guess.
  column: the key or column of a list or parquet that names the image; None: image, image_path,
    images, file_name or path, the first that is there.
  allow_urls: images that are addresses on the web are fetched, from public addresses only.
  fetch: how.
  dry_run: says how many images there are, of which shapes, how long they will take and how much
    disk, and writes nothing.
  repair: what is missing or damaged of this very job, of its shards or of its output, is made
    again, and nothing else.
  retry_failed: images that failed are tried again.
  upload: where the output goes when it is done.
  shard_rows: rows that are one host's work at a time. With fewer shards than hosts some hosts
    have nothing to do.
  host: this process's number, from 0; None: jax.process_index().
  hosts: how many processes share the output's folder; None: jax.process_count(). Set both on
    machines that do not run under jax.distributed.
  samples: about how many images are on the page of samples.
  int8_images: so many of the first images are captioned twice before all others, greedily, without
    and with `policy.int8`, and the log and stats.json say how many tokens it changes. A dry run
    does it, too. It loads the captioner as it is, which takes the memory for that.
  """

  input: str
  output: str
  prompt: str | None = None
  prompts: dict[str, str] | None = None
  captions: int = 1
  existing: Existing | None = None
  text: TextConfig = TextConfig()
  filter: FilterConfig = FilterConfig()
  max_tokens: int = 512
  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0
  repetition_penalty: float | None = None
  batch_size: int = 8
  skip_bad_images: bool = True
  format: Format | None = None
  embed_images: bool = True
  image_key: str = "image"
  caption_key: str = "caption"
  column: str | None = None
  allow_urls: bool = False
  fetch: FetchConfig = FetchConfig()
  dry_run: bool = False
  repair: bool = False
  retry_failed: bool = False
  upload: UploadConfig = UploadConfig()
  shard_rows: int = 10_000
  host: int | None = None
  hosts: int | None = None
  samples: int = 48
  int8_images: int = 0

  def __post_init__(self):
    if self.int8_images < 0:
      raise ValueError(f"caption.int8_images = {self.int8_images} must be at least 0")
    if self.shard_rows < 1 or self.batch_size < 1:
      raise ValueError(
        f"caption.shard_rows = {self.shard_rows} and batch_size = {self.batch_size} "
        "must be at least 1"
      )
    if (self.host is None) != (self.hosts is None):
      raise ValueError(
        f"caption.host = {self.host} and caption.hosts = {self.hosts}: set both or neither"
      )
    if self.hosts is not None and not 0 <= self.host < self.hosts:
      raise ValueError(
        f"caption.host = {self.host} must be from 0 to caption.hosts - 1 = {self.hosts - 1}"
      )
    if self.image_key == self.caption_key:
      raise ValueError(
        f"caption.image_key and caption.caption_key are both {self.image_key!r}; they must differ"
      )
    if self.captions < 1:
      raise ValueError(f"caption.captions = {self.captions} must be at least 1")
    if self.captions > 1 and self.temperature == 0:
      raise ValueError(
        f"caption.captions = {self.captions} greedy captions of an image would all be the same; "
        "set caption.temperature, such as 0.7"
      )
    self._check_prompts()

  def _check_prompts(self) -> None:
    if self.prompts is None:
      return
    if not self.prompts:
      raise ValueError("caption.prompts is empty; set caption.prompts.NAME to a style or a text")
    for name in self.prompts:
      if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in _TAKEN:
        raise ValueError(
          f"caption.prompts.{name}: a column's name has letters, digits and underscores, begins "
          f"with a letter and is none of {', '.join(_TAKEN)}"
        )


def instruction_of(prompt: str | None, default: str) -> str:
  """What the captioner is asked. Raises ValueError for one word that looks like a style
  misspelt.
  """
  if not prompt:
    return default
  if (
    prompt not in STYLES
    and " " not in prompt.strip()
    and (hint := configuration.did_you_mean(prompt, STYLES))
  ):
    raise ValueError(
      f"caption.prompt = {prompt!r} is no style{hint} (styles: {', '.join(STYLES)}; "
      "or a whole sentence)"
    )
  return STYLES.get(prompt, prompt)


def columns_of(cfg: CaptionConfig, instruction: str) -> tuple[Column, ...]:
  """The columns of captions and what each asks for. instruction: where no prompt is set."""
  prompts = {"caption": cfg.prompt} if cfg.prompts is None else cfg.prompts
  first = sorted(prompts, key=lambda name: (name != CAPTION, name))  # a config sorts names
  return tuple(
    Column(name, instruction_of(prompts[name], instruction), cfg.captions) for name in first
  )
