"""A training run's models, reward function and held-out rows -> its record, which refuses or tells
of others."""

import hashlib
import json
from collections.abc import Sequence

from caprl_jax.data.usable_rows import HasImage, ImageFacts
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.run_record import RunRecord
from caprl_jax.harness.rewards.function import CustomReward
from caprl_jax.harness.settings import Settings
from caprl_jax.harness.training.row_digests import digest_of_all, row_digests
from caprl_jax.hub.hub_files import fingerprint
from caprl_jax.inference.judge import JudgeSection


def bind_models(record: RunRecord, settings: Settings, *, goes_on: bool) -> None:
  """Compares the files of captioner and judge with the record's, and adds them to it.

  Args:
    goes_on: the run has a checkpoint. Then a captioner that is trained whole comes from there.

  Raises:
    ValueError: they are others than when the run was begun; as `fingerprint`.
  """
  policy, loss = settings.policy, settings.step.update.loss
  others = "bring its files back as they were, or use another --workdir"
  refused = {"judge.source": f"rewards would be another judge's; {others}"}
  said = {"policy.checkpoint": "nothing of it is used any more, since a checkpoint holds all of it"}
  if policy.trainable != "full" or loss.has_kl or not goes_on:
    refused["policy.checkpoint"] = (
      f"what is not trained, and the reference of a KL term, are read from it; {others}"
    )

  def found() -> dict[str, str]:
    return {
      "policy.checkpoint": policy.digest(),
      "judge.source": judge_digest(settings.judge),
    }

  record.bind(from_first(found), refused, said)


def judge_digest(judge: JudgeSection) -> str:
  """Of the files of a judge, or of what is asked of an endpoint; "none" without one. Raises
  ValueError as `fingerprint`."""
  if not judge.named:
    return judge.name
  if judge.endpoint is None:
    found = fingerprint(judge.source)
    if not judge.sees_image or judge.score_prompt is None:
      return found
    return hashlib.sha256(json.dumps([found, judge.score_text()]).encode()).hexdigest()
  decides = ("model", "temperature", "max_tokens", "repetition_penalty")
  asked = {name: getattr(judge.endpoint, name) for name in decides}
  return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def bind_reward(record: RunRecord, custom: CustomReward | None) -> None:
  """Compares the file of a reward function with the record's, and adds it to it. Raises ValueError
  where it is another one than when the run was begun."""
  refused = {
    "reward.custom": "rewards would be another function's; bring its file back as it was, or use "
    "another --workdir"
  }
  record.bind({"reward.custom": custom.sha256} if custom else {}, refused, {})


def bind_held_out_rows(
  record: RunRecord, rows: Sequence[HasImage], facts: Sequence[ImageFacts]
) -> None:
  """Says where the held-out rows are others than the record's. (The training rows are compared one
  by one, in `row_places`.)

  Args:
    facts: of each row's image.
  """
  digest = digest_of_all(row_digests(rows, facts))
  means = "accuracy before, during and after this run is of different questions"
  record.bind({"data.eval": digest}, {}, {"data.eval": means})
