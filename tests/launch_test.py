"""The launchers: their commands, their checks, and when they run again."""

from collections.abc import Callable
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_LAUNCH = _ROOT / 'launch'
_TRAIN = ('--', 'python', '-m', 'ma_rlhf_jax.train', '--config=a b.py')
_TPU = ('--tpu=my-pod', '--zone=us-east5-a')
_QUEUED = (
    '--name=my-pod',
    '--zone=us-east5-a',
    '--accelerator_type=v5p-32',
    '--runtime_version=v2-alpha-tpuv5',
)
_BASH = shutil.which('bash')


def _launch(
    script: str,
    *arguments: str,
    returncode: int = 0,
    path: pathlib.Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess:
  """Runs a launcher; commands of the folder `path` come first."""
  env = {k: v for k, v in os.environ.items() if not k.startswith('SLURM_')}
  if path is not None:
    env['PATH'] = f'{path}:{env["PATH"]}'
  done = subprocess.run(
      [_BASH, str(_LAUNCH / script), *arguments],
      env=env | environment,
      capture_output=True,
      text=True,
      timeout=60,
  )
  assert done.returncode == returncode, done.stdout + done.stderr
  return done


def _commands(text: str) -> list[list[str]]:
  return [shlex.split(line) for line in text.splitlines()]


def test_shellcheck_finds_nothing() -> None:
  beside = pathlib.Path(sys.executable).with_name('shellcheck')
  shellcheck = beside if beside.exists() else shutil.which('shellcheck')
  assert shellcheck, "pip install -e '.[test]' brings shellcheck"
  scripts = [*sorted(_LAUNCH.glob('*.sh')), _ROOT / '.ci' / 'run']
  assert len(scripts) >= 10
  done = subprocess.run(
      [str(shellcheck), '--external-sources', *map(str, scripts)],
      cwd=_ROOT,
      capture_output=True,
      text=True,
  )
  assert done.returncode == 0, done.stdout


def test_local_prints_a_command_for_each_process() -> None:
  done = _launch(
      'local.sh',
      '--num_processes=2',
      '--gpus_per_process=4',
      '--port=9',
      '--dry_run',
      *_TRAIN,
  )
  shared = 'python -m ma_rlhf_jax.train'.split() + ['--config=a b.py']
  shared += ['--coordinator_address=127.0.0.1:9', '--num_processes=2']
  assert _commands(done.stdout) == [
      ['env', 'CUDA_VISIBLE_DEVICES=0,1,2,3', *shared, '--process_id=0'],
      ['env', 'CUDA_VISIBLE_DEVICES=4,5,6,7', *shared, '--process_id=1'],
  ]


def test_slurm_prints_the_step_of_a_job() -> None:
  done = _launch('slurm.sh', '--dry_run', *_TRAIN)
  assert _commands(done.stdout) == [
      [
          *('srun', '--kill-on-bad-exit=1', '--gpu-bind=none', 'bash'),
          str(_LAUNCH / 'slurm_task.sh'),
          str(_ROOT / '.slurm-JOB.failed'),
          *_TRAIN[1:],
      ],
      ['scontrol', 'requeue', 'JOB'],
  ]


def _tpu_commands(archive: str) -> list[list[str]]:
  """What tpu_vm.sh runs with --install."""
  gcloud = ['gcloud', 'compute', 'tpus', 'tpu-vm']
  where = ['--zone=us-east5-a', '--worker=all']
  return [
      *(
          ['git', '-C', str(_ROOT), 'archive', '--format=tar.gz']
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
  done = _launch('tpu_vm.sh', *_TPU, '--install', '--dry_run', *_TRAIN)
  want = _tpu_commands('/tmp/ma_rlhf_jax.tar.gz')
  assert _commands(done.stdout) == want
  done = _launch('tpu_vm.sh', *_TPU, '--project=mine', '--dry_run', *_TRAIN)
  (command,) = _commands(done.stdout)
  assert command == [*want[3][:6], '--zone=us-east5-a', '--project=mine'] + (
      want[3][7:]
  )


def test_queued_tpu_prints_create_run_and_delete() -> None:
  done = _launch('tpu_queued.sh', *_QUEUED, '--spot', '--dry_run', *_TRAIN)
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
  kept = _launch('tpu_queued.sh', *_QUEUED, '--keep', '--dry_run', *_TRAIN)
  assert '--spot' not in kept.stdout and ' delete ' not in kept.stdout


@pytest.mark.parametrize(
    'word', ["it's", '$HOME', 'a;b', '`id`', 'a\nb', '*', '', '"', '\\', 'ü']
)
def test_any_word_arrives_as_it_was_given(word: str) -> None:
  done = _launch('tpu_vm.sh', *_TPU, '--dry_run', '--', 'python', word)
  # The first shell is the user's, the second that of the worker.
  show = 'for word; do printf "%s\\0" "$word"; done'
  script = f'set -- {done.stdout}\n{show}'
  first = subprocess.run([_BASH, '-c', script], capture_output=True, text=True)
  remote = first.stdout.split('\0')[-2].removeprefix('--command=cd ')
  command = remote.partition('tpu_worker.sh ')[2]
  second = subprocess.run(
      [_BASH, '-c', f'set -- {command}\n{show}'], capture_output=True, text=True
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
        ('tpu_queued.sh', [*_QUEUED, '--poll=a'], '--poll=a: give a whole'),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_right(
    script: str, arguments: list[str], words: str
) -> None:
  done = _launch(script, *arguments, *_TRAIN, returncode=2)
  assert done.stderr.startswith('error: ') and words in done.stderr
  assert done.stdout == ''


@pytest.mark.parametrize(
    ('script', 'arguments'),
    [
        ('local.sh', ['--num_processes=2']),
        ('slurm.sh', ['--dry_run']),
        ('tpu_vm.sh', _TPU),
        ('tpu_queued.sh', _QUEUED),
    ],
)
def test_without_a_command_one_is_shown(
    script: str, arguments: list[str]
) -> None:
  done = _launch(script, *arguments, returncode=2)
  assert 'no command: end the line with -- python' in done.stderr


def _worker(folder: pathlib.Path, body: str) -> pathlib.Path:
  """A command that notes each of its starts, then does `body`.

  In `body`, $id is the number of the process and $start counts its starts.
  """
  path = folder / 'worker.sh'
  path.write_text(
      f'id="${{!#}}"; id="${{id##*=}}"; cd {folder}\n'
      'echo "$*" >>"starts-$id"; start="$(grep -c . "starts-$id")"\n'
      f'{body}\n'
  )
  return path


def _starts(folder: pathlib.Path, process: int) -> int:
  return len((folder / f'starts-{process}').read_text().splitlines())


_LOCAL = ('--num_processes=2', '--pause=0', '--grace=0', '--max_restarts=3')


@pytest.mark.parametrize('code', [75, 134, 137, 143, 255])
def test_local_goes_on_after_what_preemption_leaves(
    tmp_path: pathlib.Path, code: int
) -> None:
  worker = _worker(tmp_path, f'((start == 3)) || exit {code}')
  done = _launch('local.sh', *_LOCAL, '--', _BASH, str(worker), '--seed=1')
  assert f'ended with {code}; restart 2 of 3 in 0 s' in done.stderr
  line = '--seed=1 --coordinator_address=127.0.0.1:8476 --num_processes=2 '
  for i in range(2):
    lines = (tmp_path / f'starts-{i}').read_text().splitlines()
    assert lines == [f'{line}--process_id={i}'] * 3


@pytest.mark.parametrize('code', [1, 2, 130])
def test_local_ends_with_an_error_that_would_come_again(
    tmp_path: pathlib.Path, code: int
) -> None:
  worker = _worker(tmp_path, f'((id == 0)) && exit {code}; exec sleep 30')
  start = time.monotonic()
  _launch('local.sh', *_LOCAL, '--', _BASH, str(worker), returncode=code)
  # The others are not waited for, beyond --grace.
  assert time.monotonic() - start < 15
  assert _starts(tmp_path, 0) == 1


def test_local_gives_up_after_so_many_restarts(tmp_path: pathlib.Path) -> None:
  worker = _worker(tmp_path, 'exit 75')
  done = _launch('local.sh', *_LOCAL, '--', _BASH, str(worker), returncode=75)
  assert 'no restart is left of --max_restarts=3' in done.stderr
  assert _starts(tmp_path, 1) == 4


def test_local_passes_a_signal_on_and_does_not_go_on(
    tmp_path: pathlib.Path,
) -> None:
  worker = _worker(
      tmp_path,
      "trap 'touch saved-$id; exit 75' TERM; touch ready-$id\n"
      'while true; do sleep 0.05; done',
  )
  command = [_BASH, str(_LAUNCH / 'local.sh'), *_LOCAL, '--grace=20', '--']
  process = subprocess.Popen([*command, _BASH, str(worker)])
  try:
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob('ready-*'))) < 2:
      assert time.monotonic() < deadline
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
  finally:
    process.kill()
  assert len(list(tmp_path.glob('saved-*'))) == 2
  assert _starts(tmp_path, 0) == 1


def _fake(folder: pathlib.Path, name: str, body: str) -> None:
  """A command that notes its arguments in `calls`, then does `body`."""
  path = folder / name
  path.write_text(
      f'#!{_BASH}\nprintf "%s" {name} >>"{folder}/calls"\n'
      f'printf " %s" "$@" >>"{folder}/calls"; echo >>"{folder}/calls"\n'
      f'{body}\n'
  )
  path.chmod(0o755)


def _calls(folder: pathlib.Path) -> list[str]:
  return (folder / 'calls').read_text().splitlines()


def test_the_header_of_the_slurm_job_is_what_jax_needs() -> None:
  header = dict(
      re.match(r'#SBATCH --([a-z-]+)(?:=(\S+))?$', line).groups()
      for line in (_LAUNCH / 'slurm.sh').read_text().splitlines()
      if line.startswith('#SBATCH')
  )
  assert set(header) == {
      *('job-name', 'nodes', 'ntasks-per-node', 'gpus-per-node'),
      *('cpus-per-task', 'time', 'output', 'open-mode', 'requeue', 'signal'),
  }
  # A process for each GPU, as jax shares them out.
  assert header['ntasks-per-node'] == header['gpus-per-node']
  # To the processes, not to the script (which B: would name).
  assert header['signal'] == 'TERM@120'
  assert header['open-mode'] == 'append'  # a log goes on after a restart
  # Slurm reads no further than the first command.
  lines = (_LAUNCH / 'slurm.sh').read_text().splitlines()
  first = next(i for i, x in enumerate(lines) if x and not x.startswith('#'))
  assert not any(x.startswith('#SBATCH') for x in lines[first:])


@pytest.mark.parametrize(
    ('task', 'restarts', 'returncode', 'requeued'),
    [
        ('exit 0', 0, 0, False),
        ('exit 75', 0, 0, True),
        ('kill -KILL $$', 0, 0, True),
        ('exit 75', 10, 75, False),
        # srun tells 137 of those it killed; the first error counts.
        ('exit 1', 0, 1, False),
    ],
)
def test_a_slurm_job_queues_itself_again_after_preemption(
    tmp_path: pathlib.Path,
    task: str,
    restarts: int,
    returncode: int,
    requeued: bool,
) -> None:
  (tmp_path / 'launch').symlink_to(_LAUNCH)
  run = 'shift 2; "$@" && exit 0; code=$?; ((code == 1)) && exit 137'
  _fake(tmp_path, 'srun', f'{run}; exit "$code"')
  _fake(tmp_path, 'scontrol', '')
  _launch(
      'slurm.sh',
      *('--pause=0', '--', _BASH, '-c', task),
      returncode=returncode,
      path=tmp_path,
      SLURM_JOB_ID='17',
      SLURM_SUBMIT_DIR=str(tmp_path),
      SLURM_RESTART_COUNT=str(restarts),
  )
  assert ('scontrol requeue 17' in _calls(tmp_path)) == requeued
  assert not list(tmp_path.glob('.slurm-*'))


def test_slurm_tells_where_to_submit(tmp_path: pathlib.Path) -> None:
  done = _launch(
      'slurm.sh',
      *('--dry_run', '--', 'a'),
      returncode=2,
      SLURM_SUBMIT_DIR=str(tmp_path),
  )
  assert 'is not the checkout; run sbatch there' in done.stderr


def test_a_slurm_task_waits_for_its_command_when_told_to_stop(
    tmp_path: pathlib.Path,
) -> None:
  body = "trap 'touch saved; exit 75' TERM; kill -TERM $PPID $$; sleep 5"
  worker = _worker(tmp_path, body)
  failed = tmp_path / 'failed'
  _launch('slurm_task.sh', str(failed), _BASH, str(worker), returncode=75)
  assert (tmp_path / 'saved').exists() and not failed.exists()


# A queued resource whose states are the lines of `states`, one a look; the last
# one stays. The k-th command on the workers ends with the k-th of `codes`.
_GCLOUD = """
cd "$(dirname "$0")"
pop() {
  head -n 1 "$1"
  (($(wc -l <"$1") < 2)) || sed -i 1d "$1"
}
case "$*" in
  *describe*)
    state="$(pop states)"
    case "$state" in
      none) echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1 ;;
      broken) echo 'ERROR: no network' >&2; exit 1 ;;
      *) echo "$state" ;;
    esac ;;
  *tpu_worker.sh*) exit "$(pop codes)" ;;
esac
"""


@pytest.fixture
def queued(tmp_path: pathlib.Path) -> Callable[..., list[str]]:
  """Runs tpu_queued.sh; what it did, one word a call."""

  def run(states: str, codes: str, returncode: int, *flags: str) -> list[str]:
    _fake(tmp_path, 'gcloud', _GCLOUD)
    (tmp_path / 'states').write_text(states.replace(' ', '\n') + '\n')
    (tmp_path / 'codes').write_text(codes.replace(' ', '\n') + '\n')
    more = ('--pause=0', '--poll=0', '--max_restarts=2', *flags)
    _launch(
        'tpu_queued.sh',
        *(*_QUEUED, *more, *_TRAIN),
        returncode=returncode,
        path=tmp_path,
    )
    named = ('describe', 'create', 'delete', 'scp', 'ensure_venv', 'tpu_worker')
    return [next(n for n in named if n in call) for call in _calls(tmp_path)]

  return run


_RUN = ['scp', 'ensure_venv', 'tpu_worker']


def test_a_queued_tpu_is_made_waited_for_used_and_deleted(
    queued: Callable[..., list[str]],
) -> None:
  assert queued('none ACCEPTED PROVISIONING ACTIVE', '0', 0) == [
      *('describe', 'create', 'describe', 'describe', 'describe'),
      *_RUN,
      'delete',
  ]


def test_a_preempted_tpu_is_made_again_and_the_command_goes_on(
    queued: Callable[..., list[str]],
) -> None:
  # gcloud says 1 of a TPU that is gone, as of an error: the state tells.
  calls = queued('ACTIVE SUSPENDING SUSPENDED none ACTIVE', '1 0', 0)
  assert calls == [
      'describe',
      *_RUN,
      *('describe', 'describe', 'delete', 'describe', 'create', 'describe'),
      *_RUN,
      'delete',
  ]


def test_an_error_on_a_tpu_that_is_there_ends_it(
    queued: Callable[..., list[str]],
) -> None:
  assert queued('ACTIVE', '1', 1) == ['describe', *_RUN, 'describe', 'delete']


def test_a_lost_connection_is_made_again_but_not_for_ever(
    queued: Callable[..., list[str]],
) -> None:
  calls = queued('ACTIVE', '255', 255, '--keep')
  assert calls == ['describe', *_RUN, 'describe'] * 3


def test_no_answer_of_gcloud_is_asked_again(
    queued: Callable[..., list[str]],
) -> None:
  calls = queued('broken ACTIVE', '0', 0, '--keep')
  assert calls == ['describe', 'describe', *_RUN]


def test_a_worker_ends_what_a_lost_connection_left(
    tmp_path: pathlib.Path,
) -> None:
  old = subprocess.Popen(['sleep', '60'], executable='/bin/sleep')
  named = subprocess.Popen(
      [_BASH, '-c', 'while true; do sleep 0.1; done', 'ma_rlhf_jax.train']
  )
  try:
    for process in (old, named):
      (tmp_path / '.ma_rlhf_jax.pid').write_text(f'{process.pid}\n')
      done = _launch(
          'tpu_worker.sh', _BASH, '-c', 'echo "$$"', HOME=str(tmp_path)
      )
      assert (tmp_path / '.ma_rlhf_jax.pid').read_text() == done.stdout
    assert named.wait(10) == -signal.SIGTERM
    assert old.poll() is None  # another program that got the number
  finally:
    old.kill()
    named.kill()
