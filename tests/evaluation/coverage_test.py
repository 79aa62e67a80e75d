"""How often the 95 % intervals hold the true value, by simulation.

The mean over a grid of sizes and distributions must be at least 94.5 %, and
the worst cell is stated. Of many drawn samples those with the same count of
each value are computed once.
"""

from collections.abc import Callable, Iterator
import dataclasses

import numpy as np
import pytest

from ma_rlhf_jax.evaluation import statistics

_SIZES = (8, 16, 32, 64, 256, 1024, 2000)
_LEAST_MEAN = 0.945
Limits = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Cell:
  """One distribution and one size, and how often its mean was held."""

  size: int
  name: str
  coverage: float


def _held(limits: Limits, x_RN: np.ndarray, mean: float) -> np.ndarray:
  low, high = limits(x_RN)
  return (low <= mean + 1e-12) & (mean - 1e-12 <= high)


def _of_counts(
    limits: Limits,
    values: tuple[float, ...],
    chances: tuple[float, ...],
    size: int,
    samples: int,
) -> float:
  """The coverage for values drawn with these chances, in blocks of rows."""
  random = np.random.default_rng(size)
  drawn = random.multinomial(size, chances, size=samples)
  counts, times = np.unique(drawn, axis=0, return_counts=True)
  mean = float(np.dot(values, chances))
  held = [
      _held(limits, np.stack([np.repeat(values, c) for c in block]), mean)
      for block in np.array_split(counts, 1 + len(counts) * size // 10**6)
  ]
  return float(times @ np.concatenate(held)) / samples


def _wins(size: int) -> Iterator[tuple[str, tuple[float, ...]]]:
  """Losses, ties, wins: rates from 0.5, no ties up to nothing but ties."""
  for rate in (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0):
    for share in (0.0, 0.1, 0.5, 1.0) if rate < 1 else (0.0,):
      ties = share * 2 * (1 - rate)
      lost = max(0.0, 1 - rate - ties / 2)
      yield f'p={rate} ties={ties:.3f}', (lost, ties, 1 - lost - ties)


def _shares(size: int) -> Iterator[tuple[str, tuple[float, ...]]]:
  for name, (lost, ties, won) in _wins(size):
    if not ties:
      yield name, (lost, won)


def _differences(size: int) -> Iterator[tuple[str, tuple[float, ...]]]:
  """-1, 0, 1: a difference, and how often pairs differ both ways beside it."""
  for difference in (0.0, 0.005, 0.01, 0.02, 0.05, 0.2, 0.5, 0.9, 1.0):
    for both in (0.0, 0.005, 0.02, 0.1, 0.5):
      up, down = difference + both / 2, both / 2
      if up + down <= 1:
        name = f'p={difference} both ways={both}'
        yield name, (down, max(0.0, 1 - up - down), up)


_COUNTED = {
    'win rate': (
        lambda x: statistics.bounded_limits(x, 0.0, 1.0),
        (0.0, 0.5, 1.0),
        _wins,
    ),
    'share': (
        lambda x: statistics.bounded_limits(x, 0.0, 1.0),
        (0.0, 1.0),
        _shares,
    ),
    'difference of shares': (
        lambda x: statistics.bounded_limits(x, -1.0, 1.0),
        (-1.0, 0.0, 1.0),
        _differences,
    ),
}

# Distributions of numbers without bounds, and their means.
_Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
_NUMBERS: dict[str, tuple[_Draw, float]] = {
    'normal': (lambda r, s: r.standard_normal(s), 0.0),
    'exponential': (lambda r, s: r.exponential(size=s), 1.0),
    'gamma 2': (lambda r, s: r.gamma(2.0, size=s), 2.0),
    'gamma 0.5': (lambda r, s: r.gamma(0.5, size=s), 0.5),
    'log-normal 0.5': (lambda r, s: r.lognormal(0, 0.5, s), np.exp(0.125)),
    'log-normal 1': (lambda r, s: r.lognormal(0, 1, s), np.exp(0.5)),
    'two points 0.5': (lambda r, s: 1.0 * (r.random(s) < 0.5), 0.5),
    'two points 0.8': (lambda r, s: 1.0 * (r.random(s) < 0.8), 0.8),
    'two points 0.9': (lambda r, s: 1.0 * (r.random(s) < 0.9), 0.9),
}
# Paired differences: of two like models, and of one with a longer tail.
_NUMBERS |= {
    'difference of normals': (
        lambda r, s: r.normal(1, 2, s) - r.normal(0, 1, s),
        1.0,
    ),
    'difference of exponentials': (
        lambda r, s: r.exponential(size=s) - r.exponential(size=s),
        0.0,
    ),
    'log-normal less normal': (
        lambda r, s: r.lognormal(0, 1, s) - r.standard_normal(s),
        np.exp(0.5),
    ),
}


def _counted(
    kind: str, sizes: tuple[int, ...] = _SIZES, samples: int = 20000
) -> list[Cell]:
  limits, values, chances = _COUNTED[kind]
  return [
      Cell(n, name, _of_counts(limits, values, chance, n, samples))
      for n in sizes
      for name, chance in chances(n)
  ]


def _of_numbers(
    limits: Limits, sizes: tuple[int, ...] = _SIZES, samples: int = 10000
) -> list[Cell]:
  cells = []
  for name, (draw, mean) in _NUMBERS.items():
    for size in sizes:
      random = np.random.default_rng(size)
      blocks = max(1, samples * size // 10**6)
      held = [
          _held(limits, draw(random, (samples // blocks, size)), mean)
          for _ in range(blocks)
      ]
      cells.append(Cell(size, name, float(np.mean(held))))
  return cells


def _mean(cells: list[Cell]) -> float:
  return float(np.mean([cell.coverage for cell in cells]))


def _worst(cells: list[Cell]) -> Cell:
  return min(cells, key=lambda cell: cell.coverage)


def _normal_limits(x_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """What a share must not get: 1.96 standard errors to either side."""
  half = 1.959964 * np.std(x_N, axis=-1, ddof=1) / np.sqrt(x_N.shape[-1])
  mean = np.mean(x_N, axis=-1)
  return mean - half, mean + half


@pytest.mark.parametrize('rate, want', [(0.98, 0.89), (0.995, 0.72)])
def test_the_simulation_finds_intervals_that_miss(
    rate: float, want: float
) -> None:
  # 0.995^256 = 0.28 of the samples are all wins, and get [1, 1].
  chances = 1 - rate, rate
  found = _of_counts(_normal_limits, (0.0, 1.0), chances, 256, 4000)
  assert found == pytest.approx(want, abs=0.02)


@pytest.mark.parametrize('kind', _COUNTED)
def test_intervals_with_bounds_hold_for_few_and_for_256(kind: str) -> None:
  cells = _counted(kind, sizes=(8, 256), samples=1000)
  assert _mean(cells) >= _LEAST_MEAN
  assert _worst(cells).coverage >= 0.92  # 1000 samples are right to 0.007


def test_intervals_of_means_hold_for_32_and_256() -> None:
  cells = _of_numbers(statistics.mean_limits, sizes=(32, 256), samples=1000)
  assert _mean(cells) >= _LEAST_MEAN
  assert _worst(cells).coverage >= 0.92
  plain = _of_numbers(statistics.t_limits, sizes=(32, 256), samples=1000)
  assert _mean(plain) < _mean(cells)


# kind -> the worst cell of 20,000 samples each (right to 0.0016): its coverage,
# n and p. All means are above 0.973.
_WORST = {
    'win rate': (0.942, 1024, 'p=0.995 ties=0.010'),
    'share': (0.944, 1024, 'p=0.95 ties=0.000'),
    'difference of shares': (0.942, 64, 'p=0.5 both ways=0.0'),
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', _COUNTED)
def test_intervals_with_bounds_hold_on_the_whole_grid(kind: str) -> None:
  cells = _counted(kind)
  assert _mean(cells) >= _LEAST_MEAN
  worst = _worst(cells)
  coverage, *where = _WORST[kind]
  assert worst.coverage == pytest.approx(coverage, abs=0.001)
  assert [worst.size, worst.name] == where


@pytest.mark.slow
def test_intervals_of_means_hold_on_the_whole_grid() -> None:
  cells = _of_numbers(statistics.mean_limits)
  assert _mean(cells) >= _LEAST_MEAN
  # 0.9^8 = 0.43 of the samples are one value eight times. Without bounds that
  # says nothing of the other value, whatever the interval.
  worst = _worst(cells)
  assert (worst.size, worst.name) == (8, 'two points 0.9')
  assert worst.coverage == pytest.approx(0.564, abs=0.002)
  rest = _worst([cell for cell in cells if 'two' not in cell.name])
  assert (rest.size, rest.name) == (8, 'log-normal 1')
  assert rest.coverage == pytest.approx(0.914, abs=0.002)
