"""Checkpoints: what comes back, which steps are written and kept, what does not fit."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import counting
from helpers.faults.damages import DAMAGES

from caprl_jax.harness.buckets.shared import saved_steps
from caprl_jax.harness.checkpoints import CheckpointConfig, Checkpoints
from caprl_jax.types import TrainState


class Waiting(Checkpoints):
  """What is saved is on the disk when `save` returns."""

  def save(self, *saved, **more):
    super().save(*saved, **more)
    self.wait()


@pytest.fixture
def open_in(tmp_path):
  """Opens the checkpoints of the test's workdir; closes them when it ends."""
  opened = []

  def open_with(**settings) -> Checkpoints:
    opened.append(Waiting(tmp_path, CheckpointConfig(**settings)))
    return opened[-1]

  yield open_with
  for checkpoints in opened:
    checkpoints.close()


def states(count: int):
  """(state, the iterator's state) after each of the first steps."""
  state, iterator, found = counting.new_state(), counting.batches(), []
  for _ in range(count):
    state = counting.step(state, next(iterator))[0]
    found.append((state, iterator.get_state()))
  return found


def assert_same(a, b):
  plain = lambda state: state.replace(key=jax.random.key_data(state.key))
  for x, y in zip(jax.tree.leaves(plain(a)), jax.tree.leaves(plain(b)), strict=True):
    np.testing.assert_array_equal(x, y)
    assert x.dtype == y.dtype


def test_state_and_position_come_back_and_go_on_alike(open_in):
  (_, _), (state, position), (later, _) = states(3)
  first = open_in(every_steps=1)
  first.save(state, position, {"seed": 0})
  restored, found = open_in().restore(counting.new_state())
  assert_same(restored, state)
  iterator = counting.batches()
  iterator.set_state(found)
  assert_same(counting.step(restored, next(iterator))[0], later)


def in_memory(state: TrainState, kind: str) -> TrainState:
  """With its moments in that memory, as `make_state` places them."""
  mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(), memory_kind=kind)
  return state.replace(opt_state=jax.device_put(state.opt_state, place))


@pytest.mark.parametrize("saved, restored", [("pinned_host", "device"), ("device", "pinned_host")])
def test_moments_go_from_one_memory_to_another(saved, restored, open_in):
  ((state, position),) = states(1)
  state = in_memory(state, saved)
  open_in().save(state, position, {}, force=True)
  found, _ = open_in().restore(in_memory(counting.new_state(), restored))
  assert_same(found, state)
  assert float(jnp.abs(found.opt_state[0]).max()) > 0
  assert {x.sharding.memory_kind for x in found.opt_state} == {restored}


def test_steps_that_are_due_or_forced_are_written_once_and_the_newest_kept(open_in, tmp_path):
  checkpoints = open_in(every_steps=2, keep=2)
  assert checkpoints.latest_step() is None and saved_steps(tmp_path) == []
  for state, position in states(7):
    checkpoints.save(state, position, {})
  assert saved_steps(tmp_path) == [4, 6] and checkpoints.latest_step() == 6
  checkpoints.save(state, position, {}, force=True)
  checkpoints.save(state, position, {}, force=True)  # as at the end of a run, where it may be due
  assert saved_steps(tmp_path) == [6, 7] == sorted(open_in().manager.all_steps())


def test_a_state_that_is_donated_while_it_is_written_is_saved_as_it_was(tmp_path):
  """Large enough to be still in writing when the next steps reuse its memory."""
  more = jax.jit(
    lambda state: state.replace(step=state.step + 1, params=state.params + 1), donate_argnums=0
  )
  state = TrainState(jnp.int32(0), jnp.zeros(10_000_000), (), jax.random.key(0))
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=1, keep=9))
  for _ in range(3):
    state = more(state)
    checkpoints.save(state, {}, {})
    state = more(more(state))
  checkpoints.wait()
  like = TrainState(jnp.int32(0), jnp.zeros(10_000_000), (), jax.random.key(0))
  for step in saved_steps(tmp_path):
    found, _ = checkpoints._read(step, like)
    assert int(found.step) == step
    np.testing.assert_array_equal(found.params, np.full(10_000_000, step, np.float32))
  checkpoints.close()
  assert saved_steps(tmp_path) == [1, 4, 7]


def test_a_checkpoint_that_was_not_finished_is_none(open_in, tmp_path):
  ((state, position),) = states(1)
  open_in().save(state, position, {}, force=True)
  (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
  assert saved_steps(tmp_path) == [1] and open_in().latest_step() == 1


def test_a_checkpoint_of_another_model_is_refused(open_in):
  ((state, position),) = states(1)
  checkpoints = open_in()
  checkpoints.save(state, position, {}, force=True)
  with pytest.raises(ValueError, match="does not fit this config's model or optimizer"):
    checkpoints.restore(counting.new_state(size=5))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_moved_aside(damage, open_in, tmp_path, caplog):
  (first, position), (second, later) = states(2)
  writer = open_in(every_steps=1)
  writer.save(first, position, {})
  writer.save(second, later, {})
  DAMAGES[damage](tmp_path / "checkpoints" / "2")
  checkpoints = open_in(every_steps=1)
  state, found = checkpoints.restore(counting.new_state())
  assert_same(state, first)
  assert found == position
  assert (
    "checkpoint of step 2 cannot be read" in caplog.text and "goes on from step 1" in caplog.text
  )
  assert saved_steps(tmp_path) == [1] == [checkpoints.latest_step()]
  assert (tmp_path / "checkpoints" / "damaged" / "2").is_dir()
  checkpoints.save(second, later, {})  # the step is made and written again
  assert_same(open_in().restore(counting.new_state())[0], second)


def test_where_all_are_damaged_none_is_moved(open_in, tmp_path):
  (first, position), (second, later) = states(2)
  writer = open_in(every_steps=1)
  writer.save(first, position, {})
  writer.save(second, later, {})
  for step in ("1", "2"):
    shutil.rmtree(tmp_path / "checkpoints" / step / "state" / "d")
  with pytest.raises(ValueError, match=r"or is damaged, nor does any older one \(\[1\]\)"):
    open_in().restore(counting.new_state())
  assert saved_steps(tmp_path) == [1, 2]


def test_fewer_than_two_checkpoints_are_not_kept():
  with pytest.raises(ValueError, match="checkpoint.keep = 1 must be at least 2: .* the one before"):
    CheckpointConfig(keep=1)
