"""The command: errors at its edge, and one plan from flag to file."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import types

from absl import flags
import pytest

from ma_rlhf_jax.commands import absl_flags, tools
from ma_rlhf_jax.tools import plan

_ROOT = pathlib.Path(__file__).parents[2]
_TINY = f'--config={_ROOT / "configs" / "tiny.py"}'


def _run(*flags: str, **env: str) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, '-m', 'ma_rlhf_jax.tools.plan', *flags],
      capture_output=True,
      text=True,
      cwd=_ROOT,
      env={**os.environ, **env},
      timeout=300,
  )


def test_an_unknown_topology_is_an_error_with_the_known_ones() -> None:
  done = _run(_TINY, '--topology=v5litepod-16')
  assert done.returncode == 1
  assert "error: --topology='v5litepod-16' is unknown" in done.stderr
  assert 'v5e:4x8' in done.stderr and 'Traceback' not in done.stderr


def test_a_price_is_a_number() -> None:
  done = _run(_TINY, '--topology=gpu:l4:1', '--price=nan')
  assert done.returncode == 1 and not done.stdout
  assert 'error: --price=nan must be a finite number' in done.stderr


def test_a_file_that_cannot_be_is_told_before_anything_is_planned() -> None:
  done = _run(_TINY, '--topology=gpu:l4:1', '--json=nowhere/plan.json')
  assert done.returncode == 1 and not done.stdout
  assert 'error: --json=nowhere/plan.json: there is no folder' in done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is not None, reason='libtpu is there'
)
def test_without_libtpu_the_extra_is_named() -> None:
  done = _run(_TINY, '--topology=v5e:2x2')
  assert done.returncode == 1
  assert "pip install -e '.[plan]'" in done.stderr


@pytest.mark.parametrize('fits', [True, False])
def test_where_nothing_fits_the_exit_code_is_its_own(
    fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
  values = flags.FlagValues()
  absl_flags.define(tools.PLAN.flags, values)
  values(['plan'])
  monkeypatch.setattr(flags, 'FLAGS', values)
  monkeypatch.setattr(signal, 'signal', lambda *unused: None)
  found = types.SimpleNamespace(fits=fits)
  monkeypatch.setattr(plan, 'plan', lambda: found)
  if fits:
    plan.main(['plan'])
    return
  with pytest.raises(SystemExit) as ended:
    plan.main(['plan'])
  assert ended.value.code == 3


@pytest.mark.slow
def test_a_model_that_fits_nowhere_ends_with_3() -> None:
  done = _run(
      _TINY, '--topology=gpu:l4:1', '--config.model.preset=gemma-7b', '--jobs=1'
  )
  assert done.returncode == 3, done.stderr
  assert 'what comes closest:' in done.stdout


@pytest.mark.slow
def test_gpus_are_answered_by_formula(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'plan.json'
  done = _run(_TINY, '--topology=gpu:l4:1', '--price=0.5', f'--json={path}')
  assert done.returncode == 0, done.stderr
  assert 'by formula' in done.stdout
  assert done.stdout.splitlines()[-1].startswith('fits: ')
  assert json.loads(path.read_text())['by_formula']


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='needs libtpu'
)
def test_a_slice_is_answered_by_its_compiler(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'plan.json'
  done = _run(_TINY, '--topology=v5e:2x2', f'--json={path}')
  assert done.returncode == 0, done.stderr
  made = json.loads(path.read_text())
  assert made['fits'] and made['hbm_bytes'] == 16911433728
  assert set(made['stages']) == {'sft', 'reward_model', 'ppo'}
