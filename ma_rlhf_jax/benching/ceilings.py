"""What this device can do at best: measured first, so that shares mean it."""

from collections.abc import Callable
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Ceilings(NamedTuple):
  """Of one device.

  Attributes:
    matmul: FLOP/s of a large matmul in the compute dtype.
    memory: bytes/s, read and written, of a copy.
  """

  matmul: float
  memory: float


def seconds(function: Callable[..., Any], *args: Any, runs: int = 5) -> float:
  """Median seconds of a call, after one that compiles."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(runs):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def measure(dtype: str) -> Ceilings:
  """The ceilings of the first device, matmuls in `dtype`; some seconds."""
  small = jax.default_backend() == 'cpu'
  size, repeats = (1024, 2) if small else (8192, 10)
  x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)

  @jax.jit
  def multiply(x: jax.Array) -> jax.Array:
    # Random data: of zeros a GPU draws less power, and runs faster.
    return jax.lax.fori_loop(0, repeats, lambda _, y: (x @ y) * 0.01, x)

  numbers = (1 << 26) if small else (1 << 30)
  y = jnp.ones(numbers, jnp.float32)
  copy = jax.jit(lambda y: y + 1)
  return Ceilings(
      matmul=2 * repeats * size**3 / seconds(multiply, x),
      memory=2 * y.nbytes / seconds(copy, y),
  )
