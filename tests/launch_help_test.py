"""--help and -h of the launchers."""

import re
import shlex

import pytest

from ma_rlhf_jax import recipe
from tests import helped
from tests.launching import FOLDER, launch

# Each with the values that its help must name as defaults.
_SCRIPTS = {
    'local.sh': ('0', '8476', '20', '10', '5'),
    'quickstart.sh': ('configs/tiny.py',),
    'slurm.sh': ('10', '60'),
    'slurm_task.sh': (),
    'test.sh': ('off',),
    'tpu_queued.sh': ('ma_rlhf_jax', '30', '10', '60'),
    'tpu_vm.sh': ('ma_rlhf_jax', '10', '60'),
    'tpu_worker.sh': (),
}
_SOURCED = ('common.sh', 'help.sh', 'setup_venv.sh')


def test_every_launcher_is_looked_at() -> None:
  found = {path.name for path in FOLDER.glob('*.sh')}
  assert found == {*_SCRIPTS, *_SOURCED}


@pytest.mark.parametrize('script', _SCRIPTS)
def test_help_shows_flags_defaults_and_examples(script: str) -> None:
  done = launch(script, '--help')
  assert done.stderr == '' and launch(script, '-h').stdout == done.stdout
  helped.check_text(done.stdout)
  text = ' '.join(done.stdout.split())
  defaults = re.findall(r'Default: ([^ ]*[^ .,])', text)
  assert set(_SCRIPTS[script]) <= set(defaults)
  own = re.findall(r'^ +(--\w+)(?:=\*)?\)', (FOLDER / script).read_text(), re.M)
  if 'shared_flag' in (FOLDER / script).read_text():
    own += ['--max_restarts', '--pause', '--dry_run']
  for flag in [*own, '-h, --help']:
    assert re.search(rf'^  {flag}\b', done.stdout, re.M), flag


@pytest.mark.parametrize('script', _SCRIPTS)
def test_examples_of_the_help_run_dry(script: str) -> None:
  for words in helped.examples(launch(script, '-h').stdout):
    place = [i for i, w in enumerate(words) if w.endswith(f'/{script}')]
    arguments = words[place[0] + 1 :]
    if '--' in arguments:
      done = launch(script, '--dry_run', *arguments)
      command = shlex.join(arguments[arguments.index('--') + 1 :])
      assert command in done.stdout.replace("'\\''", "'")
    for word in arguments:
      if word.startswith('--config='):
        recipe.load(f'{helped.ROOT}/{word.removeprefix("--config=")}')


def test_help_is_answered_after_other_flags_and_before_the_command() -> None:
  assert launch('local.sh', '--port=x', '-h').stdout.startswith('usage: ')
  done = launch(
      'local.sh', '--num_processes=1', '--dry_run', '--', 'echo', '--help'
  )
  assert done.stdout.startswith('echo --help --coordinator_address=')
