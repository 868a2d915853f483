"""A computation -> the seconds it takes."""

import time
from collections.abc import Callable
from typing import Any

import jax


def best_secs(run: Callable[[], Any], repeats: int) -> float:
  """The fastest of several runs, each until its results are there; compile before."""
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return min(times)
