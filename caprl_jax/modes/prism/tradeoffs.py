"""An evaluation -> what its captions told and what they said falsely, one benchmark and captioner
at a time.
"""

from collections.abc import Sequence

import numpy as np

from caprl_jax.modes.prism.evaluation import Evaluation
from caprl_jax.scoring.captions.facts import KnownFacts
from caprl_jax.scoring.captions.tradeoff import Said
from caprl_jax.scoring.captions.words import words_of


def judged_said(evaluation: Evaluation, benchmark: str, who: str) -> Said:
  """Each question with each caption: told where it is answered right, false where wrong rather than
  not at all."""
  scores, shown = evaluation.scored[benchmark][who], evaluation.shown[benchmark]
  captions = evaluation.captions[who]
  count = scores["ours"].shape[1]
  keys, digests = _numbers(shown), _numbers(evaluation.digests[benchmark])
  words = {key: [len(words_of(one["caption"])) for one in captions[key]] for key in keys}
  return Said(
    told=scores["ours"].ravel(),
    false=scores["misled"].ravel(),
    words=np.array([words[key] for key in shown], float).ravel(),
    image=np.repeat([digests[digest] for digest in evaluation.digests[benchmark]], count),
    caption=np.array([[keys[key] * count + n for n in range(count)] for key in shown]).ravel(),
  )


def facts_said(evaluation: Evaluation, benchmark: str, who: str) -> Said | None:
  """Each caption of an image whose facts are known: the share of them that it tells, and 1 where it
  says something false. None where no facts are known."""
  rows = evaluation.rows[benchmark]
  facts = {
    key: row.facts for key, row in zip(evaluation.shown[benchmark], rows, strict=True) if row.facts
  }
  known = KnownFacts(facts.values())
  if not known:
    return None
  digests = _numbers(evaluation.digests[benchmark])
  image = dict(zip(evaluation.shown[benchmark], evaluation.digests[benchmark], strict=True))
  found = []
  for key, of_image in facts.items():
    for one in evaluation.captions[who][key]:
      told = known.told(one["caption"], of_image)
      if told is not None:
        words = len(words_of(one["caption"]))
        found.append((told.share, float(told.false > 0), words, digests[image[key]], len(found)))
  return Said(*np.array(found, float).T) if found else None


def _numbers(names: Sequence[str]) -> dict[str, int]:
  return {name: number for number, name in enumerate(dict.fromkeys(names))}
