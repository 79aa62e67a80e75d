"""Which checkpoints of a stage stay on disk."""

from collections.abc import Sequence
from typing import Any


def best(steps: Sequence[int], quality: dict[int, float]) -> int | None:
  """The step of the highest quality, the newest of equals; None if none."""
  rated = [step for step in steps if step in quality]
  return max(rated, key=lambda s: (quality[s], s), default=None)


class NewestAndBest:
  """Orbax preservation policy: the `keep` newest steps and the best one."""

  def __init__(self, keep: int, quality: dict[int, float]) -> None:
    self._keep = keep
    self._quality = quality

  def should_preserve(
      self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Whether each of `checkpoints`, oldest first, stays on disk."""
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = {*steps[-self._keep :], best(steps, self._quality)}
    return [step in kept for step in steps]
