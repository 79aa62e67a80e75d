"""Held-out rows that choose the best checkpoint, apart from those compared."""

import dataclasses

import numpy as np

from ma_rlhf_jax.data.parts import Datasets

_SHARE = 4  # one in so many held-out rows chooses, at least two


def _choosing(prompts: list[tuple[int, ...]], seed: int) -> list[int]:
  """Rows of a quarter of the prompts; a prompt takes all of its rows along."""
  rows: dict[tuple[int, ...], list[int]] = {}
  for row, prompt in enumerate(prompts):
    rows.setdefault(prompt, []).append(row)
  groups = list(rows.values())
  order = np.random.default_rng(seed).permutation(len(groups))
  room = max(2, len(prompts) // _SHARE)
  chosen: list[int] = []
  for group in (groups[i] for i in order):
    if len(chosen) + len(group) <= room:
      chosen += group
  return sorted(chosen or min(groups, key=len))


def divided(data: Datasets, seed: int) -> Datasets:
  """`data` whose `eval` rows choose, and share no prompt with those compared.

  A checkpoint that is the best of several on some prompts owes a part of its
  score to chance, which a comparison on the same prompts would count.

  Args:
    data: `eval` holds all held-out rows.
    seed: of the division, which depends on it and on the prompts alone.

  Raises:
    ValueError: if a choice and an interval on other prompts need more rows.
  """
  total = len(data.eval)
  prompts = [tuple(data.eval.prompt[row].tolist()) for row in range(total)]
  choosing = _choosing(prompts, seed)
  compared = np.setdiff1d(np.arange(total), choosing)
  if len(compared) < 2:
    raise ValueError(
        f'{total} held-out rows of {len(set(prompts))} prompts are too few to '
        'choose the best checkpoint on some prompts and to compare it on at '
        'least 2 others; give more rows, more data.eval_rows, or '
        "export.which='last' in this run and in those that it starts from"
    )
  fates = {
      'choose the best checkpoint': len(choosing),
      'are left for the comparison': len(compared),
  }
  return dataclasses.replace(
      data,
      eval=data.eval.take(choosing),
      apart=data.eval.take(compared),
      counts=data.counts | {'eval': data.counts.get('eval', {}) | fates},
  )
