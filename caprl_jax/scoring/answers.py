"""A written answer, the gold -> a score.

Two protocols. "ours" reads an answer as a careful reader would and applies each benchmark's own
metric (`METRICS`, `score`). "official" repeats what the released scorer of CapRL does
(Prism_Evaluation/Eval_CapRL.py of InternLM/CapRL, with VLMEvalKit's `process_line` of that time),
defects included, so that published numbers can be compared (`official.official_score`).
Scores lie in 0..1. No score is given to an answer of None: nothing could be read.
"""

import re
import string
from collections.abc import Sequence
from typing import Literal, NamedTuple

from caprl_jax.scoring.choices import LETTER, index_of, multiple_choice, option_of
from caprl_jax.scoring.mathematics import maths
from caprl_jax.scoring.metrics import anls, chartqapro, open_answer, relaxed_accuracy, same
from caprl_jax.scoring.plain_text import tidied
from caprl_jax.scoring.statements import IF

Metric = Literal["multiple_choice", "relaxed", "chartqapro", "same", "anls", "maths"]

# What `score` applies. "questions": plain rows of questions, as
# `readers.benchmarks.files.from_qa_rows` makes them. CaptionQA's own score is in `captionqa`.
METRICS: dict[str, Metric] = {
  "MMStar": "multiple_choice",
  "SEED": "multiple_choice",
  "MMMU": "multiple_choice",
  "MMMU-Pro": "multiple_choice",
  "questions": "multiple_choice",
  "CaptionQA": "multiple_choice",
  "ChartQA": "relaxed",
  "ChartQAPro": "chartqapro",
  "CharXiv": "same",
  "InfoVQA": "anls",
  "MathVerse": "maths",
  "MathVision": "maths",
  "WeMath": "maths",
  "VisuLogic": "maths",
}


# Of an answer that is read, in characters, from its end: longer ones are a looping model's.
_LONGEST = 10_000


class Score(NamedTuple):
  """`value` in 0..1, and the `rule` that gave it: a metric's name, or for mathematics one of
  `maths`'s rules.
  """

  value: float
  rule: str


def score(
  prediction: str | None,
  gold: str | Sequence[str],
  benchmark: str,
  options: Sequence[str] = (),
  years: Sequence[bool] | None = None,
) -> Score:
  """Ours: an extracted answer by its benchmark's metric. Several golds: the best counts, but for
  ChartQAPro, whose golds are those of a conversation's turns, of which the last is asked.

  Where a multiple-choice benchmark asks an open question (MMMU), the gold is no letter and
  `open_answer` applies; where a mathematical one asks for a letter, `multiple_choice` does. Where
  the gold is the text of one option, its letter is right too. `years`: as in `chartqapro`.

  Raises ValueError for a benchmark that is not in METRICS, for no gold, and as `multiple_choice`
  and `maths`.
  """
  if benchmark not in METRICS:
    raise ValueError(f"benchmark = {benchmark!r} has no metric; known: {', '.join(METRICS)}")
  golds = (gold,) if isinstance(gold, str) else tuple(gold)
  if not golds:
    raise ValueError(f"{benchmark}: no gold answer; give one or drop the row")
  if prediction is not None:
    prediction = prediction[-_LONGEST:]
  metric = METRICS[benchmark]
  if metric == "anls":
    return Score(max(anls(one, golds) for one in _readings(prediction)), "anls")
  if metric == "chartqapro":
    golds = golds[-1:]
  return max(
    (_score_one(prediction, one, metric, options, years) for one in golds),
    key=lambda found: found.value,
  )


def _score_one(
  prediction: str | None,
  gold: str,
  metric: Metric,
  options: Sequence[str],
  years: Sequence[bool] | None,
) -> Score:
  found = _by_metric(prediction, gold, metric, options, years)
  option = None if LETTER.fullmatch(gold.strip()) else option_of(gold, options)
  if found.value < 1 and option is not None:
    chosen = multiple_choice(prediction, string.ascii_uppercase[option], options)
    return Score(chosen, "multiple_choice") if chosen else found
  return found


def _by_metric(
  prediction: str | None,
  gold: str,
  metric: Metric,
  options: Sequence[str],
  years: Sequence[bool] | None,
) -> Score:
  readings = _readings(prediction)
  if metric == "relaxed":
    return Score(max(relaxed_accuracy(one, gold) for one in readings), "relaxed")
  if LETTER.fullmatch(gold.strip()) and (not options or index_of(gold.strip()) < len(options)):
    return Score(multiple_choice(prediction, gold.strip(), options), "multiple_choice")
  if metric == "chartqapro":
    return Score(max(chartqapro(one, gold, years) for one in readings), "chartqapro")
  if metric == "same":
    return Score(max(same(one, gold) for one in readings), "same")
  if metric == "maths":
    return max((Score(*maths(one, gold)) for one in readings), key=lambda found: found.value)
  return Score(max(open_answer(one, gold) for one in readings), "open")


# What is behind it is what a sentence says: "The value was 45 in 2015".
_VERB = re.compile(
  r"(?:\b(?:is|are|was|were|be|equals?|equal\sto|has|have|had|approximately|about|of|answer|totals?|"
  r"reached|shows|to)\b|[:=≈→是为])\s?(?=\S)",
  re.IGNORECASE,
)
_ADDED = re.compile(
  r"[,;]?\s(?:in|for|during|by|at|on|as\sof|from|since|because|which|according|based|\()\s?[^\s].*$"
)
_AT = re.compile(r"^(?:in|at|on|by|during|from)\s", re.IGNORECASE)
_YES_NO = re.compile(r"(yes|no|true|false|是|否)\b\s?(?:\.(?!\s?\d)|[,;:!-])", re.IGNORECASE)


def _readings(prediction: str | None) -> tuple[str | None, ...]:
  """What a reader may take for the answer: all of it; of a sentence also what it says at its end;
  of "No, 12 is less." also its first word.
  """
  if prediction is None:
    return (None,)
  found = [prediction]
  text = tidied(prediction[-2000:])
  if text != prediction:
    found.append(text)
  yes_no = _YES_NO.match(tidied(prediction[:100]))
  if yes_no:
    found.append(yes_no[1])
  if " " in text or "：" in text:
    last = re.split(r"[.!?;\n]\s", text)[-1]
    verbs = list(_VERB.finditer(last))
    sentence = bool(re.search(r"\b(?:is|are|was|were|has|have|had|equals?)\b|[:=≈→是为]", last))
    for verb in verbs[-4:] if sentence else ():
      if IF.search(last[: verb.start()]):
        continue
      said = tidied(last[verb.end() :])
      found += [said, tidied(_ADDED.sub("", said)), _AT.sub("", said)]
    if not sentence:
      found += [tidied(_ADDED.sub("", text)), _AT.sub("", text)]
  return tuple(dict.fromkeys(found))
