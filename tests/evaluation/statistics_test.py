"""Intervals by hand, and at their edges; how often they hold: coverage_test."""

import numpy as np
import pytest

from ma_rlhf_jax.evaluation import statistics

# 97.5 % quantiles of Student's t, from a printed table.
T_1, T_2, T_3, T_7, T_259 = 12.7062, 4.30265, 3.18245, 2.36462, 1.96918


def test_symmetric_numbers_get_the_t_interval() -> None:
  # mean 2.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5 / 3
  half = T_3 * np.sqrt(5 / 3 / 4)
  found = statistics.mean_interval(np.asarray([4.0, 2.0, 1.0, 3.0]))
  np.testing.assert_allclose(found, (2.5, 2.5 - half, 2.5 + half), rtol=1e-5)


def test_a_long_tail_widens_only_its_own_end() -> None:
  # mean 1, variance (1 + 1 + 1 + 9) / 3 = 4, third moment (-3 + 27) / 4 = 6
  # skew 16 / 6 * 6 / 8 = 2, y = T_3 / 2 = 1.591225
  x_N = np.asarray([0.0, 0.0, 0.0, 4.0])
  low, high = 1 - T_3, 1 + T_3
  # g^-1(-y) = 3 (cbrt(1 + 2 (-1.591225 - 2 / 24)) - 1) / 2 = -3.494029
  found = statistics.mean_interval(x_N)
  assert found == pytest.approx((1, low, 1 + 2 * 3.494029), rel=1e-5)
  assert found[2] > high
  mirrored = statistics.mean_interval(-x_N)
  np.testing.assert_allclose(mirrored, (-1, -found[2], -low), rtol=1e-5)


def test_the_inverse_undoes_the_transformation() -> None:
  x_N = np.random.default_rng(0).exponential(size=40)
  mean, low, high = statistics.mean_interval(x_N)
  apart_N = x_N - mean
  std = np.sqrt((apart_N**2).sum() / 39)
  skew = 40 / (39 * 38) * (apart_N**3).sum() / std**3
  t = (mean - high) / std
  g = t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 240
  assert g * np.sqrt(40) == pytest.approx(-2.02269, rel=1e-4)
  # The lower end is that of t.
  assert (mean - low) / std * np.sqrt(40) == pytest.approx(2.02269, rel=1e-4)


def test_two_numbers_have_an_interval_and_equal_ones_no_width() -> None:
  # mean 2, std sqrt(2), over sqrt(2): 1
  found = statistics.mean_interval(np.asarray([1.0, 3.0]))
  np.testing.assert_allclose(found, (2, 2 - T_1, 2 + T_1), rtol=1e-5)
  equal = statistics.mean_interval(np.asarray([2.5, 2.5, 2.5]))
  assert equal == (2.5, 2.5, 2.5)


def test_a_unit_scales_and_a_shift_moves_the_interval() -> None:
  x_N = np.random.default_rng(1).gamma(0.5, size=20)
  found = np.asarray(statistics.mean_interval(x_N))
  moved = statistics.mean_interval(1e3 * x_N + 7)
  np.testing.assert_allclose(moved, 1e3 * found + 7, rtol=1e-9)


def test_four_values_are_added_to_those_with_bounds() -> None:
  # 1 1 0.5 0 and 0 0 1 1: mean 4.5 / 8, squares 4.25, variance
  # (4.25 - 4.5^2 / 8) / 7 = 0.2455357
  half = T_7 * np.sqrt(0.2455357 / 8)
  found = statistics.bounded_interval(np.asarray([1.0, 1.0, 0.5, 0.0]))
  want = 0.625, 0.5625 - half, 0.5625 + half
  np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize('end', [0.0, 1.0])
def test_256_of_256_leave_room_for_what_was_not_seen(end: float) -> None:
  mean, low, high = statistics.bounded_interval(np.full(256, end))
  # 258 and 2 of 260: variance (258 - 258^2 / 260) / 259 = 0.00766261
  width = 2 / 260 + T_259 * np.sqrt(0.00766261 / 260)
  want = (1, 1 - width, 1) if end else (0, 0, width)
  np.testing.assert_allclose((mean, low, high), want, rtol=1e-5)
  assert 0.01 < high - low < 0.02


def test_differences_of_shares_have_bounds_of_their_own() -> None:
  found = statistics.bounded_interval(np.zeros(256), -1.0, 1.0)
  # 256 times 0 and two of -1 and 1: variance 4 / 259
  half = T_259 * np.sqrt(4 / 259 / 260)
  np.testing.assert_allclose(found, (0, -half, half), rtol=1e-5, atol=1e-12)
  ones = statistics.bounded_interval(np.ones(2), -1.0, 1.0)
  assert ones[0] == ones[2] == 1 and -1 < ones[1] < 1


@pytest.mark.parametrize('size', [2, 3, 8, 256])
def test_the_mean_is_inside_and_the_bounds_outside(size: int) -> None:
  random = np.random.default_rng(size)
  for chance in (0, 0.02, 0.5, 0.9, 1):
    for _ in range(20):
      x_N = random.choice([0.0, 0.5, 1.0], size, p=(1 - chance, 0, chance))
      mean, low, high = statistics.bounded_interval(x_N)
      assert 0 <= low <= mean <= high <= 1 and low < high
      mean, low, high = statistics.mean_interval(x_N)
      assert low <= mean <= high


def test_many_samples_are_one_call() -> None:
  x_RN = np.random.default_rng(2).random((5, 4, 9))
  low, high = statistics.mean_limits(x_RN)
  assert low.shape == high.shape == (5, 4)
  _, *want = statistics.mean_interval(x_RN[3, 2])
  np.testing.assert_allclose((low[3, 2], high[3, 2]), want, rtol=1e-12)
  low, high = statistics.bounded_limits(x_RN, 0.0, 1.0)
  _, *want = statistics.bounded_interval(x_RN[3, 2])
  np.testing.assert_allclose((low[3, 2], high[3, 2]), want, rtol=1e-12)
