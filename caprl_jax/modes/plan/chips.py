"""What accelerators can do and cost; the machines that a recipe is planned for.

Peaks are the makers' figures. Prices change, differ between regions and providers, and are there to
be replaced (`plan.prices`).
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from caprl_jax.config.schema import did_you_mean
from caprl_jax.json_files import cut, read_json, shown

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator.

  flops: bfloat16 FLOP/s of matrix products, dense.
  bandwidth: bytes/s of its memory.
  memory: bytes that one program can have.
  link: bytes/s to the other chips of a machine, in one direction; 0: there are none.
  price: US dollars an hour.
  """

  name: str
  flops: float
  bandwidth: float
  memory: float
  link: float
  price: float


# TPUs: docs.cloud.google.com/tpu/docs, a page for each version ("System architecture"); `link` is
# half of the bidirectional figure. libtpu leaves a program 15.75 of v5e's 16 GiB, and the others
# are taken to lose as small a share. GPUs: NVIDIA's data sheets, without sparsity; `link` is half
# of NVLink's figure; a tenth of the memory is left to the driver, NCCL and XLA's own buffers. A T4
# has no bfloat16: its figure is of float32. Nobody rents an RTX 4060.
_TPU, _GPU = 15.75 / 16 * GIB, 0.9 * GIB

PRICES_OF = (
  "TPUs: cloud.google.com/tpu/pricing, on demand, US regions, as known in 2025; GPUs: what a large "
  "renter of GPUs (runpod.io) listed in spring 2026; T4: cloud.google.com/compute/gpus-pricing"
)
CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", 275e12, 1228e9, 32 * _TPU, 150e9, 3.22),
    Chip("v5e", 197e12, 819e9, 16 * _TPU, 200e9, 1.20),
    Chip("v5p", 459e12, 2765e9, 95 * _TPU, 600e9, 4.20),
    Chip("v6e", 918e12, 1638e9, 32 * _TPU, 400e9, 2.70),
    Chip("H100", 989e12, 3350e9, 79.6 * _GPU, 450e9, 2.79),
    Chip("A100", 312e12, 2039e9, 79.2 * _GPU, 300e9, 1.39),
    Chip("T4", 8.1e12, 320e9, 15 * _GPU, 0, 0.35),
    Chip("L4", 121e12, 300e9, 22.5 * _GPU, 0, 0.44),
    Chip("RTX4090", 165e12, 1008e9, 24 * _GPU, 0, 0.34),
    Chip("RTX4060", 30e12, 272e9, 8 * _GPU, 0, 0.0),
  )
}


@dataclasses.dataclass(frozen=True)
class Machine:
  """Some chips of one kind. `topology`: what libtpu calls them; None: it does not know them."""

  name: str
  chip: Chip
  count: int
  topology: str | None = None

  @property
  def chips_per_host(self) -> int:
    """Of v4 and v5p four; of v5e and v6e up to eight, but four where there are several hosts; eight
    GPUs."""
    alone = 4 if self.chip.name in ("v4", "v5p") else 8
    return self.count if self.count <= alone else 4 if self.chip.name.startswith("v") else 8


_TPU_MACHINES = {
  "v5e-1": "v5e:1x1",
  "v5e-8": "v5e:2x4",
  "v5e-16": "v5e:4x4",
  "v5p-8": "v5p:2x2x1",
  "v5p-16": "v5p:2x2x2",
  "v6e-1": "v6e:1x1",
  "v6e-8": "v6e:2x4",
}
USUAL = (*_TPU_MACHINES, "H100x8")


def machine_of(name: str) -> Machine | None:
  """A machine by its usual name (v5p-16, which counts two cores a chip; H100x8) or a topology of
  libtpu's (v5e:4x4); None for a topology of chips that are not in the table.

  Raises ValueError for a name that is neither.
  """
  topology = _TPU_MACHINES.get(name.lower(), name)
  if match := re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology):
    count = math.prod(int(n) for n in match[2].split("x"))
    chip = CHIPS.get(match[1])
    return None if chip is None else Machine(name, chip, count, topology)
  for chip in CHIPS.values():
    match = re.fullmatch(rf"{chip.name}(?:x([1-9]\d*))?", name, re.IGNORECASE)
    if match and chip.name[0].isupper():  # a GPU
      return Machine(name, chip, int(match[1] or 1))
  gpus = ", ".join(chip for chip in CHIPS if chip[0].isupper())
  raise ValueError(
    f"plan.topology = {shown(name)} is no machine{did_you_mean(name, USUAL)} (machines: auto, "
    f"{', '.join(USUAL)}, a GPU as L4 or A100x8 ({gpus}), a topology of libtpu's as v5e:4x4)"
  )


def machine_here(devices: Sequence[Any]) -> Machine | None:
  """The machine that has these devices of jax's; None where the table lacks them, as it does
  CPUs."""
  kind = devices[0].device_kind.replace(" ", "").lower()
  names = {"tpuv4": "v4", "tpuv5lite": "v5e", "tpuv5p": "v5p", "tpuv5": "v5p", "tpuv6lite": "v6e"}
  name = names.get(kind) or next((c for c in CHIPS if c[0].isupper() and c.lower() in kind), None)
  return None if name is None else Machine(devices[0].device_kind, CHIPS[name], len(devices))


def read_prices(given: str | None) -> dict[str, float]:
  """US dollars an hour of each chip: the table's, but for what is given.

  Args:
    given: "v5e=0.6,H100=2", or a JSON file {"v5e": 0.6}.

  Raises ValueError for a price that is none, and for chips that are not in the table.
  """
  prices = {name: chip.price for name, chip in CHIPS.items()}
  for name, price in _given(given).items():
    found = next((chip for chip in CHIPS if chip.lower() == name.strip().lower()), None)
    if found is None:
      raise ValueError(f"plan.prices: {shown(name)} is none of {', '.join(CHIPS)}")
    try:
      prices[found] = float(price)
    except (TypeError, ValueError):
      prices[found] = math.nan
    if not 0 <= prices[found] < math.inf:
      raise ValueError(f"plan.prices: {found} = {shown(price)} is no price in US dollars an hour")
  return prices


def _given(text: str | None) -> Mapping[str, object]:
  if not text:
    return {}
  if "=" in text:
    return dict(pair.partition("=")[::2] for pair in text.split(","))
  path = pathlib.Path(text).expanduser()
  if not path.is_file():
    raise ValueError(
      f"plan.prices = {cut(text, 200)}: there is no such file; write v5e=1.2,H100=2.5 or name a "
      "JSON file with such pairs"
    )
  found = read_json(path)
  if not isinstance(found, dict):
    raise ValueError(f'plan.prices: {path} must hold an object as {{"v5e": 1.2}}')
  return found
