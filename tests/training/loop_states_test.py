"""No state that is not sound is saved, called good or handed on."""

import logging
import math
import pathlib
from typing import Any

import pytest

from ma_rlhf_jax.parallel import processes
from ma_rlhf_jax.training import health
from ma_rlhf_jax.training.loop import run_stage
from ma_rlhf_jax.training.metrics import NonFiniteError
from tests.training import loop_test


class _TwoModels(loop_test._Counter):
  """Beside the policy a critic, which is `bad` after some updates."""

  def __init__(
      self,
      workdir: pathlib.Path,
      *,
      bad: float = math.nan,
      after: tuple[int, ...] = (),
      **more: Any,
  ):
    super().__init__(workdir, loop_test._config(checkpoint__every=2), **more)
    self.states['critic'] = loop_test._state(1.0)
    self.bad, self.after = bad, after

  def step(self, states: dict, index: int) -> tuple[dict, dict[str, Any]]:
    new, metrics = super().step(states, index)
    value = self.bad if index + 1 in self.after else 1.0
    return {**new, 'critic': loop_test._state(value)}, metrics


def _folders(workdir: pathlib.Path) -> list[str]:
  folder = workdir / 'ppo' / 'checkpoints'
  return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('bad', [math.nan, -math.inf, 8.7e11])
@pytest.mark.parametrize('after, saved', [(2, []), (4, ['2']), (5, ['2', '4'])])
def test_a_critic_that_is_not_sound_is_neither_saved_nor_returned(
    tmp_path: pathlib.Path, after: int, saved: list[str], bad: float
) -> None:
  with pytest.raises(health.RuinedError) as caught:
    run_stage(_TwoModels(tmp_path, bad=bad, after=(after,)))
  assert f'ppo step {after}: critic/params is' in str(caught.value)
  last = (
      f'step {after // 2 * 2 - 2 if after < 5 else 4} in' if saved else 'none'
  )
  assert f'Last good checkpoint: {last}' in str(caught.value)
  assert _folders(tmp_path) == saved
  states, _ = run_stage(_TwoModels(tmp_path))
  assert loop_test._x(states) == 58.0


def test_a_signal_to_stop_saves_no_state_that_is_not_sound(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  asked = iter([False, False, True])
  monkeypatch.setattr(processes, 'preempted', lambda: next(asked))
  with pytest.raises(health.RuinedError, match='ppo step 3: critic.*step 2 in'):
    run_stage(_TwoModels(tmp_path, after=(3,)))
  assert _folders(tmp_path) == ['2']


def _stopped_after_4(workdir: pathlib.Path) -> None:
  with pytest.raises(KeyboardInterrupt):
    run_stage(_TwoModels(workdir, break_at=4))
  assert _folders(workdir) == ['2', '4']


def test_a_nan_after_a_resume_is_tried_again_from_the_step_before(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  _stopped_after_4(tmp_path)
  values = iter([math.nan, 1.0])  # step 5 after step 4, then after step 2
  broken = lambda k: {'loss/critic': next(values)} if k == 5 else {}
  stage = _TwoModels(tmp_path, metrics=broken)
  with caplog.at_level(logging.WARNING):
    states, step = run_stage(stage)
  assert (loop_test._x(states), step) == (58.0, 5)
  assert stage.indices == [4, 2, 3, 4]
  assert _folders(tmp_path) == ['2', '4', '5', 'damaged-4']
  (line,) = [r.getMessage() for r in caplog.records if 'damaged' in r.message]
  assert 'ppo step 5: loss/critic = nan; the checkpoint of step 4' in line
  assert 'after step 2' in line and 'optim.lr' not in line


def test_a_nan_that_both_steps_lead_to_is_no_damage(
    tmp_path: pathlib.Path,
) -> None:
  for _ in range(2):  # a second start finds what the first one found
    if not (tmp_path / 'ppo').exists():
      _stopped_after_4(tmp_path)
    stage = _TwoModels(tmp_path, after=(5,))
    with pytest.raises(health.RuinedError, match='step 5.*smaller optim.lr'):
      run_stage(stage)
    assert stage.indices == [4, 2, 3, 4]
    assert _folders(tmp_path) == ['2', '4']
  # Where the older step leads to it sooner, the newer one comes back.
  broken = lambda k: {'loss': math.nan if k in (3, 5) else 1.0}
  with pytest.raises(NonFiniteError, match='ppo step 3'):
    run_stage(_TwoModels(tmp_path, metrics=broken))
  assert _folders(tmp_path) == ['2', '4']
  states, _ = run_stage(_TwoModels(tmp_path))
  assert loop_test._x(states) == 58.0


def test_a_checkpoint_that_holds_a_nan_is_passed_over(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  # As an earlier version of this package would have saved it.
  with monkeypatch.context() as patched:
    patched.setattr(health, 'problem', lambda states: '')
    with pytest.raises(KeyboardInterrupt):
      run_stage(_TwoModels(tmp_path, after=(4,), break_at=4))
  stage = _TwoModels(tmp_path)
  states, _ = run_stage(stage)
  assert (loop_test._x(states), stage.indices) == (58.0, [2, 3, 4])
  assert _folders(tmp_path) == ['2', '4', '5', 'damaged-4']
