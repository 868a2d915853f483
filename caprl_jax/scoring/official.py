"""The released scorer of CapRL (Prism_Evaluation/Eval_CapRL.py of InternLM/CapRL), defects
included: so that published numbers can be compared. Scores lie in 0..1; `answers.py` has ours."""

import ast
from collections.abc import Sequence
from typing import Any

from caprl_jax.scoring.mathematics import math_verify_package
from caprl_jax.scoring.metrics import edit_distance


def official_score(prediction: str | None, gold: str | Sequence[str], benchmark: str) -> float:
  """What the released scorer gives to an answer that `extract_answer(…, "official")` found.

  `benchmark` is a benchmark's name or its file's path: the rule goes by what is spelled anywhere in
  it. Its peculiarities, each of them kept:
    "char" in the path: the best of math-verify and relaxed correctness; "info": of these and ANLS;
    else math-verify alone; so a folder's name can change the rule;
    relaxed correctness gets its arguments swapped: the 5% are relative to the prediction, and a
    prediction of zero is compared as a text;
    a number is also tried x0.01 and x100; a "%" divides by 100; any other sign makes a number a
    text, and so does math-verify to "0.5", which becomes "\\frac{1}{2}";
    a gold that math-verify finds nothing in (one with a line break, say) scores 1.0, whatever was
    answered, or nothing; words are products of letters to math-verify: "lube" is "blue";
    a list of golds is a list to relaxed correctness and ANLS, and one text to math-verify;
    ANLS compares texts with single spaces, and divides by their length with all of them.
  The versions of math-verify differ in what they can parse; the release names none. Raises
  ValueError if it is not installed, or outside the main thread.
  """
  package = math_verify_package()
  if package is None:
    raise ValueError(
      "the official scorer needs math-verify: pip install -e '.[maths]', or use the protocol 'ours'"
    )
  answer = prediction or ""
  text = gold if isinstance(gold, str) else str(list(gold))
  path = benchmark.lower()
  best = _official_maths(package, answer, text)
  if "char" in path or "info" in path:
    best = max(best, _official_chart(package, answer, gold, use_anls="info" in path))
  return best


def _official_parse(package: Any, text: str) -> list[Any]:
  return package.parse(
    text, extraction_mode="first_match", extraction_config=[package.LatexExtractionConfig()]
  )


def _official_maths(package: Any, answer: str, gold: str) -> float:
  wanted = _official_parse(package, f"${gold}$")
  if not wanted:
    return 1.0
  # Its arguments are swapped here too: the answer stands where the gold should.
  return float(
    package.verify(answer, wanted)
    or package.verify(_official_parse(package, f"${answer}$"), wanted)
  )


def _official_chart(package: Any, answer: str, gold: str | Sequence[str], use_anls: bool) -> float:
  parsed = _official_parse(package, f"${answer}$")
  answer = str(parsed[-1]) if parsed else ""
  golds = _listed(gold)
  if not golds:
    raise ValueError("no gold answer; give one or drop the row")
  try:
    number = float(answer)
    tried = [str(scale * number) for scale in (1, 0.01, 100)]
  except ValueError:
    tried = [answer]
  best = max(float(_official_relaxed(one.strip(), wanted)) for one in tried for wanted in golds)
  if use_anls:
    similarity = max(1 - _official_distance(wanted, answer) for wanted in golds)
    best = max(best, similarity if similarity >= 0.5 else 0.0)
  return best


def _listed(gold: str | Sequence[str]) -> list[str]:
  """The golds; a text that is a Python list is one. The released code runs it, this does not."""
  if not isinstance(gold, str):
    return [str(one) for one in gold]
  try:
    found = ast.literal_eval(gold.strip())
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return [gold]
  return [str(one) for one in found] if isinstance(found, list) and found else [gold]


def _official_relaxed(target: str, prediction: str) -> bool:
  """As called by the release: `target` is the model's answer, `prediction` the gold."""
  wanted, found = _official_float(target), _official_float(prediction)
  if found is not None and wanted:
    return abs(found - wanted) / abs(wanted) <= 0.05
  return prediction.lower() == target.lower()


def _official_float(text: str) -> float | None:
  try:
    return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
  except ValueError:
    return None


def _official_distance(gold: str, answer: str) -> float:
  # of the texts as they stand, extra spaces included
  longer = max(len(gold.upper()), len(answer.upper()))
  gold, answer = " ".join(gold.lower().split()), " ".join(answer.lower().split())
  return edit_distance(gold, answer) / longer if longer else 0.0
