"""The judge on captions that are known to be good, or to say nothing -> may it teach?"""

import logging
from collections.abc import Callable

from caprl_jax.data.rows import QARow
from caprl_jax.harness.setup import Run

log = logging.getLogger("caprl_jax.harness.gate")


def gate(run: Run) -> dict[str, float]:
  """Judge accuracy on held-out questions with ideal, generic and empty captions.

  Raises ValueError, with the numbers, when the gap is too small: such a judge cannot teach.
  """
  cfg = run.settings.gate
  ideal = cfg.ideal
  if ideal is None:
    why = "gate.ideal is None, no true captions are known" if run.judged else "there is no judge"
    log.info("gate skipped: %s", why)
    return {}
  assert run.host_judge is not None, "checked with the settings"
  host_judge = run.host_judge
  pairs = [(row, q) for row in run.eval_rows for q in row.questions]

  def rate(caption: Callable[[QARow], str]) -> float:
    asks = [(caption(row), q) for row, q in pairs]
    right, answered = host_judge.correct(asks, "gate"), host_judge.answered(asks)
    if not answered.all():
      log.warning("gate: %d of %d answers failed and are left out", (~answered).sum(), len(asks))
    return float(right[answered].mean()) if answered.any() else 0.0

  result = {
    "ideal": rate(lambda row: ideal.format(**(row.facts or {}))),
    "generic": rate(lambda _: cfg.generic),
    "empty": rate(lambda _: ""),
    "questions": len(pairs),
  }
  log.info(
    "gate: judge accuracy %.3f with ideal captions, %.3f with %r, %.3f with none (%d "
    "held-out questions)",
    result["ideal"],
    result["generic"],
    cfg.generic,
    result["empty"],
    len(pairs),
  )
  if result["ideal"] - max(result["generic"], result["empty"]) < cfg.min_gap:
    raise ValueError(
      f"the judge {run.settings.judge.name} cannot teach: it answers {result['ideal']:.2f} of "
      f"the questions from ideal captions, {result['generic']:.2f} from {cfg.generic!r} and "
      f"{result['empty']:.2f} from an empty one; the gap must be at least gate.min_gap = "
      f"{cfg.min_gap}. Use a stronger judge, another judge.reading, or better curated questions"
    )
  return result
