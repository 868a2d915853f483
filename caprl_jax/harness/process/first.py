"""What the first process of a run finds in shared files, or each of them -> the same in all.

Shared folders may show a file to one process and not yet to another, or the first one may write
while others look: so the first one looks, and tells.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from caprl_jax.errors import UserError

Value = TypeVar("Value")


def from_first(look: Callable[[], Value]) -> Value:
  """What `look` returns in the first process, in which alone it is called; all processes call this.

  Args:
    look: returns what JSON can hold.

  Raises:
    ValueError: `look` raised one; in all processes.
  """
  if jax.process_count() == 1:
    return look()
  told, error = {}, None
  if jax.process_index() == 0:
    try:
      told = {"value": look()}
    except ValueError as raised:
      told, error = {"error": str(raised)}, raised
  told = _broadcast(told)
  if error is not None:
    raise error
  if "error" in told:
    raise UserError(told["error"])
  return told["value"]


def from_all(value: Value) -> list[Value]:
  """What each process of the run gives, in the order of their numbers; all processes call this,
  none of them inside a mesh of its own devices.

  Args:
    value: what JSON can hold.
  """
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array([len(data)], np.int32)).ravel()
  padded = np.pad(data, (0, int(lengths.max()) - len(data)))
  every = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
  return [json.loads(row[:n].tobytes()) for row, n in zip(every, lengths, strict=True)]


def _broadcast(value: Any) -> Any:
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  padded = np.zeros(length, np.uint8)
  padded[: min(length, len(data))] = data[:length]
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def one_process_only(mode: str) -> None:
  """Raises UserError in several processes: what the mode does is one machine's."""
  if jax.process_count() > 1:
    raise UserError(
      f"mode {mode} runs in one process, and this run has {jax.process_count()}: start it on one "
      "host, with --nodistributed"
    )
