"""The newest steps and the best one stay."""

import types

from ma_rlhf_jax.training import kept_steps


def test_the_best_is_the_newest_of_equals() -> None:
  assert kept_steps.best([1, 2, 3, 4], {1: 0.5, 2: 0.7, 3: 0.7}) == 3
  assert kept_steps.best([1, 2], {3: 9.0}) is None


def test_the_newest_and_the_best_are_kept() -> None:
  found = [types.SimpleNamespace(step=step) for step in (2, 4, 6, 8)]
  policy = kept_steps.NewestAndBest(2, {2: 0.1, 4: 0.9, 8: 0.3})
  assert policy.should_preserve(found, context=None) == [
      False,
      True,
      True,
      True,
  ]
