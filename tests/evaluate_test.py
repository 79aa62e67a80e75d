"""The comparison of two policies: intervals, wins and the table by hand."""

import pathlib

import numpy as np
import pytest

from ma_rlhf_jax import evaluate
from ma_rlhf_jax.evaluate import describe, interval, summarise, wins
from ma_rlhf_jax.training.judge import Judged
from ma_rlhf_jax.training.products import SourceError
from tests import tiny


def _judged(**numbers: list[float]) -> Judged:
  arrays = {name: np.asarray(x, np.float64) for name, x in numbers.items()}
  return Judged(['p', 'q', 'r'], ['a', 'b', 'c'], arrays)


def test_the_interval_is_the_normal_one_of_the_mean() -> None:
  # variance (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5/3; 1.959964 * sqrt(5/3 / 4)
  # = 1.265151
  found = interval(np.asarray([4.0, 2.0, 1.0, 3.0]))
  np.testing.assert_allclose(found, (2.5, 1.234849, 3.765151), atol=1e-6)


def test_equal_numbers_have_an_interval_of_no_width() -> None:
  assert interval(np.asarray([2.5, 2.5, 2.5])) == (2.5, 2.5, 2.5)


def test_wins_count_ties_as_half() -> None:
  found = wins(np.asarray([3.0, -1.0, 2.0]), np.asarray([1.0, 2.0, 2.0]))
  assert found.tolist() == [1.0, 0.0, 0.5]


def test_differences_are_paired_by_prompt() -> None:
  rows = summarise(
      _judged(score=[1.0, 5.0, 9.0], gold=[0.5, 0.25, 0.0]),
      _judged(score=[2.0, 6.0, 10.0], gold=[0.75, 0.25, -0.5]),
  )
  assert sorted(rows) == ['gold', 'score', 'win rate by gold']
  # Each score is 1 higher, so the difference is sure though the means are not.
  assert rows['score']['difference'] == (1.0, 1.0, 1.0)
  assert rows['score']['sft'][0] == 5.0 and rows['score']['ppo'][0] == 6.0
  # std of 1, 5, 9 is 4; 1.959964 * 4 / sqrt(3) = 4.526343
  assert rows['score']['sft'][1] == pytest.approx(5 - 4.526343, abs=1e-6)
  # one win, one tie, one loss
  assert rows['win rate by gold']['ppo'][0] == 0.5
  assert rows['gold']['difference'][0] == pytest.approx((0.25 - 0.5) / 3)


def test_without_gold_the_reward_model_decides_who_wins() -> None:
  rows = summarise(_judged(score=[1.0, 5.0, 9.0]), _judged(score=[2.0, 6, 8]))
  assert sorted(rows) == ['score', 'win rate by score']
  assert rows['win rate by score']['ppo'][0] == pytest.approx(2 / 3)


def test_the_table_is_aligned_and_names_the_units() -> None:
  rows = {
      'kl': {
          'sft': (0.0, 0.0, 0.0),
          'ppo': (12.5, 11.25, 13.75),
          'difference': (12.5, 11.25, 13.75),
      },
      'win rate by gold': {'ppo': (0.75, 0.5, 1.0)},
  }
  big = '12.500 [11.250, 13.750]'  # 23 wide; the SFT cell is 20 wide
  assert describe(rows, 40).split('\n') == [
      '40 held-out prompts, mean [95 % interval], differences paired by prompt',
      f'{"":16}  {"SFT":20}  {"MA-PPO":23}  difference',
      f'kl{"":14}  0.000 [0.000, 0.000]  {big}  {big}  '
      'nats per response, from SFT',
      f'win rate by gold  {"":20}  0.750 [0.500, 1.000]',
  ]


def test_models_that_are_not_those_that_ppo_used_are_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  # A workdir that is named may have finished another stage since.
  def changed(run: object, stage: str) -> None:
    raise SourceError(f'{stage} has changed')

  monkeypatch.setattr(evaluate.origins, 'check', changed)
  with pytest.raises(SourceError, match='ppo has changed'):
    evaluate.compare(tiny.run(tmp_path, tiny.config()))
