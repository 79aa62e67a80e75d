"""Fixed-shape batches, made by NumPy on the host.

The position in the data is a function of seed and step (`rows_of_step`), and
every batch has the layout that `masking.py` draws.
"""

from collections.abc import Sequence

import numpy as np

from ma_rlhf_jax.data.encoding import EncodedSet, Ragged
from ma_rlhf_jax.structs import PairBatch, PromptBatch, SequenceBatch


def rows_of_step(
    seed: int, step: int, *, size: int, batch_size: int
) -> np.ndarray:
  """The rows of one batch, a function of seed and step alone.

  Epochs follow each other without a gap, each in an order of its own, and a
  batch may reach over into the next. So every row comes once an epoch; a row
  may come twice in a batch only where the batch holds parts of two epochs.

  Args:
    seed: of the orders.
    step: batch number, from 0.
    size: rows in the set, > 0.
    batch_size: rows in a batch; may exceed `size`.

  Returns:
    int64 [batch_size].
  """
  epoch, place = np.divmod(
      np.arange(step * batch_size, (step + 1) * batch_size), size
  )
  orders = {
      e: np.random.default_rng([seed, e]).permutation(size)
      for e in np.unique(epoch).tolist()
  }
  return np.asarray(
      [orders[e][p] for e, p in zip(epoch.tolist(), place, strict=True)],
      dtype=np.int64,
  )


def _pad(
    ragged: Ragged, rows: Sequence[int], width: int, pad_id: int, side: str
) -> tuple[np.ndarray, np.ndarray]:
  """int32 tokens and bool mask [rows, width], padded on `side`."""
  tokens = np.full((len(rows), width), pad_id, dtype=np.int32)
  mask = np.zeros((len(rows), width), dtype=bool)
  for place, row in enumerate(rows):
    ids = ragged[row]
    start = width - len(ids) if side == 'left' else 0
    if start < 0 or len(ids) > width:
      raise ValueError(f'row {row} has {len(ids)} tokens; {width} are allowed')
    tokens[place, start : start + len(ids)] = ids
    mask[place, start : start + len(ids)] = True
  return tokens, mask


def prompt_batch(
    data: EncodedSet,
    rows: Sequence[int],
    *,
    prompt_len: int,
    pad_id: int,
    sample_ids: Sequence[int] | None = None,
) -> PromptBatch:
  """Prompts of `rows`, padded on the left to `prompt_len`.

  Args:
    data: where the rows are.
    rows: their indices, which become the prompt ids.
    prompt_len: P, tokens.
    pad_id: on padding.
    sample_ids: which sample of its prompt each row is; None = 0 for all.
  """
  tokens_BP, mask_BP = _pad(data.prompt, rows, prompt_len, pad_id, 'left')
  samples = np.zeros(len(rows)) if sample_ids is None else sample_ids
  return PromptBatch(
      tokens_BP=tokens_BP,
      mask_BP=mask_BP,
      prompt_ids_B=np.asarray(rows, dtype=np.int32),
      sample_ids_B=np.asarray(samples, dtype=np.int32),
  )


def _sequences(
    prompt: tuple[np.ndarray, np.ndarray],
    response: tuple[np.ndarray, np.ndarray],
) -> SequenceBatch:
  return SequenceBatch(
      tokens_BL=np.concatenate([prompt[0], response[0]], axis=1),
      mask_BL=np.concatenate([prompt[1], response[1]], axis=1),
      response_mask_BT=response[1],
  )


def pair_batch(
    data: EncodedSet,
    rows: Sequence[int],
    *,
    prompt_len: int,
    response_len: int,
    pad_id: int,
) -> PairBatch:
  """Both responses of `rows` in the layout of `masking`; see `sft_batch`."""
  prompt = _pad(data.prompt, rows, prompt_len, pad_id, 'left')
  chosen = _pad(data.chosen, rows, response_len, pad_id, 'right')
  rejected = _pad(data.rejected, rows, response_len, pad_id, 'right')
  return PairBatch(
      chosen=_sequences(prompt, chosen), rejected=_sequences(prompt, rejected)
  )


def sft_batch(
    data: EncodedSet,
    rows: Sequence[int],
    *,
    prompt_len: int,
    response_len: int,
    pad_id: int,
) -> SequenceBatch:
  """Prompts and chosen responses of `rows` in the layout of `masking`.

  Args:
    data: where the rows are.
    rows: their indices.
    prompt_len: P, tokens; prompts are padded on the left.
    response_len: T, tokens; responses are padded on the right.
    pad_id: on padding.
  """
  prompt = _pad(data.prompt, rows, prompt_len, pad_id, 'left')
  chosen = _pad(data.chosen, rows, response_len, pad_id, 'right')
  return _sequences(prompt, chosen)
