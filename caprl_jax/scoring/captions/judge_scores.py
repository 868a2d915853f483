"""What a judge wrote about a caption as JSON -> one score.

CapRL++'s judge of videos (score mode vl_judge of its reward server) gives four scores from 0 to 1,
of which a weighted sum is the reward: `RELEASED_WEIGHTS`.
"""

import json
from collections.abc import Mapping
from typing import Any

from caprl_jax.config.named_values import parse_named
from caprl_jax.json_files import shown

RELEASED_WEIGHTS = (
  "factuality=0.30,temporal_alignment=0.25,coverage=0.25,hallucination_penalty=0.20"
)
OUR_WEIGHTS = "truth=0.5,completeness=0.5"  # of an image, which has no time


def read_weights(text: str, key: str) -> dict[str, float]:
  """Name of a score -> its weight. Raises ValueError, which names the key, for a text that is not
  `name=weight,...`, and for weights below 0 or of more than 1 together."""
  named = parse_named(text, key=key, example=RELEASED_WEIGHTS)
  try:
    weights = {name: float(weight) for name, weight in named.items()}
  except ValueError as error:
    raise ValueError(f"{key} = {shown(text)}: {error}") from error
  if not weights or min(weights.values()) < 0 or not 0 < sum(weights.values()) <= 1 + 1e-6:
    raise ValueError(
      f"{key} = {shown(text)}: name one score at least; weights are 0 or more and add up to 1 at "
      "most"
    )
  return weights


def weighted_score(text: str, weights: Mapping[str, float]) -> tuple[float, bool]:
  """The weighted sum of the scores in a text, from 0 to 1; and whether all of them could be read.

  As the release reads it: a JSON object, in a code fence or with words around it, of whose numbers
  those below 0 count 0 and those above 1 count 1. What cannot be read counts 0, too. (The release
  does not tell that apart; and a score that is no number, or JSON that is no object, makes it give
  0 to all captions of the request.)

  Args:
    weights: of each score, by its key in the object. They sum to 1 at most.
  """
  found = _object(text)
  scores = {name: _number(found.get(name)) for name in weights}
  total = sum(weight * (scores[name] or 0.0) for name, weight in weights.items())
  return min(max(total, 0.0), 1.0), None not in scores.values()


def _object(text: str) -> dict[str, Any]:
  """The JSON object of a text; empty where there is none."""
  text = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
  for part in (text, text[text.find("{") : text.rfind("}") + 1]):
    try:
      value = json.loads(part)
    except (ValueError, RecursionError):
      continue
    if isinstance(value, dict):
      return value
  return {}


def _number(value: Any) -> float | None:
  """A score between 0 and 1, also where it stands in quotes; None for what is none."""
  if not isinstance(value, (int, float, str)):
    return None
  try:
    number = float(value)
  except (ValueError, OverflowError):
    return None
  return min(max(number, 0.0), 1.0) if number == number else None
