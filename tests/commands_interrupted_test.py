"""Ctrl-C in every command: one line, exit code 130, and nothing left behind.

The slow test presses it at 40 moments, drawn from a seed: MA_RLHF_SEED=7 pytest
--slow tests/commands_interrupted_test.py draws others.
"""

import dataclasses
import getpass
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests import whole_run

_ROOT = pathlib.Path(__file__).parents[1]
_PACKAGE = 'ma_rlhf_jax'
_COMMANDS = (
    'train',
    'generate',
    'evaluate',
    'export',
    'tools.plan',
    'tools.bench',
    'tools.explore',
    'tools.layout',
    'tools.parse',
)
_MARK = 'MA_RLHF_INTERRUPTED_TEST'
# Takes a second to be imported and for each text, as a real one does.
_PARSER = """
import time
time.sleep(1)
def parse(texts):
  time.sleep(1)
  return [['(S (NP x))'] for text in texts]
"""


@dataclasses.dataclass
class _Place:
  """Where commands run.

  Attributes:
    root: holds what they need and make.
    temporary: their TMPDIR, which must be empty after each.
  """

  root: pathlib.Path
  temporary: pathlib.Path

  def start(self, name: str, *arguments: str) -> subprocess.Popen:
    """Starts a command; its standard error goes to `<root>/stderr`."""
    cache = {
        'JAX_COMPILATION_CACHE_DIR': str(self.root / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    paths = f'{_ROOT}{os.pathsep}{self.root}'
    with (self.root / 'stderr').open('w') as error:
      return subprocess.Popen(
          [sys.executable, '-m', f'{_PACKAGE}.{name}', *arguments],
          cwd=_ROOT,
          env=os.environ
          | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': paths}
          | {_MARK: str(self.root), 'TMPDIR': str(self.temporary)}
          | (cache if name in ('train', 'evaluate') else {}),
          stdin=subprocess.PIPE,
          stdout=subprocess.DEVNULL,
          stderr=error,
          start_new_session=True,
      )

  def left(self) -> list[str]:
    """Command lines of processes that were started here and still run."""
    found = []
    for path in pathlib.Path('/proc').glob('[0-9]*'):
      try:
        if f'{_MARK}={self.root}'.encode() in (path / 'environ').read_bytes():
          found.append((path / 'cmdline').read_text())
      except OSError:
        continue  # it has ended, or is another user's
    return [line for line in found if line]


def _stopped(process: subprocess.Popen) -> bool:
  """Stops a process, so that it writes nothing; false where it has ended."""
  process.send_signal(signal.SIGSTOP)
  stat = pathlib.Path(f'/proc/{process.pid}/stat')
  while (state := stat.read_text().rpartition(')')[2].split()[0]) != 'T':
    if state == 'Z':
      return False
    time.sleep(0.01)
  return True


def _interrupted(place: _Place, seconds: float, *command: str) -> str | None:
  """What a command writes after Ctrl-C; None where it ended before, well."""
  process = place.start(*command)
  try:
    process.wait(seconds)
  except subprocess.TimeoutExpired:
    pass
  errors = place.root / 'stderr'
  if process.returncode is None and _stopped(process):
    written = errors.stat().st_size
    # As a terminal does: to all processes of the group.
    os.killpg(process.pid, signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    code = process.wait(60)
    said = errors.read_bytes()[written:].decode()
    if code == 0 and not said:  # its work was done, and it was just ending
      said = None
    else:
      assert (code, said.count('\n')) == (130, 1), (code, errors.read_text())
  else:
    assert process.wait() == 0, errors.read_text()
    said = None
  process.stdin.close()
  end = time.monotonic() + 5  # children that were killed may take a moment
  while place.left() and time.monotonic() < end:
    time.sleep(0.05)
  assert place.left() == []
  # PyTorch, which reads an export back, keeps a cache of its own there.
  kept = f'torchinductor_{getpass.getuser()}'
  assert [p.name for p in place.temporary.iterdir() if p.name != kept] == []
  return said


@pytest.fixture
def place(tmp_path: pathlib.Path) -> _Place:
  (tmp_path / 'tmp').mkdir()
  (tmp_path / 'recipe.py').write_text(whole_run.recipe())
  (tmp_path / 'toy_parser.py').write_text(_PARSER)
  return _Place(tmp_path, tmp_path / 'tmp')


@pytest.mark.parametrize('name', _COMMANDS[:-1])
def test_every_command_is_ready_before_its_imports(name: str) -> None:
  lines = (_ROOT / _PACKAGE / f'{name.replace(".", "/")}.py').read_text()
  begin = lines.index('  interrupts.end_on_ctrl_c(')
  assert lines.index("if __name__ == '__main__'") < begin
  assert begin < lines.index('from absl')
  assert 'import jax' not in lines[:begin]


@pytest.mark.parametrize('name', ['train', 'tools.parse'])
def test_a_second_after_the_start_it_ends_in_one_line(
    place: _Place, name: str
) -> None:
  arguments = {
      'train': (
          f'--config={place.root / "recipe.py"}',
          f'--workdir={place.root / "run"}',
      ),
      'tools.parse': ('--parser=toy_parser:parse',),
  }
  said = _interrupted(place, 1.0, name, *arguments[name])
  assert said.startswith('interrupted')


def _digests(workdir: pathlib.Path) -> list[Any]:
  """What a run trained, by stage."""
  return [
      json.loads((workdir / stage / 'done.json').read_text())
      for stage in ('sft', 'reward_model', 'ppo')
  ]


def _commands(root: pathlib.Path) -> dict[str, tuple[int, tuple[str, ...]]]:
  """How often each is interrupted, and its command line."""
  run, recipe = root / 'whole', f'--config={root / "recipe.py"}'
  (root / 'in.jsonl').write_text('{"prompt": "the boat"}\n' * 64)
  generate = ('generate', f'--model={run}', '--max_new_tokens=32')
  files = f'--input={root / "in.jsonl"}', f'--output={root / "o.jsonl"}'
  parsing = (
      '--config.macro.termination=parsing',
      '--config.macro.parser=toy_parser:parse',
      '--config.macro.parse_workers=2',
  )
  return {
      'train': (10, ('train', recipe)),
      'train with parsers': (4, ('train', recipe, *parsing)),
      'one prompt': (2, (*generate, '--prompt=the boat')),
      'a file': (3, (*generate, *files, '--overwrite', '--batch_size=4')),
      'a conversation': (2, generate),
      'evaluate': (3, ('evaluate', f'--workdir={run}')),
      'export': (
          4,
          ('export', f'--workdir={run}', f'--output={root / "export"}'),
      ),
      'plan': (4, ('tools.plan', recipe, '--topology=gpu:l4:8', '--jobs=2')),
      'bench': (2, ('tools.bench', recipe)),
      'explore': (2, ('tools.explore', '--text=the boat is here.')),
      'layout': (2, ('tools.layout', recipe)),
      'parse': (2, ('tools.parse', '--parser=toy_parser:parse')),
  }


@pytest.mark.slow
def test_at_40_random_moments_it_is_one_line_and_130(place: _Place) -> None:
  draw = random.Random(int(os.environ.get('MA_RLHF_SEED', '0')))
  whole = place.root / 'whole'
  arguments = f'--config={place.root / "recipe.py"}', f'--workdir={whole}'
  assert place.start('train', *arguments).wait() == 0
  for name, (times, command) in _commands(place.root).items():
    # A run goes on where it was interrupted, so that all of it is met.
    latest = 30.0 if 'train' in name else 12.0
    workdir = place.root / name.replace(' ', '_')
    left = times
    while left:
      more = (f'--workdir={workdir}',) if command[0] == 'train' else ()
      seconds = draw.uniform(1.0, latest)
      said = _interrupted(place, seconds, *command, *more)
      print(f'{name} after {seconds:.2f} s: {said!r}', flush=True)
      if said is None:
        latest = max(1.5, 0.8 * latest)
        shutil.rmtree(place.root / 'export', ignore_errors=True)
        if name == 'train':
          assert _digests(workdir) == _digests(whole)
        shutil.rmtree(workdir, ignore_errors=True)
      left -= said is not None
  # What was interrupted many times ends as what never was.
  last = ('train', arguments[0], f'--workdir={place.root / "train"}')
  assert _interrupted(place, 600, *last) is None
  assert _digests(place.root / 'train') == _digests(whole)
