"""Examples of all stages, and rows to ask about -> those that can be used, packed; before the first
stage begins."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence

from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.chat_rendering import Rendered
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.packing import PackConfig, Packer
from caprl_jax.data.readers.conversations import Conversation, Example
from caprl_jax.data.rows import BadRows, QARow
from caprl_jax.data.usable_rows import fits, usable
from caprl_jax.harness.training.row_digests import digest_of_all, row_digests
from caprl_jax.models.policy import PolicyConfig


@dataclasses.dataclass(frozen=True)
class Rules:
  """What cannot be used of each stage, and of the rows to ask about; all in one file."""

  asked: BadRowList
  stages: dict[str, BadRowList]


def rules_of(asked: BadRows, stages: Mapping[str, PackConfig], workdir: pathlib.Path) -> Rules:
  """The rules of a config, before a row is read."""
  key = "--config.pretrain.stages.{}.pack.bad_rows"
  first = BadRowList(asked, workdir / "bad_rows.jsonl", "--config.pretrain.eval_bad_rows")
  return Rules(
    first,
    {name: first.another(pack.bad_rows, key.format(name)) for name, pack in stages.items()},
  )


def pack_usable(
  data: Mapping[str, Sequence[Example]],
  asked: Sequence[QARow],
  render: Callable[[Conversation], Rendered],
  cfg: PolicyConfig,
  packs: Mapping[str, PackConfig],
  seeds: Mapping[str, int],
  rules: Rules,
  workdir: pathlib.Path,
) -> tuple[dict[str, Packer], dict[str, str], list[QARow]]:
  """Decodes every image once: the packer of each stage, the digest of its examples, and the rows
  to ask about. Raises ValueError for what cannot be used and is to be refused.

  Args:
    data: the examples of each stage. packs, seeds: of each stage's packer.
  """
  images = ImageCheck(workdir)
  images([*itertools.chain(*data.values(), asked)])  # all in one pass
  kept = rules.asked.check(usable(asked, images(asked), [fits(cfg.vision.pixels)]))
  rules.asked.settle("rows of pretrain.eval")
  packers, digests = {}, {}
  for name, examples in data.items():
    bad = rules.stages[name]
    packers[name] = Packer(examples, render, cfg, packs[name], seeds[name], images, bad)
    bad.settle(f"examples of stage {name}")
    left = packers[name].examples
    digests[name] = digest_of_all(row_digests(left, images(left)))
  return packers, digests, kept
