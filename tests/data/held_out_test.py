"""Which held-out prompts choose the best checkpoint, and which are compared."""

import numpy as np
import pytest

from ma_rlhf_jax.data import held_out
from ma_rlhf_jax.data.encoding import EncodedSet, Ragged
from ma_rlhf_jax.data.parts import Datasets
from tests.data.rows import assert_same


def _data(prompts: list[int]) -> Datasets:
  """Held-out rows; equal numbers are equal prompts. `chosen` names the row."""
  flags = np.arange(len(prompts)) % 2 == 0
  rows = EncodedSet(
      prompt=Ragged.of([[2] * (1 + p % 3) + [3 + p] for p in prompts]),
      chosen=Ragged.of([[100 + row] for row in range(len(prompts))]),
      rejected=Ragged.of([[5, 6]] * len(prompts)),
      chosen_truncated=flags,
      rejected_truncated=~flags,
  )
  return Datasets(rows, rows, rows, rows, {'eval': {'kept': len(prompts)}})


def _rows(rows: EncodedSet) -> list[int]:
  return [int(rows.chosen[i][0]) - 100 for i in range(len(rows))]


@pytest.mark.parametrize(
    'total, choosing',
    [(4, 2), (7, 2), (8, 2), (12, 3), (16, 4), (256, 64), (2000, 500)],
)
def test_a_quarter_chooses_and_all_others_are_compared(
    total: int, choosing: int
) -> None:
  data = _data(list(range(total)))
  found = held_out.divided(data, seed=7)
  chosen, compared = _rows(found.eval), _rows(found.comparison)
  assert len(chosen) == choosing
  assert sorted(chosen + compared) == list(range(total))
  assert_same(found.eval, data.eval.take(chosen))
  assert found.counts['eval'] == {
      'kept': total,
      'choose the best checkpoint': choosing,
      'are left for the comparison': total - choosing,
  }


def test_undivided_rows_are_all_compared() -> None:
  data = _data([0, 1, 2])
  assert data.comparison is data.eval and data.eval_mark == ''


def test_a_prompt_is_on_one_side_with_all_of_its_rows() -> None:
  prompts = [0, 1, 2, 0, 3, 1, 4, 5, 6, 0, 7, 8]
  for seed in range(20):
    found = held_out.divided(_data(prompts), seed)
    chosen, compared = (
        {prompts[row] for row in _rows(part)}
        for part in (found.eval, found.comparison)
    )
    assert not chosen & compared
    assert 1 <= len(found.eval) <= 3  # a quarter of 12
    assert len(found.eval) + len(found.comparison) == 12


def test_the_seed_alone_decides() -> None:
  data = _data(list(range(40)))
  first, again, other = (held_out.divided(data, seed) for seed in (3, 3, 4))
  assert _rows(first.eval) == _rows(again.eval) != _rows(other.eval)
  assert first.eval_mark == again.eval_mark != other.eval_mark
  assert first.eval_mark.startswith(' on ')
  assert _rows(first.eval) != list(range(10))  # not the first ones


def test_where_no_prompt_fits_the_quarter_the_one_of_least_rows_chooses() -> (
    None
):
  found = held_out.divided(_data([0, 0, 0, 0, 1, 1, 1]), seed=0)
  assert _rows(found.eval) == [4, 5, 6]


@pytest.mark.parametrize('prompts', [[0, 1], [0, 1, 2], [4] * 9])
def test_too_few_prompts_are_refused_with_what_helps(
    prompts: list[int],
) -> None:
  with pytest.raises(ValueError, match='data.eval_rows.*export.which') as error:
    held_out.divided(_data(prompts), seed=0)
  assert f'{len(prompts)} held-out rows' in str(error.value)
  assert f'{len(set(prompts))} prompts' in str(error.value)
