"""Compared images -> the figures of each captioner, and which images the page shows."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from caprl_jax.data.rows import kinds
from caprl_jax.modes.gallery.page import NOBODY, ComparedImage, GivenCaption


def difference(shared: ComparedImage) -> float:
  """How far the captions are from each other in words: the mean over pairs of 1 - shared words /
  all words.
  """
  sets = [{word.casefold() for word in said.words} for said in shared.said.values()]
  far = [1 - len(a & b) / len(a | b) if a | b else 0.0 for a, b in itertools.combinations(sets, 2)]
  return float(np.mean(far)) if far else 0.0


def pick(
  images: Sequence[ComparedImage], count: int, rng: np.random.Generator
) -> tuple[list[ComparedImage], list[ComparedImage]]:
  """Images drawn at random, and of the others those where the captioners differ most; half of
  `count` each.
  """
  several, count = len(images[0].said) > 1, min(count, len(images))
  drawn = sorted(rng.permutation(len(images))[: -(-count // 2) if several else count].tolist())
  rest = [i for i in range(len(images)) if i not in set(drawn)] if several else []

  def unlike(i: int) -> tuple[float, float]:
    shared = images[i]
    right = [sum(shared.right(who)) for who in shared.said if who in shared.choices]
    return (max(right) - min(right) if right else 0, difference(shared))

  most = sorted(rest, key=unlike, reverse=True)[: count - len(drawn)]
  return [images[i] for i in drawn], [images[i] for i in most]


def figures(
  files: Mapping[str, Mapping[str, GivenCaption]],
  common: Sequence[ComparedImage],
  judged: Sequence[ComparedImage],
) -> dict[str, Any]:
  """Of each captioner: rows of its file; over the common images its failures, mean lengths and
  share cut; over the judged ones its accuracy, by kind of question too. None where nothing is
  known."""
  mean = lambda values: float(np.mean(values)) if values else None
  out: dict[str, Any] = {
    "images": len(common),
    "judged_images": len(judged),
    "questions": sum(len(shared.questions) for shared in judged),
    "captioners": {},
  }
  for who in files:
    said = [shared.said[who] for shared in common]
    good = [one for one in said if one.caption is not None]
    out["captioners"][who] = {
      "images": len(files[who]),
      "failed": len(said) - len(good),
      "tokens": mean([one.tokens for one in good if one.tokens is not None]),
      "words": mean([len(one.words) for one in good]),
      "cut_share": mean([one.cut for one in good if one.cut is not None]),
    }
  if judged:
    names = kinds([shared.row for shared in judged])
    for who in [*files, NOBODY]:
      scored = [
        (q.kind, choice, q.gold)
        for shared in judged
        for q, choice in zip(shared.questions, shared.choices[who], strict=True)
      ]
      row = out["captioners"].setdefault(who, {})
      row["accuracy"] = mean([choice == gold for _, choice, gold in scored])
      row["misled"] = mean(
        [choice is not None and choice not in (-1, gold) for _, choice, gold in scored]
      )
      row["accuracy_by_kind"] = {
        kind: mean([choice == gold for k, choice, gold in scored if k == kind]) for kind in names
      }
    out["questions_by_kind"] = {
      kind: sum(q.kind == kind for shared in judged for q in shared.questions) for kind in names
    }
  return out
