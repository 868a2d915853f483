"""A captioner as it is and rounded to int8 -> how much of its greedy captions changes."""

import dataclasses
import gc
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from caprl_jax.data.rows import CaptionRow
from caprl_jax.harness.sections import PolicySection
from caprl_jax.modes.caption.captioning import Captions
from caprl_jax.modes.caption.section import CaptionConfig
from caprl_jax.modes.caption.texts import fill

log = logging.getLogger("caprl_jax.modes.caption.int8")

# (captioner, settings) -> what opens one for a prompt
Captioners = Callable[
  [PolicySection, CaptionConfig], AbstractContextManager[Callable[[str], Captions]]
]


def check_int8_images(cfg: CaptionConfig, section: PolicySection) -> None:
  """Raises ValueError where there is nothing to compare."""
  if cfg.int8_images and section.int8 == "none":
    raise ValueError(
      f"caption.int8_images = {cfg.int8_images}: they are captioned with and without "
      "policy.int8, which is 'none'; set it to weights, cache or both"
    )


def compare(
  cfg: CaptionConfig,
  section: PolicySection,
  captioners: Captioners,
  rows: Sequence[CaptionRow],
  prompt: str,
) -> dict[str, Any]:
  """Captions the first `caption.int8_images` images greedily, by the captioner as it is and then by
  the rounded one; only one of them is in memory. Says what changes.

  Returns:
    As `changes`, and `rounded`: what of the captioner is.
  """
  greedy = dataclasses.replace(cfg, captions=1, temperature=0.0, top_p=1.0, top_k=0)
  exact = dataclasses.replace(section, int8="none")
  first = rows[: cfg.int8_images]
  before, after = (_ids(captioners(one, greedy), first, prompt) for one in (exact, section))
  both = sorted(before.keys() & after.keys())
  found = changes([before[i] for i in both], [after[i] for i in both])
  if not both:
    log.warning("policy.int8 = %s: none of the first images could be compared", section.int8)
  else:
    log.info(
      "policy.int8 = %s changes %.2f%% of %d greedy tokens that follow the same words in %s, and "
      "%.0f%% of %d captions somewhere",
      section.int8,
      100 * found["changed_tokens"],
      found["tokens"],
      section.dtype,
      100 * found["changed_captions"],
      found["images"],
    )
  return {"rounded": section.int8} | found


def changes(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> dict[str, Any]:
  """What differs between the ids of captions of the same images.

  Returns:
    images; changed_captions: the share of captions that differ; tokens: those that follow the same
    words in both, of each caption up to the first that differs; changed_tokens: the share of these
    that differ. What comes after a difference is not compared: it follows other words. Shares are
    None where there is nothing.
  """
  tokens = changed = 0
  for old, new in zip(before, after, strict=True):
    same = [a == b for a, b in zip(old, new)]
    differs = False in same
    tokens += same.index(False) + 1 if differs else len(same)
    changed += differs
  return {
    "images": len(before),
    "changed_captions": changed / len(before) if before else None,
    "tokens": tokens,
    "changed_tokens": changed / tokens if tokens else None,
  }


def _ids(
  opened: AbstractContextManager[Callable[[str], Captions]], rows: Sequence[CaptionRow], prompt: str
) -> dict[int, list[int]]:
  """Number of a row -> its caption's ids; those that fail are left out."""
  by_prompt: dict[str, list[tuple[int, CaptionRow]]] = defaultdict(list)
  for number, row in enumerate(rows):
    try:
      by_prompt[fill(prompt, row)].append((number, row))
    except ValueError:
      log.debug("row %s lacks a field of the prompt", row.name)
  found: dict[int, list[int]] = {}
  with opened as captioner:
    for asked, numbered in by_prompt.items():
      outputs = (out for some in captioner(asked)(numbered) for out in some)
      found |= {out.number: out.captions[0].tokens for out in outputs if out.error is None}
  gc.collect()  # a captioner that is closed but still referred to by itself
  return found
