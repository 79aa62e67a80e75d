"""The help of a command as a user sees it, for tests."""

import pathlib
import re
import shlex
import subprocess
import sys

from absl import flags
import pytest

from ma_rlhf_jax import recipe
from ma_rlhf_jax.commands import absl_flags
from ma_rlhf_jax.commands.command import Command, answer
from ma_rlhf_jax.config import base, flatten

ROOT = pathlib.Path(__file__).parents[1]
# Flags and words of absl's own help.
_ABSL = ('helpfull', 'helpshort', '--logtostderr', '--verbosity', 'alsolog')


def run(module: str, *arguments: str) -> str:
  """What `python -m module` prints; it must end well and import little."""
  done = subprocess.run(
      [sys.executable, '-X', 'importtime', '-m', module, *arguments],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=60,
  )
  assert done.returncode == 0, done.stderr
  imported = {line.split('|')[-1].strip() for line in done.stderr.splitlines()}
  assert 'ma_rlhf_jax' in imported
  assert not imported & {'absl', 'jax', 'numpy', 'ml_collections'}
  return done.stdout


def examples(text: str) -> list[list[str]]:
  """The command lines under `examples:`, as a shell splits them."""
  lines = text.partition('\nexamples:\n')[2].replace('\\\n', '')
  return [shlex.split(line, comments=True) for line in lines.splitlines()]


def check_text(text: str) -> None:
  """What every help has, whatever it is of."""
  assert max(map(len, text.splitlines())) <= 80
  assert not any(word in text for word in _ABSL)
  assert text.startswith('usage: ') and '\nflags:\n' in text
  assert len(examples(text)) == 2


def check_command(
    command: Command,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Runs --help and -h, and parses the examples."""
  text = run(f'ma_rlhf_jax.{command.name}', '--help')
  check_text(text)
  for flag in command.all_flags:
    assert re.search(rf'^  --{re.escape(flag.name)}(=|$)', text, re.M), flag
    assert (
        flag.help.endswith('.')
        and flag.help[0].isupper()
        or (flag.help.startswith('--'))
    )
  path = ROOT / 'ma_rlhf_jax' / f'{command.name.replace(".", "/")}.py'
  source = path.read_text()
  assert ('recipe_flag' in source) == ('\n  --config.FIELD=' in text)
  assert ('cluster_flags' in source) == ('\n  --process_id=' in text)
  monkeypatch.setattr(sys, 'argv', ['command', '--overwrite', '-h'])
  with pytest.raises(SystemExit) as ended:
    answer(command)
  assert ended.value.code == 0 and capsys.readouterr().out == text
  for words in examples(text):
    assert words[:3] == ['python', '-m', f'ma_rlhf_jax.{command.name}']
    _parse(command, words[3:])


def _parse(command: Command, words: list[str]) -> None:
  """Parses an example: fields and recipes too, which must be there."""
  values = flags.FlagValues()
  absl_flags.define((*command.flags, *command.processes), values)
  own = [word for word in words if not word.startswith('--config')]
  assert values(['command', *own]) == ['command']
  for word in set(words) - set(own):
    name, _, value = word.removeprefix('--config').partition('=')
    if name:
      assert name[1:] in flatten(base())
    else:
      recipe.load(f'{ROOT}/{value}')
