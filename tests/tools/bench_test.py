"""What the command refuses, and reports side by side."""

import json
import pathlib
import subprocess
import sys

import pytest

_REPORT = {
    'device': '1 x cpu',
    'shape': {},
    'versions': {},
    'phases': {'learn': {'seconds': 2.0}},
    'peak_gib': 1.0,
}


def _run(*args: str) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'ma_rlhf_jax.tools.bench', *args]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize('second', [4.0, None], ids=['whole', 'broken'])
def test_reports_are_compared(
    tmp_path: pathlib.Path, second: float | None
) -> None:
  one, two = tmp_path / 'one.json', tmp_path / 'two.json'
  one.write_text(json.dumps(_REPORT))
  two.write_text('[]')
  if second:
    phases = {'phases': {'learn': {'seconds': 4.0}}}
    config = {'config': {'ppo.batch_size': 8}}
    two.write_text(json.dumps(_REPORT | phases | config))
  ran = _run(f'--compare={one},{two}')
  if second:
    assert ran.returncode == 0 and '2.00' in ran.stdout
    assert 'ppo.batch_size: None and 8' in ran.stdout
  else:
    assert ran.returncode == 1
    (line,) = [x for x in ran.stderr.splitlines() if x.startswith('error:')]
    assert str(two) in line and '--json' in line


def test_a_file_that_cannot_be_is_told_before_anything_is_measured() -> None:
  ran = _run('--json=nowhere/bench.json')
  assert ran.returncode == 1 and not ran.stdout
  assert 'error: --json=nowhere/bench.json: there is no folder' in ran.stderr
