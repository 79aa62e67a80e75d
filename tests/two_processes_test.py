"""Two processes of a run, started as a user does, through launch/local.sh.

They are on one machine and speak over its loopback, as hosts speak over a
network. A recipe kills one of them, and notes the tokens that are sampled.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from ma_rlhf_jax.training.metrics import read_metrics
from tests import whole_run

_ROOT = pathlib.Path(__file__).parents[1]
_STAGES = ('sft', 'reward_model', 'ppo')
_RECIPE = whole_run.recipe({
    'sft.steps': 7, 'sft.eval_every': 0,
    'ppo.steps': 7, 'ppo.eval_every': 0,
    'sft.optim.lr': 1e-2, 'ppo.optim.lr': 1e-3,
    'log.samples': 0,
})  # fmt: skip
# Once a run, process 1 gets a signal before update 7, after the checkpoint of
# step 4. The line of update 5 is written by then.
_STOPPED = """
import os, time
import jax
from ma_rlhf_jax.ppo import stage as ppo
from ma_rlhf_jax.training import metrics, sft

metrics.MetricsWriter.__init__.__kwdefaults__['flush_seconds'] = 0.0

def stopped(step):
  def wrapped(self, states, index):
    folder = self.run.workdir
    mark = folder / 'stopped'
    if index == 6 and jax.process_index() == 1 and not mark.exists():
      while not (folder / self.name / 'checkpoints' / '4').exists():
        time.sleep(0.02)
      mark.write_text('')
      os.kill(os.getpid(), SIGNAL)
    return step(self, states, index)
  return wrapped

STAGE.step = stopped(STAGE.step)
"""
# Writes what each rollout has sampled, whole, by the first process.
_NOTED = """
import numpy as np
from ma_rlhf_jax.parallel import processes
from ma_rlhf_jax.parallel.mesh import gathered
from ma_rlhf_jax.ppo import stage as ppo

step = ppo.PPO.step

def noted(self, states, index):
  sample = self.programs.rollout
  def rollout(*args):
    made = sample(*args)
    tokens = gathered(made.sequences.tokens_BL)
    if processes.is_first():
      np.save(str(self.run.workdir / f'tokens-{index}.npy'), tokens)
    return made
  self.programs.rollout = rollout
  try:
    return step(self, states, index)
  finally:
    self.programs.rollout = sample

ppo.PPO.step = noted
"""
# Trees for every other text, so that some sentences fall back.
_PARSER = """
def trees(texts):
  made = []
  for text in texts:
    words = text.replace('(', '').replace(')', '').split()
    flat = ' '.join(f'(X {word})' for word in words)
    made.append([f'(S {flat})'] if len(text) % 2 and words else None)
  return made
"""


def _free_port() -> int:
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


class _Machine:
  """Starts runs of one or two processes."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    (folder / 'toy_parser.py').write_text(_PARSER)
    # transformers imports PyTorch where it finds a new one, which takes longer
    # than all the rest.
    told = folder / 'torch-0.0.dist-info' / 'METADATA'
    told.parent.mkdir()
    told.write_text('Metadata-Version: 2.1\nName: torch\nVersion: 0.0\n')
    (folder / 'torch.py').write_text('')
    self.env = {
        **os.environ,
        'PYTHONPATH': f'{folder}:{_ROOT}',
        'HF_HUB_OFFLINE': '1',
        'JAX_PLATFORMS': 'cpu',
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }

  def train(
      self,
      workdir: str,
      *arguments: str,
      processes: int,
      devices: int,
      code: str = '',
      restarts: int = 0,
      returncode: int = 0,
  ) -> str:
    """What the launcher and all processes have printed.

    Args:
      workdir: a name.
      *arguments: of the command.
      processes: how many.
      devices: of each process.
      code: goes into the recipe.
      restarts: that the launcher may make.
      returncode: to expect.
    """
    recipe = self.folder / f'{workdir}_recipe.py'
    recipe.write_text(_RECIPE + code)
    flags = os.environ['XLA_FLAGS'].replace(
        'device_count=8', f'device_count={devices}'
    )
    command = [sys.executable, '-m', 'ma_rlhf_jax.train']
    command += [f'--config={recipe}', f'--workdir={self.folder / workdir}']
    if processes > 1:
      launcher = [str(_ROOT / 'launch' / 'local.sh')]
      launcher += [f'--num_processes={processes}', f'--port={_free_port()}']
      launcher += ['--pause=0', '--grace=1', f'--max_restarts={restarts}']
      command = [*launcher, '--', *command]
    done = subprocess.run(
        [*command, *arguments],
        cwd=self.folder,
        env=self.env | {'XLA_FLAGS': flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == returncode, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope='module')
def machine(tmp_path_factory: pytest.TempPathFactory) -> _Machine:
  return _Machine(tmp_path_factory.mktemp('two_processes'))


def _rows(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Metric rows without what a clock says."""
  return [
      {k: v for k, v in row.items() if not k.startswith(('time/', 'host/'))}
      for row in read_metrics(folder)
  ]


def _part(folder: pathlib.Path, start: int) -> list[dict[str, Any]]:
  """The lines that one start has written, likewise."""
  lines = [
      json.loads(line)
      for path in sorted((folder / 'metrics').glob(f'{start:04d}-*.jsonl'))
      for line in path.read_text().splitlines()
  ]
  return [{k: v for k, v in x.items() if 'time/' not in k} for x in lines]


def _done(workdir: pathlib.Path, stage: str) -> dict[str, Any]:
  return json.loads((workdir / stage / 'done.json').read_text())


def _stopped(stage: str, number: signal.Signals) -> str:
  return _STOPPED.replace('STAGE', stage).replace('SIGNAL', str(int(number)))


@pytest.mark.slow
def test_killed_two_processes_go_on_bit_for_bit_by_their_launcher(
    machine: _Machine,
) -> None:
  printed = machine.train(
      'killed',
      "--config.stages=('sft',)",
      processes=2,
      devices=1,
      code=_stopped('sft.SFT', signal.SIGKILL),
      restarts=1,
  )
  folder = machine.folder / 'killed'
  assert 'ended with 137; restart 1 of 1 in 0 s' in printed
  assert 'sft: goes on after step 4' in printed
  # One process speaks, of two starts.
  # Of two starts, one of which came to its end.
  assert printed.count('workdir: ') == 3
  assert printed.count('sft: done in ') == 1
  # Both starts have made update 5, one of them from the checkpoint.
  first, second = _part(folder / 'sft', 1), _part(folder / 'sft', 2)
  assert [row['step'] for row in first] == [0, 1, 2, 3, 4, 4, 5]
  assert [row['step'] for row in second] == [5, 6, 7, 7]
  assert second[0] == first[-1] and 'loss/sft' in first[-1]
  assert _done(folder, 'sft')['step'] == 7
  start = json.loads((folder / 'run-0002.json').read_text())
  assert start['devices']['processes'] == start['devices']['count'] == 2
  assert not (folder / 'run-0003.json').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    'stop', [signal.SIGKILL, signal.SIGTERM], ids=lambda stop: stop.name
)
def test_stopped_in_ppo_it_ends_as_if_it_had_not_been(
    machine: _Machine, whole: pathlib.Path, stop: signal.Signals
) -> None:
  name = f'stopped_{stop.name}'
  printed = machine.train(
      name,
      f'--config.ppo.from={whole}',
      "--config.stages=('ppo',)",
      *_PPO,
      processes=2,
      devices=4,
      code=_NOTED + _stopped('ppo.PPO', stop),
      restarts=1,
  )
  folder = machine.folder / name
  code = {signal.SIGKILL: 137, signal.SIGTERM: 75}[stop]
  assert f'ended with {code}; restart 1 of 1 in 0 s' in printed
  assert ('told to stop: ppo has saved step' in printed) == (code == 75)
  assert _rows(folder / 'ppo') == _rows(whole / 'ppo')
  assert _done(folder, 'ppo') == _done(whole, 'ppo')


# A signal is heard within seconds, by which an update of this size is not slow.
_PPO = ('--config.ppo.steps=40',)


@pytest.fixture(scope='module')
def whole(machine: _Machine) -> pathlib.Path:
  """All stages by two processes of four devices, not stopped."""
  printed = machine.train('whole', *_PPO, processes=2, devices=4, code=_NOTED)
  assert printed.count('held-out prompts, mean [95 % interval]') == 1
  return machine.folder / 'whole'


@pytest.fixture(scope='module')
def alone(machine: _Machine) -> pathlib.Path:
  """The same by one process of eight devices."""
  machine.train('alone', *_PPO, processes=1, devices=8, code=_NOTED)
  return machine.folder / 'alone'


def _assert_close(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]]
) -> None:
  assert len(ours) == len(theirs)
  for row, other in zip(ours, theirs, strict=True):
    assert row.keys() == other.keys() and row['stage'] == other['stage']
    names = row.keys() - {'stage'}
    for name in names:
      want = pytest.approx(other[name], rel=1e-4, abs=1e-5)
      assert row[name] == want, (row['stage'], row['step'], name)


@pytest.mark.slow
def test_one_process_of_eight_devices_and_two_of_four_agree(
    whole: pathlib.Path, alone: pathlib.Path
) -> None:
  for stage in _STAGES:
    _assert_close(_rows(whole / stage), _rows(alone / stage))
    folder = f'{stage}/hf/model.safetensors'
    assert (whole / folder).stat().st_size == (alone / folder).stat().st_size
  tokens = [np.load(alone / f'tokens-{i}.npy') for i in range(40)]
  assert len(np.unique(tokens[0])) > 20
  for i, want in enumerate(tokens):
    np.testing.assert_array_equal(np.load(whole / f'tokens-{i}.npy'), want)


@pytest.mark.slow
def test_rules_of_the_host_read_the_rows_of_each_process(
    machine: _Machine, whole: pathlib.Path
) -> None:
  found = {}
  for processes, devices in ((1, 8), (2, 4)):
    name = f'parsing_{processes}'
    machine.train(
        name,
        f'--config.ppo.from={whole}',
        "--config.stages=('ppo',)",
        '--config.macro.termination=parsing',
        '--config.macro.parser=toy_parser:trees',
        processes=processes,
        devices=devices,
    )
    found[processes] = _rows(machine.folder / name / 'ppo')
  _assert_close(found[2], found[1])
  fallbacks = [row.get('macro/fallback', 0) for row in found[1]]
  assert 0 < max(fallbacks) and min(fallbacks[1:]) < 1


@pytest.mark.slow
def test_an_error_of_one_process_ends_both_with_its_words(
    machine: _Machine,
) -> None:
  code = """
import jax
from ma_rlhf_jax.training import loading
check = loading.check

def fails(run):
  if jax.process_index() == 1:
    raise OSError('the disk of this host is full')
  check(run)

loading.check = fails
"""
  printed = machine.train(
      'error', processes=2, devices=1, code=code, restarts=1, returncode=1
  )
  assert printed.count('error: process 1: the disk of this host is full') == 1
  # The mended command starts afresh in the same folder.
  assert not (machine.folder / 'error').exists()


@pytest.mark.slow
def test_a_wrong_field_is_told_once(machine: _Machine) -> None:
  printed = machine.train(
      'wrong',
      '--config.ppo.gamma=2',
      processes=2,
      devices=1,
      restarts=1,
      returncode=1,
  )
  assert printed.count('ppo.gamma=2') == 1
