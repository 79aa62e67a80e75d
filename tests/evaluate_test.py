"""The comparison of two policies: intervals, wins, the table and its files."""

import dataclasses
import json
import pathlib
import types
from typing import Any

import numpy as np
import pytest

from ma_rlhf_jax import evaluate
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.data import held_out
from ma_rlhf_jax.evaluate import describe, summarise, wins
from ma_rlhf_jax.training.judge import Judged
from ma_rlhf_jax.training.products import SourceError
from ma_rlhf_jax.training.run import Run
from tests import tiny


def _judged(**numbers: list[float]) -> Judged:
  arrays = {name: np.asarray(x, np.float64) for name, x in numbers.items()}
  texts = [''] * len(next(iter(arrays.values())))
  return Judged(texts, texts, arrays)


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
  # std of 1, 5, 9 is 4; the t quantile of 2 degrees is 4.302653:
  # 4.302653 * 4 / sqrt(3) = 9.936551
  assert rows['score']['sft'][1] == pytest.approx(5 - 9.936551, abs=1e-5)
  # one win, one tie, one loss
  assert rows['win rate by gold']['ppo'][0] == 0.5
  assert rows['gold']['difference'][0] == pytest.approx((0.25 - 0.5) / 3)


def test_shares_at_their_bounds_get_a_width() -> None:
  ones, zeros = [1.0] * 256, [0.0] * 256
  rows = summarise(
      _judged(score=zeros, ended=ones), _judged(score=ones, ended=ones)
  )
  # 258 and 2 of 260: 2 / 260 + 1.96918 sqrt(0.00766261 / 260) = 0.018383
  want = pytest.approx((1.0, 1 - 0.018383, 1.0), abs=1e-6)
  assert rows['win rate by score']['ppo'] == want
  assert rows['ended']['sft'] == rows['ended']['ppo'] == want
  mean, low, high = rows['ended']['difference']
  # 256 times 0 and two of each end: 1.96918 sqrt(4 / 259 / 260) = 0.015177
  assert (mean, low, high) == pytest.approx((0, -0.015177, 0.015177), abs=1e-6)


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
      'nats per response, from the start of PPO',
      f'win rate by gold  {"":20}  0.750 [0.500, 1.000]',
  ]


def test_the_comparison_is_traced_with_the_precision_of_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  config = tiny.config(model__matmul_precision='highest')
  run = types.SimpleNamespace(mesh=tiny.mesh(1, 1, 1), config=config)
  asked = types.SimpleNamespace(workdir='w', prompts=0)
  seen = []
  for owner, name, value in (
      (evaluate.flags, 'FLAGS', asked),
      (evaluate.cluster_flags, 'initialize', lambda: None),
      (evaluate.workdir_lib, 'read_config', lambda _: ('w', config)),
      (evaluate.workdir_lib, 'read_done', lambda *_: {}),
      (evaluate, 'load_run', lambda *_: run),
      (
          evaluate,
          'compare',
          lambda *_: seen.append(tiny.matmuls_are_exact()),
      ),
  ):
    monkeypatch.setattr(owner, name, value)
  evaluate.main(['evaluate'])
  assert seen == [True]


class _Judge:
  """Stands in for the models: the score is the number of the call."""

  def __init__(self) -> None:
    self.calls: list[dict[str, Any]] = []

  def __call__(self, run: Run, model: Any, **how: Any) -> Judged:
    self.calls.append(how)
    size = min(how['num_prompts'], len(how['data']))
    return _judged(score=[float(len(self.calls))] * size)


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> _Judge:
  """What is judged, without models."""
  found = _Judge()
  monkeypatch.setattr(evaluate.judge, 'judge', found)
  monkeypatch.setattr(evaluate.origins, 'check', lambda *_: None)
  monkeypatch.setattr(evaluate.loading, 'load', lambda *_: ('shape', 'params'))
  return found


def _compare(tmp_path: pathlib.Path, prompts: int, **fields: Any) -> Run:
  """Compares, in a run whose own settings are 5 of its 8 held-out prompts."""
  own = tiny.config(evaluate__prompts=5)
  workdir = workdir_lib.open_workdir(tmp_path, own)
  config = tiny.config(evaluate__prompts=prompts, **fields)
  run = tiny.run(workdir, config)
  if config.export.which == 'best':
    run = dataclasses.replace(run, data=held_out.divided(run.data, seed=3))
  evaluate.compare(run)
  return run


def test_fewer_prompts_leave_the_result_of_the_run_alone(
    tmp_path: pathlib.Path, judging: _Judge, capsys: pytest.CaptureFixture
) -> None:
  folder = tmp_path / 'evaluate'
  _compare(tmp_path, prompts=5)
  result = (folder / 'comparison.json').read_bytes()
  done = (folder / 'done.json').read_bytes()
  assert json.loads(result)['prompts'] == 5
  assert 'comparison-' not in capsys.readouterr().out
  _compare(tmp_path, prompts=3)
  assert (folder / 'comparison.json').read_bytes() == result
  assert (folder / 'done.json').read_bytes() == done
  few = json.loads((folder / 'comparison-prompts=3.json').read_text())
  assert few['prompts'] == 3
  printed = capsys.readouterr().out
  assert '3 held-out prompts, mean' in printed
  assert 'comparison-prompts=3.json' in printed


def test_prompts_that_chose_the_best_are_not_compared(
    tmp_path: pathlib.Path, judging: _Judge, capsys: pytest.CaptureFixture
) -> None:
  run = _compare(tmp_path, prompts=8, export__which='best')
  assert len(run.data.eval) == 2 and len(run.data.comparison) == 6
  assert [how['data'].digest for how in judging.calls] == (
      [run.data.comparison.digest] * 2
  )
  printed = capsys.readouterr().out
  assert 'only 6 of the evaluate.prompts=8' in printed
  assert '6 held-out prompts, mean' in printed


def test_the_command_compares_on_as_many_prompts_as_it_is_told(
    tmp_path: pathlib.Path,
    judging: _Judge,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  config = tiny.config(evaluate__prompts=5)
  workdir = workdir_lib.open_workdir(tmp_path, config)
  workdir_lib.mark_done(workdir, 'ppo', {'step': 3})
  monkeypatch.setattr(
      evaluate, 'load_run', lambda config, folder: tiny.run(folder, config)
  )
  for prompts in (0, 3):
    given = types.SimpleNamespace(workdir=str(tmp_path), prompts=prompts)
    monkeypatch.setattr(evaluate.flags, 'FLAGS', given)
    monkeypatch.setattr(evaluate.cluster_flags, 'initialize', lambda: None)
    evaluate.main(['evaluate'])
  names = sorted(path.name for path in (tmp_path / 'evaluate').iterdir())
  assert names == [
      'comparison-prompts=3.json',
      'comparison.json',
      'done.json',
      'verdict.json',
  ]
  assert json.loads((tmp_path / 'evaluate' / 'verdict.json').read_text()) == []


def test_models_that_are_not_those_that_ppo_used_are_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  # A workdir that is named may have finished another stage since.
  def changed(run: object, stage: str) -> None:
    raise SourceError(f'{stage} has changed')

  monkeypatch.setattr(evaluate.origins, 'check', changed)
  with pytest.raises(SourceError, match='ppo has changed'):
    evaluate.compare(tiny.run(tmp_path, tiny.config()))


def test_symptoms_of_the_run_that_gave_the_reward_model_are_told(
    tmp_path: pathlib.Path, judging: _Judge, capsys: pytest.CaptureFixture
) -> None:
  other = workdir_lib.open_workdir(tmp_path / 'other', tiny.config())
  found = {'reward_model_at_chance': 'as good as a coin'}
  workdir_lib.mark_done(other, 'reward_model', {'step': 1, 'symptoms': found})
  config = tiny.config(ppo__reward_model=str(other), evaluate__prompts=3)
  workdir = workdir_lib.open_workdir(tmp_path / 'run', config)
  evaluate.compare(tiny.run(workdir, config))
  assert 'as good as a coin' in capsys.readouterr().out
  verdict = json.loads((workdir / 'evaluate' / 'verdict.json').read_text())
  assert verdict == ['reward_model_at_chance']
