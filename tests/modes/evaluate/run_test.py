"""Mode `evaluate`: what cannot be read any more is in no figure."""

import types

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.rows import QARow
from caprl_jax.modes.evaluate.run import Evaluator
from caprl_jax.types import Batch


def test_rows_that_fail_are_left_out_of_every_batch():
  rows = [QARow(b"", (), f"r{i}") for i in range(7)]

  def example(index, rng):
    if index in (0, 4, 6):
      raise ValueError(f"row 'r{index}': disk error")
    return Batch(None, None, None, np.int32(index))

  run = types.SimpleNamespace(
    settings=types.SimpleNamespace(seed=0),
    mesh=sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]),
    eval=types.SimpleNamespace(example=example),
    eval_rows=rows,
    bad=BadRowList("drop", None),
  )
  evaluator = Evaluator.__new__(Evaluator)
  evaluator.run = run
  program = lambda params, batch, key: (batch, batch.row_B * 10)
  parts = list(evaluator._parts(program, None, 7, 4, "test"))
  assert [batch.row_B.tolist() for batch, _ in parts] == [[1, 2, 3], [5]]
  assert [samples.tolist() for _, samples in parts] == [[10, 20, 30], [50]]
  assert [row.where for row in run.bad.rows] == ["row 'r0'", "row 'r4'", "row 'r6'"]
