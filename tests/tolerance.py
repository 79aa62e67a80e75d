"""How far two sums of the same numbers may differ on any processor.

A sum of n terms is rounded n times, each time by at most u = eps / 2 of what
stands there so far. Processors differ in the order of the terms, in how many
they sum side by side, and in whether a product is rounded before it is added.
The roundings are as good as independent and of either sign, so that a sum errs
by u * sqrt(n) times the root of the sum of its squared terms (Higham and Mary,
doi 10.1137/18M1226312). That is what the exact function does where each number
that goes in is moved by a relative step of u * sqrt(n) at random. So the
function itself says how large its terms are and how errors grow on their way:
it is called again with moved numbers, and the largest change is what rounding
may do. What comes out is a sum itself, which is rounded even where moved
numbers change nothing, as at a maximum.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Two results err, neither of them like the moved one, and of many numbers the
# one that is farthest off is compared.
_SAFETY = 8
_DRAWS = 3


def of_sums(
    function: Callable[..., Any], inputs: Any, length: int
) -> list[float]:
  """The largest difference that rounding may make in each output.

  Args:
    function: of `*inputs`, any tree of arrays out; on real numbers a result
      must not jump.
    inputs: arrays of one floating dtype, in which the sums are made.
    length: terms of the longest sum, n.

  Returns:
    One absolute bound for each leaf of what `function` returns.
  """
  leaves, structure = jax.tree.flatten(tuple(inputs))
  leaves = [np.asarray(x) for x in leaves]
  (dtype,) = {x.dtype for x in leaves}
  step = np.finfo(dtype).eps / 2 * length**0.5
  numbers = np.random.default_rng(0)
  moved = lambda x: (x * (1 + step * numbers.standard_normal(x.shape))).astype(
      dtype
  )
  call = lambda arrays: [
      np.asarray(x, np.float64)
      for x in jax.tree.leaves(function(*structure.unflatten(arrays)))
  ]
  base, bounds = call(leaves), None
  for _ in range(_DRAWS):
    found = call([moved(x) for x in leaves])
    change = [np.max(np.abs(a - b)) for a, b in zip(found, base, strict=True)]
    bounds = np.maximum(change, change if bounds is None else bounds)
  return [
      float(_SAFETY * bound + step * np.max(np.abs(x)))
      for bound, x in zip(bounds, base, strict=True)
  ]


def assert_close(got: Any, want: Any, bounds: list[float]) -> None:
  """Equal trees but for rounding.

  Args:
    got: a tree of arrays.
    want: another.
    bounds: of `of_sums`, one for each leaf. They must be small beside what is
      compared, or the test could not fail.
  """
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), bounds, strict=True)
  for x, like, bound in pairs:
    assert bound < 0.01 * np.abs(like).max()
    np.testing.assert_allclose(x, like, rtol=0, atol=bound)
