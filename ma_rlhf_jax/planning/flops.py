"""Floating-point operations of a traced function, loops counted.

XLA's own count takes the body of a loop once, which is 266 times too low for
an update of 7B; so the jaxpr is walked: matrix products times the trips of the
loops around them. Bounds of `while` loops are followed through the few integer
operations that lead to them.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
from jax.extend import core

Known = dict[Any, int]

_INTEGER: dict[str, Callable[..., int]] = {
    'add': lambda a, b: a + b,
    'sub': lambda a, b: a - b,
    'mul': lambda a, b: a * b,
    'min': min,
    'max': max,
    'convert_element_type': lambda a: a,
    'copy': lambda a: a,
    'broadcast_in_dim': lambda a, *unused: a,
}


def _integer(atom: Any, known: Known) -> int | None:
  """The value of a scalar, where it is a known whole number."""
  if isinstance(atom, core.Literal):
    value = atom.val
    shape = getattr(value, 'shape', ())
    return int(value) if shape == () and int(value) == value else None
  return known.get(atom)


def _bind(inner: Sequence[Any], outer: Sequence[Any], known: Known) -> Known:
  """What is known of the inputs of an inner jaxpr."""
  values = {}
  if len(inner) == len(outer):
    for var, atom in zip(inner, outer, strict=True):
      if (value := _safe_integer(atom, known)) is not None:
        values[var] = value
  return values


def _safe_integer(atom: Any, known: Known) -> int | None:
  try:
    return _integer(atom, known)
  except (TypeError, ValueError, OverflowError):  # nan, inf, a key
    return None


def _dot(eqn: Any) -> int:
  (contracted, _), _ = eqn.params['dimension_numbers']
  lhs = eqn.invars[0].aval.shape
  inner = math.prod(lhs[axis] for axis in contracted)
  return 2 * inner * math.prod(eqn.outvars[0].aval.shape)


def _convolution(eqn: Any) -> int:
  spec = eqn.params['dimension_numbers'].rhs_spec  # (out, in, *space)
  rhs = eqn.invars[1].aval.shape
  inner = math.prod(rhs[axis] for axis in spec[1:])
  return 2 * inner * math.prod(eqn.outvars[0].aval.shape)


def _jaxprs(value: Any) -> list[Any]:
  """The jaxprs that a parameter of an equation holds."""
  if isinstance(value, core.ClosedJaxpr):
    return [value.jaxpr]
  if isinstance(value, core.Jaxpr):
    return [value]
  if isinstance(value, (tuple, list)):
    return [j for item in value for j in _jaxprs(item)]
  return []


def while_trips(eqn: Any, known: Known, default: int) -> int:
  """How often a while loop runs: its bound less where its counter starts.

  Args:
    eqn: the equation.
    known: whole numbers by variable.
    default: trips of a loop whose bound cannot be told.
  """
  params = eqn.params
  cond = params['cond_jaxpr'].jaxpr
  num_cond, num_body = params['cond_nconsts'], params['body_nconsts']
  carry = eqn.invars[num_cond + num_body :]
  outer = [*eqn.invars[:num_cond], *carry]
  start = _bind(cond.invars, outer, known)
  counters = set(cond.invars[num_cond:])
  values = {v: n for v, n in start.items() if v not in counters}
  for inner in cond.eqns:
    if inner.primitive.name == 'lt' and inner.invars[0] in counters:
      bound = _safe_integer(inner.invars[1], values)
      if bound is not None:
        return max(bound - start.get(inner.invars[0], 0), 0)
    _follow(inner, values)
  return default


def _follow(eqn: Any, known: Known) -> None:
  """Adds what an operation on whole numbers gives."""
  rule = _INTEGER.get(eqn.primitive.name)
  if rule is None or len(eqn.outvars) != 1 or eqn.outvars[0].aval.shape:
    return
  values = [_safe_integer(atom, known) for atom in eqn.invars]
  if None not in values:
    known[eqn.outvars[0]] = rule(*values)


def _inner(eqn: Any, known: Known, default: int) -> int:
  """Operations of an equation that holds jaxprs."""
  name, params = eqn.primitive.name, eqn.params
  inside = lambda jaxpr, bound: _walk(jaxpr, bound, default)
  if name == 'scan':
    return params['length'] * inside(params['jaxpr'].jaxpr, {})
  if name == 'while':
    trips = while_trips(eqn, known, default)
    return trips * inside(params['body_jaxpr'].jaxpr, {})
  if name == 'cond':
    return max(inside(b.jaxpr, {}) for b in params['branches'])
  found = [j for value in params.values() for j in _jaxprs(value)]
  total = 0
  for jaxpr in found[:1] if name.startswith('custom_') else found:
    bound = _bind(jaxpr.invars, eqn.invars, known)
    total += inside(jaxpr, bound)
    known.update(
        {
            out: bound[inner]
            for out, inner in zip(eqn.outvars, jaxpr.outvars, strict=False)
            if not isinstance(inner, core.Literal) and inner in bound
        }
    )
  if name == 'shard_map':
    sizes = params['mesh'].shape
    total *= math.prod(sizes[axis] for axis in params['newly_manual_axes'])
  if name == 'pallas_call':
    total *= math.prod(params['grid_mapping'].grid)
  return total


def _used(jaxpr: Any) -> list[Any]:
  """Its equations without those that XLA drops: nobody reads what they give."""
  is_var = lambda atom: not isinstance(atom, core.Literal)
  read, kept = set(filter(is_var, jaxpr.outvars)), []
  for eqn in reversed(jaxpr.eqns):
    if eqn.effects or read.intersection(eqn.outvars):
      read.update(filter(is_var, eqn.invars))
      kept.append(eqn)
  return kept[::-1]


def _walk(jaxpr: Any, known: Known, default: int) -> int:
  total = 0
  for eqn in _used(jaxpr):
    name = eqn.primitive.name
    if name == 'dot_general':
      total += _dot(eqn)
    elif name == 'conv_general_dilated':
      total += _convolution(eqn)
    elif any(_jaxprs(value) for value in eqn.params.values()):
      total += _inner(eqn, known, default)
    else:
      _follow(eqn, known)
  return total


def count(jaxpr: jax.extend.core.ClosedJaxpr, default_trips: int = 1) -> int:
  """Operations of matrix products and convolutions, of all devices together.

  Args:
    jaxpr: of the function, traced with global shapes.
    default_trips: of a `while` loop whose bound cannot be told.
  """
  known = {}
  for var, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
    if getattr(value, 'shape', None) == () and str(value.dtype)[:3] == 'int':
      known[var] = int(value)
  return _walk(jaxpr.jaxpr, known, default_trips)
