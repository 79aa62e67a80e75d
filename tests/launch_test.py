"""The launchers: their commands, and what they refuse."""

import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.launching import BASH, FOLDER, QUEUED, ROOT, TRAIN, launch

_TPU = ('--tpu=my-pod', '--zone=us-east5-a')


def _commands(text: str) -> list[list[str]]:
  return [shlex.split(line) for line in text.splitlines()]


def test_shellcheck_finds_nothing() -> None:
  beside = pathlib.Path(sys.executable).with_name('shellcheck')
  shellcheck = beside if beside.exists() else shutil.which('shellcheck')
  assert shellcheck, "pip install -e '.[test]' brings shellcheck"
  scripts = [*sorted(FOLDER.glob('*.sh')), ROOT / '.ci' / 'run']
  assert len(scripts) >= 10
  done = subprocess.run(
      [str(shellcheck), '--external-sources', *map(str, scripts)],
      cwd=ROOT,
      capture_output=True,
      text=True,
  )
  assert done.returncode == 0, done.stdout


def test_local_prints_a_command_for_each_process() -> None:
  done = launch(
      'local.sh',
      '--num_processes=2',
      '--gpus_per_process=4',
      '--port=9',
      '--dry_run',
      *TRAIN,
  )
  shared = 'python -m ma_rlhf_jax.train'.split() + ['--config=a b.py']
  shared += ['--coordinator_address=127.0.0.1:9', '--num_processes=2']
  assert _commands(done.stdout) == [
      ['env', 'CUDA_VISIBLE_DEVICES=0,1,2,3', *shared, '--process_id=0'],
      ['env', 'CUDA_VISIBLE_DEVICES=4,5,6,7', *shared, '--process_id=1'],
  ]


def test_slurm_prints_the_step_of_a_job() -> None:
  done = launch('slurm.sh', '--dry_run', *TRAIN)
  assert _commands(done.stdout) == [
      [
          *('srun', '--kill-on-bad-exit=1', '--gpu-bind=none', 'bash'),
          str(FOLDER / 'slurm_task.sh'),
          str(ROOT / '.slurm-JOB.failed'),
          *TRAIN[1:],
      ],
      ['scontrol', 'requeue', 'JOB'],
  ]


def _tpu_commands(archive: str) -> list[list[str]]:
  """What tpu_vm.sh runs with --install."""
  gcloud = ['gcloud', 'compute', 'tpus', 'tpu-vm']
  where = ['--zone=us-east5-a', '--worker=all']
  return [
      *(
          ['git', '-C', str(ROOT), 'archive', '--format=tar.gz']
          + [f'--output={archive}', 'HEAD'],
      ),
      [*gcloud, 'scp', archive, 'my-pod:ma_rlhf_jax.tar.gz', *where],
      [*gcloud, 'ssh', 'my-pod', *where]
      + [
          '--command=mkdir -p ma_rlhf_jax && tar -xzf ma_rlhf_jax.tar.gz -C '
          'ma_rlhf_jax && cd ma_rlhf_jax && source launch/setup_venv.sh && '
          'ensure_venv tpu'
      ],
      [*gcloud, 'ssh', 'my-pod', *where]
      + [
          '--command=cd ma_rlhf_jax && exec bash launch/tpu_worker.sh python '
          "-m ma_rlhf_jax.train '--config=a b.py'"
      ],
  ]


def test_tpu_vm_prints_what_all_workers_run() -> None:
  done = launch('tpu_vm.sh', *_TPU, '--install', '--dry_run', *TRAIN)
  want = _tpu_commands('/tmp/ma_rlhf_jax.tar.gz')
  assert _commands(done.stdout) == want
  done = launch('tpu_vm.sh', *_TPU, '--project=mine', '--dry_run', *TRAIN)
  (command,) = _commands(done.stdout)
  assert command == [*want[3][:6], '--zone=us-east5-a', '--project=mine'] + (
      want[3][7:]
  )


def test_queued_tpu_prints_create_run_and_delete() -> None:
  done = launch('tpu_queued.sh', *QUEUED, '--spot', '--dry_run', *TRAIN)
  queued = ['gcloud', 'alpha', 'compute', 'tpus', 'queued-resources']
  where = ['my-pod', '--zone=us-east5-a']
  assert _commands(done.stdout) == [
      [*queued, 'describe', *where, '--format=value(state.state)'],
      [*queued, 'create', *where, '--node-id=my-pod']
      + ['--accelerator-type=v5p-32', '--runtime-version=v2-alpha-tpuv5']
      + ['--autocheckpoint-enabled', '--spot'],
      *_tpu_commands('/tmp/ma_rlhf_jax.tar.gz'),
      [*queued, 'delete', *where, '--force', '--quiet'],
  ]
  kept = launch('tpu_queued.sh', *QUEUED, '--keep', '--dry_run', *TRAIN)
  assert '--spot' not in kept.stdout and ' delete ' not in kept.stdout


@pytest.mark.parametrize(
    'word', ["it's", '$HOME', 'a;b', '`id`', 'a\nb', '*', '', '"', '\\', 'ü']
)
def test_any_word_arrives_as_it_was_given(word: str) -> None:
  done = launch('tpu_vm.sh', *_TPU, '--dry_run', '--', 'python', word)
  # The first shell is the user's, the second that of the worker.
  show = 'for word; do printf "%s\\0" "$word"; done'
  script = f'set -- {done.stdout}\n{show}'
  first = subprocess.run([BASH, '-c', script], capture_output=True, text=True)
  remote = first.stdout.split('\0')[-2].removeprefix('--command=cd ')
  command = remote.partition('tpu_worker.sh ')[2]
  second = subprocess.run(
      [BASH, '-c', f'set -- {command}\n{show}'], capture_output=True, text=True
  )
  assert second.stdout == f'python\0{word}\0'


@pytest.mark.parametrize(
    ('script', 'arguments', 'words'),
    [
        ('local.sh', ['--num_processes=0'], '--num_processes=0: give a whole'),
        ('local.sh', [], '--num_processes=: give a whole number from 1'),
        ('local.sh', ['--num_processes=2', '--port=70000'], '1 to 65535'),
        ('local.sh', ['--num_processes=08', '--port=x'], '--port=x: give'),
        ('local.sh', ['--num_process=2'], '--num_process=2: no such flag'),
        ('local.sh', ['python'], 'python: no such flag'),
        ('slurm.sh', ['--max_restarts=-1'], '--max_restarts=-1: give a whole'),
        ('slurm.sh', [], 'this is no job of Slurm: submit it by sbatch'),
        ('tpu_vm.sh', ['--zone=z'], '--tpu=: give a name of letters'),
        ('tpu_vm.sh', ['--tpu=a;b', '--zone=z'], '--tpu=a;b: give a name'),
        ('tpu_vm.sh', ['--tpu=-x', '--zone=z'], '--tpu=-x: give a name'),
        ('tpu_queued.sh', ['--name=n', '--zone=z'], '--accelerator_type=:'),
        ('tpu_queued.sh', [*QUEUED, '--poll=a'], '--poll=a: give a whole'),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_right(
    script: str, arguments: list[str], words: str
) -> None:
  done = launch(script, *arguments, *TRAIN, returncode=2)
  assert done.stderr.startswith('error: ') and words in done.stderr
  assert done.stdout == ''


@pytest.mark.parametrize(
    ('script', 'arguments'),
    [
        ('local.sh', ['--num_processes=2']),
        ('slurm.sh', ['--dry_run']),
        ('tpu_vm.sh', _TPU),
        ('tpu_queued.sh', QUEUED),
    ],
)
def test_without_a_command_one_is_shown(
    script: str, arguments: list[str]
) -> None:
  done = launch(script, *arguments, returncode=2)
  assert 'no command: end the line with -- python' in done.stderr
