"""Captioners, images -> their captions, kept by content."""

import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.rows import CaptionRow
from caprl_jax.data.usable_rows import bad_row
from caprl_jax.harness.process import peers
from caprl_jax.harness.process.first import from_all
from caprl_jax.harness.result_cache import ResultCache
from caprl_jax.harness.sections import PolicySection
from caprl_jax.inference.captioner import CaptionerConfig, open_captioner
from caprl_jax.modes.prism.section import PrismConfig
from caprl_jax.progress import Bar, going_on

log = logging.getLogger("caprl_jax.modes.prism.captions")


def caption_all(
  images: dict[str, CaptionRow],
  kept: ResultCache,
  load,
  cfg: PrismConfig,
  instruction: str,
  mesh,
  seed: int,
  bad: BadRowList,
) -> set[str]:
  """Captions what `kept` does not hold yet, each process its part. Returns the images that cannot
  be read any more; raises ValueError where such are refused."""
  keys = list(images)
  # Numbers go into random keys: counted among all, so that those of two interrupted runs differ.
  # Not of what is left: another process may have kept some of it already.
  mine = range(jax.process_index(), len(keys), jax.process_count())
  left = [(number, images[keys[number]]) for number in mine if keys[number] not in kept]
  lost = (
    _write_captions(
      left, keys, kept, load=load, cfg=cfg, instruction=instruction, mesh=mesh, seed=seed, bad=bad
    )
    if left
    else []
  )
  with going_on("waiting for the captions of the other processes"):
    peers.check()  # none waits for long in what comes now
  everywhere = {key for some in from_all(lost) for key in some}
  kept.await_others(key for key in keys if key not in everywhere)
  return everywhere


def _write_captions(
  left: Sequence[tuple[int, CaptionRow]],
  keys: Sequence[str],
  kept: ResultCache,
  load,
  cfg: PrismConfig,
  instruction: str,
  mesh,
  seed: int,
  bad: BadRowList,
) -> list[str]:
  """Captions numbered images, whose keys are `keys`; those of them that cannot be read any more."""
  lost = []
  settings = CaptionerConfig(
    instruction,
    captions=cfg.captions,
    max_tokens=cfg.max_tokens,
    temperature=cfg.temperature,
    top_p=cfg.top_p,
    batch_size=cfg.batch_size,
    repetition_penalty=1.0,
  )
  with (
    open_captioner(load, settings, mesh=mesh, seed=seed) as captioner,
    Bar(len(left), "captions", "image") as bar,
  ):
    for found in captioner(left):
      for item in found:
        if item.error is not None:
          bad.late(bad_row(item.row, item.error))
          lost.append(keys[item.number])
      kept.put(
        {
          keys[item.number]: [
            {"caption": one.text, "tokens": len(one.tokens), "finish": one.finish}
            for one in item.captions
          ]
          for item in found
          if item.error is None
        }
      )
      bar.update(len(found))
  return lost


def captions_of(
  name: str,
  captioner: PolicySection,
  identity: dict[str, Any],
  images: dict[str, CaptionRow],
  cache: pathlib.Path,
  cfg: PrismConfig,
  mesh: jax.sharding.Mesh,
  seed: int,
  bad: BadRowList,
) -> tuple[ResultCache, set[str]]:
  """One captioner's captions of all images, and the images that it could not read; those that an
  earlier run kept are not written again."""
  settings = {
    "instruction": captioner.instruction,
    "captions": cfg.captions,
    "temperature": cfg.temperature,
    "top_p": cfg.top_p,
    "max_tokens": cfg.max_tokens,
    "seed": seed,
  }
  captions = ResultCache(cache, "captions", identity | settings)
  log.info(
    "captioner %s: %d of %d images are captioned already",
    name,
    sum(key in captions for key in images),
    len(images),
  )
  lost = caption_all(
    images,
    captions,
    captioner.load,
    cfg=cfg,
    instruction=captioner.instruction,
    mesh=mesh,
    seed=seed,
    bad=bad,
  )
  return captions, lost
