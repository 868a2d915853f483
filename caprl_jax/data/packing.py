"""Conversations of all lengths -> rows of one length, several a row, with little padding: a plan an
epoch, then arrays.

A plan depends on the seed and the epoch alone, so every process makes the same one, and row n of
the stream can be made without those before it. Letters: B rows, M images per row, S patch slots and
U units of an image, L tokens of a row, I image tokens of a row.
"""

import concurrent.futures
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Literal

import grain
import numpy as np

from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.batches import ImageShape, image_shape, stack
from caprl_jax.data.chat_rendering import Rendered
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.image_prompts import Prompt, build_prompt
from caprl_jax.data.readers.conversations import Asked, Conversation, Example, conversation_of
from caprl_jax.data.rows import BadRow, BadRows, good_rows, read_image
from caprl_jax.data.usable_rows import RowError, bad_row, fits, shape_of, usable
from caprl_jax.models.image_processor import pad_image
from caprl_jax.models.policy import PolicyConfig
from caprl_jax.progress import counted
from caprl_jax.types import Images, Packed, Prompts

log = logging.getLogger("caprl_jax.data")

SHORTER = "raise tokens, lower pretrain_policy.max_pixels"


@dataclasses.dataclass(frozen=True)
class PackConfig:
  """tokens: length of a row.
  images: the most images per row. Every row computes that many of the largest image's size: too
    many cost time, and too few leave rows unfilled. None takes what a full row holds on average.
  packing: False puts one example in a row.
  window: examples, in shuffled order, that are packed among themselves; larger ones fill better and
    shuffle less.
  too_long: examples longer than a row are an error, or are dropped and counted; none is ever cut.
    None: as `bad_rows` says.
  bad_rows: "refuse" to start while an example cannot be used, or "drop" and log it; as
    `data.bad_rows`. One that fails all the same when its turn comes (a disk error) ends the run,
    or its tokens become padding.
  """

  tokens: int
  images: int | None = None
  packing: bool = True
  window: int = 4096
  too_long: Literal["refuse", "drop"] | None = None
  bad_rows: BadRows = "refuse"

  def __post_init__(self):
    if self.tokens < 2 or self.window < 1 or (self.images is not None and self.images < 1):
      raise ValueError(
        f"tokens = {self.tokens}, images = {self.images} and window = {self.window} "
        "must be positive"
      )


def first_fit(
  lengths: Sequence[int], images: Sequence[int], tokens: int, most_images: int
) -> list[list[int]]:
  """First-fit decreasing: rows of at most `tokens` and `most_images`, each a list of indices; no
  length is above `tokens`."""
  free_tokens, free_images = np.full(len(lengths), tokens), np.full(len(lengths), most_images)
  rows: list[list[int]] = []
  for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
    # One row more than are open: there, everything fits.
    fits = (free_tokens[: len(rows) + 1] >= lengths[i]) & (
      free_images[: len(rows) + 1] >= images[i]
    )
    row = int(np.argmax(fits))
    if row == len(rows):
      rows.append([])
    rows[row].append(i)
    free_tokens[row] -= lengths[i]
    free_images[row] -= images[i]
  return rows


@dataclasses.dataclass(frozen=True)
class Plan:
  """One epoch: the examples of each row, and what they are this time."""

  rows: list[list[int]]
  rendered: Sequence[Rendered]
  tokens: int  # of all examples

  def fill(self, tokens: int) -> float:
    """Share of the rows' tokens that is no padding."""
    return self.tokens / (len(self.rows) * tokens)


class Packer:
  """Examples -> rows of `tokens` tokens. `packer(n)` is the n-th row of an endless stream in which
  every example comes once an epoch, in rows that are packed anew each time.

  Args:
    images: what is known of all images. None: only their headers are read here, and damaged pixels
      show when an example is used.
    bad: takes note of the examples that cannot be used, and of those that fail later; None: they
      are decided about here.

  Raises ValueError for examples that are too long, where they are to be refused, and where none is
  left.
  """

  def __init__(
    self,
    examples: Sequence[Example],
    render: Callable[[Conversation], Rendered],
    cfg: PolicyConfig,
    pack: PackConfig,
    seed: int,
    images: ImageCheck | None = None,
    bad: BadRowList | None = None,
  ):
    self.render, self.cfg, self.pack, self.seed, self.bad = render, cfg, pack, seed, bad
    self.lock, self.plans, self.starts, self.dropped = threading.Lock(), {}, [0], set()
    examples, shapes = self._checked(examples, images) if images else self._readable(examples)
    examples, shapes, own = self._rendered(examples, shapes)
    counts = np.array([shape.tokens for shape in shapes])
    keep = self._short(examples, np.array([len(r.tokens_L) for r in own]) + counts)
    self.examples, self.own = [examples[i] for i in keep], [own[i] for i in keep]
    # image tokens, patch slots
    self.counts, self.slots = counts[keep], np.array([shapes[i].slots for i in keep])
    self.shape = ImageShape(max(shapes[i].slots for i in keep), max(shapes[i].tokens for i in keep))
    lengths = self._lengths(self.own)
    with_image = int((self.counts > 0).sum())
    share = with_image * pack.tokens / lengths.sum() if pack.packing else 1
    self.images = 0 if not with_image else pack.images or max(1, int(np.ceil(share)))

  def _checked(
    self, examples: Sequence[Example], images: ImageCheck
  ) -> tuple[list[Example], list[ImageShape]]:
    """The examples whose image can be decoded and fits the processor, and what it takes."""
    pixels = self.cfg.vision.pixels
    found = usable(examples, images(examples), [fits(pixels)])
    good = self.bad.check(found) if self.bad else good_rows(found, self.pack.bad_rows)
    return good, [shape_of([facts], pixels) for facts in images(good)]

  def _rendered(
    self, examples: Sequence[Example], shapes: Sequence[ImageShape]
  ) -> tuple[list[Example], list[ImageShape], list[Rendered]]:
    """The examples that the chat template can say (one without system turns refuses such), with
    their shapes."""

    def said(example: Example, shape: ImageShape) -> tuple | BadRow:
      try:
        return example, shape, self.render(conversation_of(example))
      except ValueError as error:
        if self.bad is None:
          raise
        return bad_row(example, error, "refused by the chat template")

    found = map(said, examples, shapes)
    good = self.bad.check(found) if self.bad else list(found)
    return tuple(map(list, zip(*good, strict=True))) or ([], [], [])

  def _readable(self, examples: Sequence[Example]) -> tuple[list[Example], list[ImageShape]]:
    """The examples whose image's size can be read, and what it takes; headers only."""

    def look(example: Example) -> tuple[Example, ImageShape] | BadRow:
      try:
        return example, ImageShape(0, 0) if example.image is None else image_shape(
          [example], self.cfg
        )
      except ValueError as error:
        return BadRow(example.name, str(error))

    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
      good = good_rows(pool.map(look, examples), self.pack.bad_rows)
    return [example for example, _ in good], [shape for _, shape in good]

  def _short(self, examples: Sequence[Example], lengths: np.ndarray) -> np.ndarray:
    """Indices of the examples that fit a row."""
    long = np.flatnonzero(lengths > self.pack.tokens)
    if len(long):
      what = (
        f"{len(long)} of {len(lengths)} examples are longer than a row's {self.pack.tokens} "
        f"tokens (the longest, {examples[int(np.argmax(lengths))].name!r}, has "
        f"{lengths.max()})"
      )
      rule = self.pack.too_long or self.pack.bad_rows
      if rule == "refuse" and (self.bad is None or self.bad.rule == "drop"):
        raise ValueError(f"{what}; {SHORTER}, or set too_long = 'drop'")
      if self.bad is None or self.bad.rule != rule:
        log.warning("dropped %s (too_long = 'drop')", what)
      else:  # told of with the others
        told = f"of {self.pack.tokens} at most in a row; {SHORTER}"
        self.bad.note(
          bad_row(examples[i], RowError(f"{lengths[i]} tokens, {told}", "too long")) for i in long
        )
    keep = np.flatnonzero(lengths <= self.pack.tokens)
    if not len(keep):
      if self.bad:
        self.bad.settle()
      raise ValueError("no example is left to learn from")
    return keep

  def _lengths(self, rendered: Sequence[Rendered]) -> np.ndarray:
    return np.array([len(r.tokens_L) for r in rendered]) + self.counts

  def plan(self, epoch: int) -> Plan:
    """The rows of an epoch (from 0). Kept for this epoch and its neighbours; may be called by
    several threads.
    """
    with self.lock:
      if epoch not in self.plans:
        self.plans = {
          number: plan for number, plan in self.plans.items() if abs(number - epoch) < 2
        }
        self.plans[epoch] = self._make_plan(epoch)
      return self.plans[epoch]

  def _make_plan(self, epoch: int) -> Plan:
    numbers = counted(range(len(self.examples)), "packing", "example")
    rendered = [self._visit(i, epoch) for i in numbers]
    lengths, images = self._lengths(rendered), (self.counts > 0).astype(int)
    rng = np.random.default_rng([self.seed, epoch])
    order = rng.permutation(len(lengths))
    window = self.pack.window if self.pack.packing else 1
    rows = []
    for start in range(0, len(order), window):
      some = order[start : start + window]
      rows += [
        some[row].tolist()
        for row in first_fit(lengths[some], images[some], self.pack.tokens, self.images)
      ]
    # A window's first rows hold its longest examples.
    return Plan([rows[i] for i in rng.permutation(len(rows))], rendered, int(lengths.sum()))

  def _visit(self, index: int, epoch: int) -> Rendered:
    """An example as it is in this epoch: of questions, the order of the options is another each
    time.
    """
    example = self.examples[index]
    if not isinstance(example, Asked):
      return self.own[index]
    made = self.render(conversation_of(example, np.random.default_rng([self.seed, epoch, index])))
    # Options in another order may take a token more; their own order is known to fit.
    return made if len(made.tokens_L) + self.counts[index] <= self.pack.tokens else self.own[index]

  def locate(self, number: int) -> tuple[int, int]:
    """Epoch and row in it of the stream's `number`-th row."""
    while self.starts[-1] <= number:
      epoch = len(self.starts) - 1  # read once: another thread may be adding to them
      rows = len(self.plan(epoch).rows)
      with self.lock:
        if len(self.starts) == epoch + 1:  # no other thread was faster
          self.starts.append(self.starts[-1] + rows)
    epoch = int(np.searchsorted(self.starts, number, side="right")) - 1
    return epoch, number - self.starts[epoch]

  def rows_until(self, epochs: float) -> int:
    """Rows of that many epochs."""
    whole, part = int(epochs), epochs - int(epochs)
    count = sum(len(self.plan(epoch).rows) for epoch in range(whole))
    return count + (round(part * len(self.plan(whole).rows)) if part else 0)

  def figures(self) -> dict[str, float]:
    """What the packing of the first epoch is like."""
    plan = self.plan(0)
    rows = len(plan.rows)
    return {
      "examples": len(self.examples),
      "rows": rows,
      "examples_per_row": len(self.examples) / rows,
      "fill": plan.fill(self.pack.tokens),
      "images_per_row": self.images,
      "slot_fill": float(self.slots.sum()) / max(rows * self.images * self.shape.slots, 1),
      "wanted_tokens": int(sum(r.wanted_L.sum() for r in plan.rendered)),
    }

  def __call__(self, number: int) -> Packed:
    """Arrays of one row, without a batch axis. An example whose image cannot be read raises
    ValueError or, where bad rows are dropped, is left out."""
    epoch, row = self.locate(number)
    plan = self.plan(epoch)
    L, units = self.pack.tokens, self.shape.slots // self.cfg.vision.pixels.merge_size**2
    tokens, wanted, segment = np.zeros(L, np.int32), np.zeros(L, bool), np.zeros(L, np.int32)
    position, unit, shown, at = np.zeros((3, L), np.int32), [np.zeros(0, np.int32)], [], 0
    members, place = plan.rows[row], 0
    for index in members:
      rendered = plan.rendered[index]
      try:
        prompt, patches = self._prompt(index, rendered)
      except ValueError as error:
        self._drop(index, error)
        continue
      place += 1
      span = slice(at, at + len(prompt.tokens))
      at = span.stop
      tokens[span], position[:, span], segment[span] = prompt.tokens, prompt.position, place
      wanted[span] = np.insert(
        rendered.wanted_L,
        max(rendered.image_at, 0),
        np.zeros(patches.num_tokens if patches else 0, bool),
      )
      if patches:
        unit.append(patches.unit_I + len(shown) * units)
        shown.append(pad_image(patches, self.shape.slots, self.shape.tokens))
    prompts = Prompts(tokens, segment > 0, position, np.int32(0))
    return Packed(
      self._images(shown, np.concatenate(unit)),
      prompts,
      segment,
      wanted,
      np.int32(len(members) - place),
    )

  def _drop(self, index: int, error: ValueError) -> None:
    """Logs an example that is left out, once. Raises ValueError where bad rows are refused."""
    if self.bad:
      self.bad.late(bad_row(self.examples[index], error))
      return
    if self.pack.bad_rows == "refuse":
      raise ValueError(f"{error} (bad_rows = 'drop' leaves it out)") from error
    with self.lock:
      new = index not in self.dropped
      self.dropped.add(index)
    if new:
      log.warning("dropped: %s", error)

  def _prompt(self, index: int, rendered: Rendered) -> tuple[Prompt, object | None]:
    """Tokens and positions of an example, and its patches."""
    ids, example = rendered.tokens_L.tolist(), self.examples[index]
    mrope = self.cfg.text.mrope_sections is not None
    if rendered.image_at < 0:
      return build_prompt(ids, (0, 0), [], self.cfg.image_token, False), None
    image = read_image(example)  # its error names the row
    try:
      patches = self.cfg.vision.pixels.patchify(image)
    except ValueError as error:
      raise ValueError(f"row {example.name!r}: {error}") from error
    at = rendered.image_at
    return build_prompt(
      ids[:at], patches.grid_units, ids[at:], self.cfg.image_token, mrope
    ), patches

  def _images(self, shown: list[dict[str, np.ndarray]], unit: np.ndarray) -> Images | None:
    """A row's images, filled up with empty ones."""
    if not self.images:
      return None
    S, E = self.shape.slots, self.cfg.vision.in_channels * self.cfg.vision.pixels.patch_size**2
    empty = dict(
      patches_BSE=np.zeros((S, E), np.uint8),
      position_BS2=np.zeros((S, 2), np.int32),
      valid_BS=np.zeros(S, bool),
    )
    shown = shown + [empty] * (self.images - len(shown))
    I = min(self.images * self.shape.tokens, self.pack.tokens)
    return Images(
      unit_BI=np.pad(unit.astype(np.int32), (0, I - len(unit))),
      **{name: np.stack([image[name] for image in shown]) for name in empty},
    )


def packed_batches(
  packer: Packer,
  batch_size: int,
  steps: int,
  share: Sequence[int] | None = None,
  threads: int | None = None,
) -> grain.DatasetIterator:
  """`steps` batches of the packer's stream; `get_state` / `set_state` resume it exactly, with any
  number of processes.

  share: places in each batch that are made here (`sharding.batch_share`); None: all.
  """
  places = range(batch_size) if share is None else [int(i) for i in share]
  pool = concurrent.futures.ThreadPoolExecutor(
    threads or min(16, os.cpu_count() or 1), thread_name_prefix="rows"
  )
  made = lambda number: stack(list(pool.map(lambda i: packer(number * batch_size + i), places)))
  dataset = grain.MapDataset.range(steps).map(made)
  return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
