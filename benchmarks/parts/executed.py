"""FLOPs of the matrix products that a program really executes: loops as often as they run, of a
choice the branch that is taken.

XLA's own count takes every loop once and every branch; here the program's outline runs with its
real values, so what depends on data (captions that end early, rungs) counts as it happens.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

Counted = tuple[list[Any], np.ndarray]  # values, and FLOPs and bytes of the products


def executed(function: Callable, *arguments: Any) -> tuple[float, float]:
  """FLOPs of the matrix products and convolutions of function(*arguments), which is run once, and
  the bytes of what they read and write."""
  jaxpr = jax.make_jaxpr(function)(*arguments)
  flops, moved = _Outline().run(jaxpr.jaxpr, jaxpr.consts, jax.tree.leaves(arguments))[1]
  return float(flops), float(moved)


def _inner(eqn: Any) -> list[Any]:
  """The jaxprs inside an equation."""
  found = []
  for value in eqn.params.values():
    for one in value if isinstance(value, (tuple, list)) else [value]:
      if hasattr(one, "eqns") or hasattr(one, "jaxpr"):
        found.append(one)
  return found


def _open(jaxpr: Any) -> tuple[Any, list[Any]]:
  return (jaxpr.jaxpr, list(jaxpr.consts)) if hasattr(jaxpr, "consts") else (jaxpr, [])


def _static(jaxpr: Any) -> np.ndarray | None:
  """FLOPs and bytes of a jaxpr in which nothing depends on data, else None."""
  costs = [_cost(eqn) for eqn in _open(jaxpr)[0].eqns]
  return None if any(cost is None for cost in costs) else sum(costs, np.zeros(2))


def _own(eqn: Any) -> np.ndarray:
  flops = 0.0
  if eqn.primitive.name == "dot_general":
    (left, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    flops = 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in left)
  elif eqn.primitive.name == "conv_general_dilated":
    kernel = eqn.invars[1].aval.shape
    out = eqn.params["dimension_numbers"].rhs_spec[0]
    flops = 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[out]
  if not flops:
    return np.zeros(2)
  arrays = [v.aval for v in [*eqn.invars, *eqn.outvars]]
  return np.array([flops, sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)])


def _cost(eqn: Any) -> np.ndarray | None:
  """FLOPs and bytes of an equation in which nothing depends on data, else None."""
  name = eqn.primitive.name
  if name in ("while", "cond"):
    return None
  inner = [_static(one) for one in _inner(eqn)]
  if name.startswith("custom_"):  # the function and its rules; the function runs
    inner = inner[:1]
  if any(cost is None for cost in inner):
    return None
  return _own(eqn) + (eqn.params["length"] if name == "scan" else 1) * sum(inner)


@dataclasses.dataclass(frozen=True)
class _Group:
  """Neighbouring equations: some in which nothing depends on data, which are run as one program, or
  one of the others. reads, makes: variables of the program."""

  eqns: list[Any]
  cost: np.ndarray | None
  program: Callable[..., Any] | None = None
  reads: tuple[Any, ...] = ()
  makes: tuple[Any, ...] = ()

  @classmethod
  def static(cls, eqns: list[Any]) -> "_Group":
    made: dict[Any, None] = {}
    needed: dict[Any, None] = {}
    for eqn in eqns:
      for v in eqn.invars:
        if not isinstance(v, core.Literal) and v not in made:
          needed[v] = None
      made.update(dict.fromkeys(v for v in eqn.outvars if type(v).__name__ != "DropVar"))
    names = core.DebugInfo("group", "", ("",) * len(needed), ("",) * len(made))
    jaxpr = core.Jaxpr((), list(needed), list(made), eqns, debug_info=names)
    program = jax.jit(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ())))
    cost = sum((_cost(eqn) for eqn in eqns), np.zeros(2))
    return cls(eqns, cost, program, tuple(needed), tuple(made))


class _Outline:
  """Runs outlines, and keeps what it compiled: the body of a loop is met again and again."""

  def __init__(self):
    self.groups: dict[Any, list[_Group]] = {}  # of a jaxpr

  def run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> Counted:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    total = np.zeros(2)
    for group in self._groups(jaxpr):
      if group.program is not None:
        made = group.program(*(values[v] for v in group.reads))
        values.update(zip(group.makes, made, strict=True))
        total += group.cost
        continue
      (eqn,) = group.eqns
      read = [v.val if isinstance(v, core.Literal) else values[v] for v in eqn.invars]
      out, cost = self._equation(eqn, read)
      values.update(zip(eqn.outvars, out, strict=True))
      total += cost
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars], total

  def _groups(self, jaxpr: Any) -> list[_Group]:
    if jaxpr not in self.groups:
      found: list[_Group] = []
      for static, eqns in itertools.groupby(jaxpr.eqns, key=lambda eqn: _cost(eqn) is not None):
        some = list(eqns)
        found += [_Group.static(some)] if static else [_Group([eqn], None) for eqn in some]
      self.groups[jaxpr] = found
    return self.groups[jaxpr]

  def _equation(self, eqn: Any, read: list[Any]) -> Counted:
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
      return self._while(params, read)
    if name == "scan":
      return self._scan(params, read)
    if name == "cond":
      index = int(jnp.clip(read[0], 0, len(params["branches"]) - 1))
      jaxpr, consts = _open(params["branches"][index])
      return self.run(jaxpr, consts, read[1:])
    jaxpr, consts = _open(_inner(eqn)[0])
    return self.run(jaxpr, consts, read)

  def _while(self, params: dict[str, Any], read: list[Any]) -> Counted:
    conditions, body = params["cond_nconsts"], params["body_nconsts"]
    given, own, state = (
      read[:conditions],
      read[conditions : conditions + body],
      read[conditions + body :],
    )
    test, test_consts = _open(params["cond_jaxpr"])
    step, step_consts = _open(params["body_jaxpr"])
    total = np.zeros(2)
    while bool(self.run(test, test_consts, [*given, *state])[0][0]):
      state, flops = self.run(step, step_consts, [*own, *state])
      total += flops
    return list(state), total

  def _scan(self, params: dict[str, Any], read: list[Any]) -> Counted:
    consts, carried = params["num_consts"], params["num_carry"]
    own, state, rows = read[:consts], read[consts : consts + carried], read[consts + carried :]
    jaxpr, inner = _open(params["jaxpr"])
    order = range(params["length"])
    made, total = [], np.zeros(2)
    for i in reversed(order) if params["reverse"] else order:
      out, flops = self.run(jaxpr, inner, [*own, *state, *(x[i] for x in rows)])
      state, total = out[:carried], total + flops
      made.append(out[carried:])
    if params["reverse"]:
      made.reverse()
    return [*state, *(jnp.stack(x) for x in zip(*made, strict=True))], total
