"""The loop around a stage that only counts, so that nothing is trained."""

from collections.abc import Callable
import dataclasses
import math
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax.data import held_out
from ma_rlhf_jax.parallel import processes
from ma_rlhf_jax.structs import TrainState
from ma_rlhf_jax.training import checkpoint, symptoms
from ma_rlhf_jax.training.loop import Stage, run_stage
from ma_rlhf_jax.training.metrics import NonFiniteError, read_metrics
from tests import tiny

# x -> 2 x + index from x = 1: what each update 0, 1, ... leaves.
X = [2.0, 5.0, 12.0, 27.0, 58.0]


def _state(x: float) -> TrainState:
  array = lambda value, dtype: jax.device_put(np.asarray(value, dtype))
  return TrainState(
      step=array(0, np.int32), params=array([x], np.float32), opt_state=()
  )


class _Counter(Stage):
  """Five updates; the only parameter is in `X`."""

  def __init__(
      self,
      workdir: pathlib.Path,
      config: ConfigDict,
      *,
      break_at: int = -1,
      metrics: Callable[[int], dict[str, float]] = lambda step: {},
      evaluation: Callable[[int], dict[str, float]] = lambda step: {},
  ):
    run = tiny.run(workdir, config)
    super().__init__(run, 'ppo', config.ppo, run.data.ppo)
    self.shown = ('loss',)
    self.states = {'policy': _state(1.0)}
    self.break_at, self.metrics, self.evaluation = break_at, metrics, evaluation
    self.indices: list[int] = []
    self.tables = 0

  def step(self, states: dict, index: int) -> tuple[dict, dict[str, Any]]:
    if index == self.break_at:
      raise KeyboardInterrupt
    self.indices.append(index)
    x = 2 * float(states['policy'].params[0]) + index
    metrics = {'loss': x, 'tokens': 7, **self.metrics(index + 1)}
    return {'policy': _state(x)}, metrics

  def evaluate(self, states: dict) -> dict[str, float]:
    x = float(states['policy'].params[0])
    return {'eval/x': x, **self.evaluation([1.0, *X].index(x))}

  def samples(self, states: dict) -> str:
    self.tables += 1
    return 'a table'


def _config(**fields: Any) -> ConfigDict:
  defaults = {
      'ppo__steps': 5,
      'ppo__eval_every': 0,
      'checkpoint__every': 0,
      'checkpoint__keep': 9,
      'checkpoint__best_metric__ppo': 'eval/x',
      'log__sinks': ('jsonl',),
  }
  return tiny.config(**{**defaults, **fields})


def _rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Rows of metrics without what a clock says."""
  return [
      {k: v for k, v in row.items() if not k.startswith(('time/', 'host/'))}
      for row in read_metrics(workdir / 'ppo')
  ]


def _saved(workdir: pathlib.Path) -> list[int]:
  folder = workdir / 'ppo' / 'checkpoints'
  return sorted(int(path.name) for path in folder.iterdir())


def _x(states: dict) -> float:
  return float(states['policy'].params[0])


def _row(step: int, **metrics: float) -> dict[str, Any]:
  named = {name.replace('__', '/'): x for name, x in metrics.items()}
  return {'step': step, 'stage': 'ppo', **named}


def test_line_k_tells_of_update_k_and_of_the_evaluation_after_it(
    tmp_path: pathlib.Path,
) -> None:
  stage = _Counter(tmp_path, _config(ppo__eval_every=2))
  states, step = run_stage(stage)
  assert (_x(states), step) == (58.0, 5)
  assert stage.indices == [0, 1, 2, 3, 4]
  assert _rows(tmp_path) == [
      _row(0, eval__x=1.0),
      _row(1, loss=2.0),
      _row(2, loss=5.0, eval__x=5.0),
      _row(3, loss=12.0),
      _row(4, loss=27.0, eval__x=27.0),
      _row(5, loss=58.0, eval__x=58.0),  # the end is always evaluated
  ]
  speed = [
      row.get('time/tokens_per_second')
      for row in read_metrics(tmp_path / 'ppo')
  ]
  assert speed[0] is None and min(speed[1:]) > 0
  assert _saved(tmp_path) == [5]
  assert stage.tables == 4


def test_lines_are_written_every_so_many_updates(
    tmp_path: pathlib.Path,
) -> None:
  stage = _Counter(tmp_path, _config(log__every=2, log__samples=0))
  run_stage(stage)
  assert _rows(tmp_path) == [
      _row(0, eval__x=1.0),
      _row(2, loss=5.0),
      _row(4, loss=27.0),
      _row(5, eval__x=58.0),
  ]
  assert stage.tables == 0


def test_each_checkpoint_is_evaluated_and_says_where_it_is(
    tmp_path: pathlib.Path,
) -> None:
  stage = _Counter(tmp_path, _config(checkpoint__every=3, seed=6))
  abstract = checkpoint.abstract_of(stage.states)
  run_stage(stage)
  evaluated = [row['step'] for row in _rows(tmp_path) if 'eval/x' in row]
  assert evaluated == [0, 3, 5]
  assert _saved(tmp_path) == [3, 5]
  with checkpoint.Checkpoints(
      tmp_path / 'ppo' / 'checkpoints', keep=9, best_metric='eval/x'
  ) as checkpoints:
    restored = checkpoints.restore_latest(abstract)
  assert (restored.step, _x(restored.state)) == (5, 58.0)
  # 5 updates of 4 prompts out of 8 rows: 20 = 2 * 8 + 4
  assert restored.meta['data_position'] == {'epoch': 2, 'row': 4}
  assert restored.meta['root_key'] == [0, 6]
  assert restored.meta['metric'] == 58.0


def test_a_stage_goes_on_from_its_newest_checkpoint(
    tmp_path: pathlib.Path,
) -> None:
  config = _config(checkpoint__every=2)
  with pytest.raises(KeyboardInterrupt):
    run_stage(_Counter(tmp_path / 'cut', config, break_at=3))
  assert _saved(tmp_path / 'cut') == [2]
  again = _Counter(tmp_path / 'cut', config)
  states, step = run_stage(again)
  assert again.indices == [2, 3, 4]
  assert (_x(states), step) == (58.0, 5)
  run_stage(_Counter(tmp_path / 'whole', config))
  assert _rows(tmp_path / 'cut') == _rows(tmp_path / 'whole')
  assert [row['step'] for row in _rows(tmp_path / 'cut')] == [0, 1, 2, 3, 4, 5]


def test_a_start_before_the_first_checkpoint_says_that_it_starts_again(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  config = _config(checkpoint__every=2)
  with pytest.raises(KeyboardInterrupt):
    run_stage(_Counter(tmp_path, config, break_at=0))
  assert 'no checkpoint' not in capsys.readouterr().out
  stage = _Counter(tmp_path, config)
  run_stage(stage)
  told = capsys.readouterr().out
  assert f'{stage.name}: no checkpoint yet, starting at 0\n' in told


def test_told_to_stop_it_saves_without_evaluating_and_goes_on_later(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = _config()
  asked = iter([False, False, True])
  monkeypatch.setattr(processes, 'preempted', lambda: next(asked))
  with pytest.raises(processes.Preempted, match='ppo has saved step 3'):
    run_stage(_Counter(tmp_path / 'cut', config))
  assert _saved(tmp_path / 'cut') == [3]
  assert [row['step'] for row in _rows(tmp_path / 'cut')] == [0, 1, 2, 3]
  assert _rows(tmp_path / 'cut')[-1] == _row(3, loss=12.0)
  monkeypatch.undo()
  again = _Counter(tmp_path / 'cut', config)
  states, step = run_stage(again)
  assert (_x(states), step, again.indices) == (58.0, 5, [3, 4])
  run_stage(_Counter(tmp_path / 'whole', config))
  assert _rows(tmp_path / 'cut') == _rows(tmp_path / 'whole')


def test_told_to_stop_where_it_saves_anyway_it_has_evaluated(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  asked = iter([False, True])
  monkeypatch.setattr(processes, 'preempted', lambda: next(asked))
  with pytest.raises(processes.Preempted):
    run_stage(_Counter(tmp_path, _config(checkpoint__every=2)))
  assert _saved(tmp_path) == [2]
  assert _rows(tmp_path)[-1] == _row(2, loss=5.0, eval__x=5.0)


def test_only_the_first_process_writes_lines_and_shows_progress(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.setattr(processes, 'is_first', lambda: False)
  run_stage(_Counter(tmp_path, _config()))
  assert _rows(tmp_path) == [] and _saved(tmp_path) == [5]
  assert capfd.readouterr().err == ''


def test_a_stage_that_has_ended_is_read_and_not_trained(
    tmp_path: pathlib.Path,
) -> None:
  run_stage(_Counter(tmp_path, _config()))
  again = _Counter(tmp_path, _config())
  states, step = run_stage(again)
  assert (_x(states), step, again.indices) == (58.0, 5, [])


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('step', [3, 4])
def test_a_metric_that_is_not_finite_stops_before_the_next_checkpoint(
    tmp_path: pathlib.Path, step: int, bad: float
) -> None:
  config = _config(checkpoint__every=2)
  broken = lambda k: {'policy/grad_norm': bad if k == step else 1.0}
  with pytest.raises(NonFiniteError) as caught:
    run_stage(_Counter(tmp_path, config, metrics=broken))
  message = str(caught.value)
  assert f'ppo step {step}: policy/grad_norm = {bad}' in message
  assert f'step 2 in {tmp_path / "ppo" / "checkpoints" / "2"}' in message
  assert _saved(tmp_path) == [2]
  healed = _Counter(tmp_path, config)
  states, _ = run_stage(healed)
  assert (_x(states), healed.indices) == (58.0, [2, 3, 4])


def test_an_evaluation_that_is_not_finite_stops_too(
    tmp_path: pathlib.Path,
) -> None:
  broken = lambda k: {'eval/kl': math.nan if k == 4 else 0.5}
  with pytest.raises(NonFiniteError, match='ppo step 4: eval/kl = nan'):
    run_stage(
        _Counter(tmp_path, _config(checkpoint__every=2), evaluation=broken)
    )
  assert _saved(tmp_path) == [2]


def test_without_a_checkpoint_the_message_says_so(
    tmp_path: pathlib.Path,
) -> None:
  broken = lambda k: {'loss': math.nan}
  with pytest.raises(NonFiniteError, match='Last good checkpoint: none yet'):
    run_stage(_Counter(tmp_path, _config(), metrics=broken))


@pytest.mark.parametrize(
    'fields, want',
    [
        ({}, (5.0, 2)),  # eval/good is largest at step 2
        ({'checkpoint__best_metric__ppo': '-eval/good'}, (58.0, 5)),
        ({'checkpoint__best_metric__ppo': '-eval/x'}, (5.0, 2)),
        ({'export__which': 'last'}, (58.0, 5)),
    ],
)
def test_the_best_or_the_last_state_goes_on(
    tmp_path: pathlib.Path, fields: dict[str, str], want: tuple[float, int]
) -> None:
  config = _config(
      **{
          'checkpoint__every': 2,
          'checkpoint__keep': 1,
          'checkpoint__best_metric__ppo': 'eval/good',
          'export__which': 'best',
          **fields,
      }
  )
  good = {0: 99.0, 2: 7.0, 4: 3.0, 5: 1.0}  # step 0 is never saved
  stage = _Counter(
      tmp_path, config, evaluation=lambda k: {'eval/good': good[k]}
  )
  states, step = run_stage(stage)
  assert (_x(states), step) == want


def test_values_on_rows_that_are_compared_choose_nothing(
    tmp_path: pathlib.Path,
) -> None:
  config = _config(checkpoint__every=2, export__which='best')
  good = {0: 0.0, 2: 9.0, 4: 7.0, 5: 1.0}
  evaluation = lambda k: {'eval/x': good[k]}
  first = _Counter(tmp_path, config, break_at=3, evaluation=evaluation)
  with pytest.raises(KeyboardInterrupt):
    run_stage(first)
  # Step 2, the best, was evaluated on all held-out rows; then they are divided.
  again = _Counter(tmp_path, config, evaluation=evaluation)
  data = held_out.divided(again.run.data, seed=0)
  again.run = dataclasses.replace(again.run, data=data)
  states, step = run_stage(again)
  assert (_x(states), step) == (27.0, 4)
  undivided = _Counter(tmp_path, config, evaluation=evaluation)
  assert run_stage(undivided)[1] == 2


def test_other_rows_are_not_taken_up_where_these_were_left(
    tmp_path: pathlib.Path,
) -> None:
  config = _config(checkpoint__every=2)
  with pytest.raises(KeyboardInterrupt):
    run_stage(_Counter(tmp_path, config, break_at=3))
  other = _Counter(tmp_path, config)
  other.data = other.data.take([1, 0, *range(2, len(other.data))])
  with pytest.raises(
      checkpoint.CheckpointError, match='the checkpoint of step 2'
  ):
    run_stage(other)


def test_a_step_that_may_not_be_best_is_passed_over(
    tmp_path: pathlib.Path,
) -> None:
  config = _config(checkpoint__every=2, export__which='best')
  stage = _Counter(tmp_path, config)
  stage.best_value = lambda found: (
      None if found['eval/x'] > 30 else found['eval/x']
  )
  states, step = run_stage(stage)  # x is 5, 27 and 58
  assert (_x(states), step) == (27.0, 4)


@pytest.mark.parametrize(
    'window, stage_name, first, want',
    [
        ((1, 3), 'ppo', 0, [('start', 1), ('stop', 4)]),
        ((2, 2), 'ppo', 0, [('start', 2), ('stop', 3)]),
        ((3, 90), 'ppo', 0, [('start', 3), ('stop', 5)]),  # ends with the run
        ((1, 3), 'ppo', 2, [('start', 2), ('stop', 4)]),  # resumed inside it
        ((0, 1), 'ppo', 2, []),
        ((7, 9), 'ppo', 0, []),  # the run ends before it
        ((1, 3), 'sft', 0, []),
        ((), 'ppo', 0, []),
    ],
)
def test_a_trace_is_written_of_the_window_only(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    window: tuple[int, ...],
    stage_name: str,
    first: int,
    want: list[tuple[str, int]],
) -> None:
  config = _config(
      checkpoint__every=2,
      profile__steps=tuple(index + 1 for index in window),
      profile__stage=stage_name,
  )
  if first:
    with pytest.raises(KeyboardInterrupt):
      plain = _config(checkpoint__every=2)
      run_stage(_Counter(tmp_path, plain, break_at=first))
  stage = _Counter(tmp_path, config)
  done = lambda: (stage.indices or [first - 1])[-1] + 1
  calls = []
  monkeypatch.setattr(
      jax.profiler, 'start_trace', lambda _: calls.append(('start', done()))
  )
  monkeypatch.setattr(
      jax.profiler, 'stop_trace', lambda: calls.append(('stop', done()))
  )
  run_stage(stage)
  assert calls == want


def test_rows_are_a_function_of_seed_and_update(tmp_path: pathlib.Path) -> None:
  stage, same = (_Counter(tmp_path, _config()) for _ in range(2))
  other = _Counter(tmp_path, _config(seed=1))
  rows = [stage.rows(index).tolist() for index in range(4)]
  assert [same.rows(index).tolist() for index in range(4)] == rows
  assert [other.rows(index).tolist() for index in range(4)] != rows
  # two batches of 4 are an epoch of 8 rows
  assert sorted(rows[0] + rows[1]) == sorted(rows[2] + rows[3])
  assert sorted(rows[0] + rows[1]) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_symptom_that_stop_names_ends_the_run_before_it_is_saved(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  made = _config(
      ppo__eval_every=1, checkpoint__every=1, stop__kl_above_max=True
  )
  kl = lambda step: {'eval/kl': 40.0 if step == 3 else 1.0}
  with pytest.raises(symptoms.SymptomError) as error:
    run_stage(_Counter(tmp_path, made, evaluation=kl))
  assert 'stop.kl_above_max' in str(error.value)
  assert 'step 2' in str(error.value)  # the last good one
  assert _saved(tmp_path) == [1, 2]
  assert 'symptom at ppo step 3: kl_above_max' in capsys.readouterr().err


def test_symptoms_last_over_a_kill_and_are_those_of_what_is_exported(
    tmp_path: pathlib.Path,
) -> None:
  made = _config(ppo__eval_every=1, checkpoint__every=1)
  kl = lambda step: {'eval/kl': 40.0 if step >= 3 else 1.0}
  with pytest.raises(KeyboardInterrupt):
    run_stage(_Counter(tmp_path, made, evaluation=kl, break_at=4))
  resumed = _Counter(tmp_path, made, evaluation=kl)
  run_stage(resumed)
  assert list(resumed.watch.found) == ['kl_above_max']
  assert resumed.watch.first['eval/x'] == 1.0  # of the evaluation at step 0
  done = _Counter(tmp_path, made, evaluation=kl)
  run_stage(done)  # nothing is left to train
  assert list(done.watch.found) == ['kl_above_max']
