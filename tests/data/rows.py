"""Three tokenised rows, and equality of sets and batches, for the tests."""

import dataclasses

import numpy as np

from ma_rlhf_jax.data.encoding import EncodedSet, Ragged

PAD, EOS, BOS = 0, 1, 2


def encoded_set(rows: list[tuple[list[int], list[int], list[int]]]) -> object:
  """An EncodedSet of (prompt, chosen, rejected) ids."""
  prompt, chosen, rejected = zip(*rows, strict=True)
  return EncodedSet(
      prompt=Ragged.of(prompt),
      chosen=Ragged.of(chosen),
      rejected=Ragged.of(rejected),
      chosen_truncated=np.array([row[-1] != EOS for row in chosen]),
      rejected_truncated=np.array([row[-1] != EOS for row in rejected]),
  )


DATA = encoded_set(
    [
        ([2, 7], [8, 1], [9, 10, 1]),
        ([2], [1], [11, 12, 13]),
        ([2, 3, 4], [5, 6, 1], [14, 1]),
    ]
)


def assert_same(a: object, b: object) -> None:
  for x, y in zip(arrays(a), arrays(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def arrays(value: object) -> list[np.ndarray]:
  if isinstance(value, np.ndarray):
    return [value]
  fields = [getattr(value, f.name) for f in dataclasses.fields(value)]
  return [array for field in fields for array in arrays(field)]
