"""The launchers run a command again after preemption, and only then.

gcloud, srun and scontrol are small scripts that stand in for them.
"""

from collections.abc import Callable
import pathlib
import re
import signal
import subprocess
import time

import pytest

from tests.launching import BASH, FOLDER, QUEUED, TRAIN, launch


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
  done = launch('local.sh', *_LOCAL, '--', BASH, str(worker), '--seed=1')
  assert f'ended with {code}; restart 2 of 3 in 0 s' in done.stderr
  line = '--seed=1 --coordinator_address=127.0.0.1:8476 --num_processes=2 '
  for i in range(2):
    lines = (tmp_path / f'starts-{i}').read_text().splitlines()
    assert lines == [f'{line}--process_id={i}'] * 3


@pytest.mark.parametrize('code', [1, 2, 130])
def test_local_ends_with_an_error_that_would_come_again(
    tmp_path: pathlib.Path, code: int
) -> None:
  outlived = tmp_path / 'outlived'
  worker = _worker(
      tmp_path,
      f'((id == 0)) && exit {code}; sleep 30 >/dev/null 2>&1; touch {outlived}',
  )
  launch('local.sh', *_LOCAL, '--', BASH, str(worker), returncode=code)
  # The others are not waited for, beyond --grace.
  assert not outlived.exists()
  assert _starts(tmp_path, 0) == 1


def test_local_gives_up_after_so_many_restarts(tmp_path: pathlib.Path) -> None:
  worker = _worker(tmp_path, 'exit 75')
  done = launch('local.sh', *_LOCAL, '--', BASH, str(worker), returncode=75)
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
  command = [BASH, str(FOLDER / 'local.sh'), *_LOCAL, '--grace=20', '--']
  process = subprocess.Popen([*command, BASH, str(worker)])
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
      f'#!{BASH}\nprintf "%s" {name} >>"{folder}/calls"\n'
      f'printf " %s" "$@" >>"{folder}/calls"; echo >>"{folder}/calls"\n'
      f'{body}\n'
  )
  path.chmod(0o755)


def _calls(folder: pathlib.Path) -> list[str]:
  return (folder / 'calls').read_text().splitlines()


def test_the_header_of_the_slurm_job_is_what_jax_needs() -> None:
  header = dict(
      re.match(r'#SBATCH --([a-z-]+)(?:=(\S+))?$', line).groups()
      for line in (FOLDER / 'slurm.sh').read_text().splitlines()
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
  lines = (FOLDER / 'slurm.sh').read_text().splitlines()
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
  (tmp_path / 'launch').symlink_to(FOLDER)
  run = 'shift 2; "$@" && exit 0; code=$?; ((code == 1)) && exit 137'
  _fake(tmp_path, 'srun', f'{run}; exit "$code"')
  _fake(tmp_path, 'scontrol', '')
  launch(
      'slurm.sh',
      *('--pause=0', '--', BASH, '-c', task),
      returncode=returncode,
      path=tmp_path,
      SLURM_JOB_ID='17',
      SLURM_SUBMIT_DIR=str(tmp_path),
      SLURM_RESTART_COUNT=str(restarts),
  )
  assert ('scontrol requeue 17' in _calls(tmp_path)) == requeued
  assert not list(tmp_path.glob('.slurm-*'))


def test_slurm_tells_where_to_submit(tmp_path: pathlib.Path) -> None:
  done = launch(
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
  launch('slurm_task.sh', str(failed), BASH, str(worker), returncode=75)
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
    launch(
        'tpu_queued.sh',
        *(*QUEUED, *more, *TRAIN),
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
      [BASH, '-c', 'while true; do sleep 0.1; done', 'ma_rlhf_jax.train']
  )
  try:
    for process in (old, named):
      (tmp_path / '.ma_rlhf_jax.pid').write_text(f'{process.pid}\n')
      done = launch(
          'tpu_worker.sh', BASH, '-c', 'echo "$$"', HOME=str(tmp_path)
      )
      assert (tmp_path / '.ma_rlhf_jax.pid').read_text() == done.stdout
    assert named.wait(10) == -signal.SIGTERM
    assert old.poll() is None  # another program that got the number
  finally:
    old.kill()
    named.kill()
