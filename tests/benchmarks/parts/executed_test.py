"""What the benchmarks count as executed: loops as often as they run, the branch that is taken."""

import jax
import jax.numpy as jnp

from benchmarks.parts.executed import executed

X = jnp.ones((4, 8))
W = jnp.eye(8)
ONCE = 2 * 4 * 8 * 8


def flops(function, *arguments):
  return executed(function, *arguments)[0]


def test_loops_count_as_often_as_they_run():
  def until(x, limit):
    return jax.lax.while_loop(lambda c: c[0] < limit, lambda c: (c[0] + 1, c[1] @ W), (0, x))[1]

  assert flops(until, X, 3) == 3 * ONCE
  assert flops(jax.jit(until), X, 5) == 5 * ONCE
  assert flops(lambda x: jax.lax.scan(lambda c, _: (c @ W, None), x, None, 4)[0], X) == 4 * ONCE


def test_only_the_branch_that_is_taken_counts():
  def choose(index, x):
    return jax.lax.switch(index, [lambda x: x, lambda x: x @ W, lambda x: x @ W @ W], x)

  assert [flops(choose, i, X) for i in range(3)] == [0, ONCE, 2 * ONCE]
  # inside a loop that is otherwise static
  run = lambda x: jax.lax.map(lambda i: choose(i, x), jnp.arange(3))
  assert flops(run, X) == 3 * ONCE


def test_a_gradient_and_its_recomputation_count():
  loss = lambda w: jnp.sum((X @ w) ** 2)
  assert flops(jax.grad(loss), W) == 2 * ONCE
  again = jax.grad(jax.checkpoint(lambda w: jnp.sum((jnp.sin(X @ w) @ W) ** 2)))
  # forward: two products (the second's value is needed for the square); made again: two at most
  assert 4 * ONCE <= flops(again, W) <= 6 * ONCE


def test_bytes_are_those_that_products_read_and_write():
  assert executed(lambda x: x @ W, X)[1] == 4 * (4 * 8 + 8 * 8 + 4 * 8)


def test_the_body_of_a_loop_is_compiled_once(monkeypatch):
  made = []
  jit = jax.jit
  monkeypatch.setattr(jax, "jit", lambda function: made.append(function) or jit(function))

  def until(x, limit):  # a choice in its body, so that it is run piece by piece
    body = lambda c: (c[0] + 1, jax.lax.cond(c[0] > 0, lambda x: x @ W, jnp.sin, c[1] + 1))
    return jax.lax.while_loop(lambda c: c[0] < limit, body, (0, x))[1]

  def programs(limit):
    made.clear()
    executed(until, X, limit)
    return len(made)

  assert programs(2) == programs(9)
