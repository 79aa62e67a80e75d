"""Prompts of any length -> batches of few shapes, and the key of each row.

Each width is a program to compile, so prompts are padded to one of a few. A
row's width depends on its own prompt alone, and batches that lack rows are
filled up, so that a row is computed alike whatever stands beside it.
"""

from collections.abc import Sequence
import hashlib
from typing import NamedTuple

import numpy as np

from ma_rlhf_jax.structs import PromptBatch

_NARROWEST = 32  # tokens


def width(length: int) -> int:
  """The columns of a prompt of so many tokens: 32, 64, 128, ..."""
  return max(_NARROWEST, 1 << (length - 1).bit_length())


class Item(NamedTuple):
  """One response to draw.

  Attributes:
    row: index of its prompt.
    sample: which of several responses to that prompt.
  """

  row: int
  sample: int


class Batch(NamedTuple):
  """What is drawn together.

  Attributes:
    width: prompt columns.
    items: at least one, at most as many as a batch has rows.
  """

  width: int
  items: list[Item]


def plan(
    lengths: Sequence[int], num_samples: int, batch_size: int
) -> list[Batch]:
  """Batches that hold every sample of every prompt once.

  The longest come first: what does not fit in memory shows at once, and the
  time that is left is not promised too short.

  Args:
    lengths: tokens of each prompt.
    num_samples: responses to each.
    batch_size: rows of a batch.
  """
  by_width: dict[int, list[Item]] = {}
  for row in np.argsort(-np.asarray(lengths), kind='stable').tolist():
    items = by_width.setdefault(width(lengths[row]), [])
    items += [Item(row, sample) for sample in range(num_samples)]
  return [
      Batch(columns, items[start : start + batch_size])
      for columns, items in by_width.items()
      for start in range(0, len(items), batch_size)
  ]


def prompt_keys(prompts: Sequence[Sequence[int]]) -> list[int]:
  """A number in [0, 2^31) for each prompt, of its ids alone.

  It takes the place of a row number in the random key, so that a prompt gets
  the same response in any file. Where a prompt comes again, its second, third,
  ... occurrence has a number of its own.
  """
  seen: dict[bytes, int] = {}
  keys = []
  for prompt in prompts:
    data = np.asarray(prompt, '<i4').tobytes()
    occurrence = seen[data] = seen.get(data, -1) + 1
    data += b'#%d' % occurrence
    keys.append(int.from_bytes(hashlib.sha256(data).digest()[:4]) >> 1)
  return keys


def prompt_batch(
    batch: Batch,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    *,
    rows: int,
    pad_id: int,
) -> PromptBatch:
  """The arrays of a batch, on the host.

  Rows that are missing repeat the last one, which ends when it ends.

  Args:
    batch: which prompts.
    prompts: ids of all of them.
    keys: `prompt_keys` of all of them.
    rows: of the arrays, B.
    pad_id: on the padding, which is on the left.
  """
  items = [*batch.items, *batch.items[-1:] * (rows - len(batch.items))]
  tokens_BP = np.full((rows, batch.width), pad_id, np.int32)
  mask_BP = np.zeros((rows, batch.width), bool)
  for place, item in enumerate(items):
    ids = prompts[item.row]
    tokens_BP[place, batch.width - len(ids) :] = ids
    mask_BP[place, batch.width - len(ids) :] = True
  return PromptBatch(
      tokens_BP=tokens_BP,
      mask_BP=mask_BP,
      prompt_ids_B=np.asarray([keys[i.row] for i in items], np.int32),
      sample_ids_B=np.asarray([i.sample for i in items], np.int32),
  )
