"""The bound of rounding holds in any order of a sum, and shows a lost term."""

import numpy as np
import pytest

from tests import tolerance


@pytest.mark.parametrize('length', [30, 3000])
def test_the_bound_holds_in_any_order_and_a_lost_term_exceeds_it(
    length: int,
) -> None:
  numbers = np.random.default_rng(1)
  a, b = numbers.standard_normal((2, length)).astype(np.float32)
  dot = lambda a, b: np.sum(np.asarray(a, np.float64) * np.asarray(b))
  (bound,) = tolerance.of_sums(dot, (a, b), length)
  exact = dot(a, b)
  for lanes in (1, 2, 3, 5, 10):  # summed side by side, as processors do
    order = numbers.permutation(length)
    terms = (a * b)[order].reshape(-1, lanes)
    partial = np.zeros(lanes, np.float32)
    for row in terms:
      partial += row
    total = np.float32(0)
    for lane in partial:
      total += lane
    assert abs(total - exact) < bound
  # A thousandth of one standard deviation of a term is more than rounding.
  assert bound < 1e-3 * (length / 30)


def test_each_output_has_the_bound_of_its_own_size() -> None:
  x = np.linspace(1, 2, 50, dtype=np.float32)
  both = lambda x: {'large': 1000 * np.sum(x), 'small': np.sum(x)}
  large, small = tolerance.of_sums(both, (x,), 50)
  assert 500 < large / small < 2000
  # 2**-24 * sqrt(50) * sqrt(sum of squares, 117), eight times: 3.6e-5; and
  # 2**-24 * sqrt(50) * 75: 3.2e-5
  assert 4e-6 < small < 1.2e-4


def test_a_maximum_is_rounded_though_moved_numbers_do_not_change_it() -> None:
  x = np.linspace(1, 2, 50, dtype=np.float32)
  flat = lambda x: 3 + 0 * np.sum(x)
  (bound,) = tolerance.of_sums(flat, (x,), 50)
  assert 1e-6 < bound < 2e-6  # 3 * 2**-24 * sqrt(50) = 1.3e-6
