"""Scores that a judge wrote as JSON, read as CapRL++'s reward server reads them."""

import pytest

from caprl_jax.config.named_values import parse_named
from caprl_jax.scoring.captions.judge_scores import RELEASED_WEIGHTS, weighted_score

WEIGHTS = {
  name: float(weight)
  for name, weight in parse_named(RELEASED_WEIGHTS, key="weights", example="").items()
}
FOUR = (
  '{"factuality": 0.8, "temporal_alignment": 0.7, "coverage": 0.6, "hallucination_penalty": 0.9, '
  '"reason": "x"}'
)


def test_the_released_weights():
  assert WEIGHTS == {
    "factuality": 0.30,
    "temporal_alignment": 0.25,
    "coverage": 0.25,
    "hallucination_penalty": 0.20,
  }


@pytest.mark.parametrize(
  "text, score, whole",
  [
    (FOUR, 0.3 * 0.8 + 0.25 * 0.7 + 0.25 * 0.6 + 0.2 * 0.9, True),
    (f"```json\n{FOUR}\n```", 0.745, True),
    (f"```\n{FOUR}```", 0.745, True),
    (f"Here it is: {FOUR} That is all.", 0.745, True),
    (FOUR.replace("0.8", '"0.8"'), 0.745, True),
    (FOUR.replace("0.8", "1.7").replace("0.7", "-3"), 0.3 + 0.15 + 0.18, True),  # each cut to 0..1
    ('{"factuality": 1}', 0.3, False),
    (FOUR.replace("0.8", "null"), 0.505, False),
    (FOUR.replace("0.8", "NaN"), 0.505, False),
    (FOUR.replace("0.8", '"good"'), 0.505, False),
    (FOUR[:40], 0.0, False),
    ("The caption is good.", 0.0, False),
    ("", 0.0, False),
    ("7", 0.0, False),
    ("[" * 100_000, 0.0, False),
  ],
)
def test_texts(text, score, whole):
  got, all_read = weighted_score(text, WEIGHTS)
  assert got == pytest.approx(score) and all_read is whole
