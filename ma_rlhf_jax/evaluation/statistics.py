"""95 % intervals of the means that are printed and written.

A mean of numbers gets `mean_interval`. Shares, win rates and the paired
difference of two shares have values with bounds, most of them at a bound, and
get `bounded_interval`. How often they hold the true value, simulated for n from
8 to 2000 (tests/evaluation/coverage_test.py; p is the true value):

  interval               mean     worst
  win rate               97.4 %   94.2 % (n = 1024, p = 0.995, 1 % ties)
  share                  97.6 %   94.4 % (n = 1024, p = 0.95)
  difference of shares   97.7 %   94.2 % (n = 64, p = 0.5)
  mean                   94.8 %   91.4 % (n = 8, log-normal); and 56.4 %
                                  (n = 8) where numbers take two values and
                                  eight often show the commoner one only
"""

import numpy as np
from scipy import special

_LEVEL = 0.975  # the upper end of a two-sided interval of 95 %
Interval = tuple[float, float, float]


def t_limits(x_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(low, high) of Student's t interval of the mean over the last axis."""
  mean, std, _ = _moments(x_N)
  half = _quantile(x_N) * std
  return mean - half, mean + half


def mean_limits(x_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(low, high) of the mean: the t interval, wider toward a long tail.

  The t interval of skewed numbers often ends short of the true mean: that of
  eight log-normal numbers in 17 % of the cases. Hall's transformation

    g(t) = t + skew t^2 / 3 + skew^2 t^3 / 27 + skew / (6 N)

  of the t statistic (here without its factor sqrt(N)) takes the skewness out,
  and its inverse gives limits of its own. Each end is the outer one of these
  and of the t interval; symmetric numbers get the t interval itself. Numbers
  that are all equal get no width: they do not show which values are rare.

  Args:
    x_N: float [..., N], N >= 2.

  Source: Hall 1992, On the Removal of Skewness by Transformation; the quantile
    is that of t instead of the normal distribution.
  """
  mean, std, skew = _moments(x_N)
  low, high = t_limits(x_N)
  quantile = _quantile(x_N)
  ends = [
      mean - std * _unskewed(sign * quantile, skew, np.shape(x_N)[-1])
      for sign in (1, -1)
  ]
  return np.minimum(low, ends[0]), np.maximum(high, ends[1])


def bounded_limits(
    x_N: np.ndarray, low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
  """(low, high) of the mean of values between two bounds.

  The t interval of the values and of four more, two at each bound. So values
  that all lie at one bound still get a width, about 5 (high - low) / N.

  Args:
    x_N: float [..., N], N >= 1.
    low: the smallest possible value.
    high: the largest one.

  Source: Agresti and Coull 1998 for shares, which adds the same; values between
    the bounds (a tie is half a win) enter by the variance.
  """
  added = np.broadcast_to([low, low, high, high], (*np.shape(x_N)[:-1], 4))
  ends = t_limits(np.concatenate([x_N, added], axis=-1))
  return tuple(np.clip(end, low, high) for end in ends)


def mean_interval(x_N: np.ndarray) -> Interval:
  """(mean, low, high) of numbers without known bounds; see `mean_limits`."""
  low, high = mean_limits(x_N)
  return float(np.mean(x_N)), float(low), float(high)


def bounded_interval(
    x_N: np.ndarray, low: float = 0.0, high: float = 1.0
) -> Interval:
  """(mean, low, high) of values between two bounds; see `bounded_limits`."""
  ends = bounded_limits(x_N, low, high)
  return float(np.mean(x_N)), float(ends[0]), float(ends[1])


def _quantile(x_N: np.ndarray) -> float:
  """Of the t distribution, over the root of N."""
  size = np.shape(x_N)[-1]
  return float(special.stdtrit(size - 1, _LEVEL)) / np.sqrt(size)


def _moments(
    x_N: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Mean, standard deviation and skewness, the last two without bias.

  The skewness is 0 where all are equal, and of two numbers.
  """
  size = np.shape(x_N)[-1]
  mean = np.mean(x_N, axis=-1)
  apart_N = x_N - mean[..., None]
  std = np.std(x_N, axis=-1, ddof=1)
  third = np.mean(apart_N**3, axis=-1)
  if size < 3:
    return mean, std, np.zeros_like(mean)
  factor = size**2 / ((size - 1) * (size - 2))
  skew = factor * third / np.where(std > 0, std, 1.0) ** 3
  return mean, std, np.where(std > 0, skew, 0.0)


def _unskewed(y: float, skew: np.ndarray, size: int) -> np.ndarray:
  """The t whose transform g(t) is `y`, both over the root of N."""
  is_flat = np.abs(skew) < 1e-8  # there g is t itself
  skew = np.where(is_flat, 1.0, skew)
  root = np.cbrt(1.0 + skew * (y - skew / (6.0 * size)))
  return np.where(is_flat, y, 3.0 * (root - 1.0) / skew)
