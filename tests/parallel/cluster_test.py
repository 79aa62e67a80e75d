"""Who joins whom, and what is said where nobody comes."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from ma_rlhf_jax.parallel import cluster
from ma_rlhf_jax.parallel.cluster import Cluster

_ROOT = pathlib.Path(__file__).parents[2]
_STEP = {
    'SLURM_JOB_ID': '17',
    'SLURM_STEP_NODELIST': 'node[1-2]',
    'SLURM_NTASKS': '16',
    'SLURM_PROCID': '3',
    'SLURM_LOCALID': '3',
}


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        ({'num_processes': 2}, '--coordinator_address, --process_id missing'),
        ({'process_id': 0}, '--coordinator_address, --num_processes missing'),
        (
            {'coordinator_address': 'host', 'num_processes': 1},
            '--coordinator_address=host: needs host:port',
        ),
        ({'coordinator_address': 'host:0'}, 'host:0: needs host:port'),
        ({'coordinator_address': ':80'}, ':80: needs host:port'),
        ({'coordinator_address': 'h:70000'}, 'h:70000: needs host:port'),
        (
            {
                'coordinator_address': 'h:1',
                'num_processes': 2,
                'process_id': 2,
            },
            '--process_id=2: must be at least 0 and below --num_processes=2',
        ),
        ({'initialization_timeout': 0}, '--initialization_timeout=0: must be'),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    fields: dict, words: str
) -> None:
  with pytest.raises(cluster.ClusterError) as error:
    cluster.check(Cluster(**fields))
  assert words in str(error.value)


def test_all_or_no_flags_are_right() -> None:
  cluster.check(Cluster())
  cluster.check(Cluster('[::1]:80', 2, 1))


def test_a_process_of_its_own_joins_nobody() -> None:
  cluster.initialize(Cluster())
  assert not jax.distributed.is_initialized()


def test_a_step_of_slurm_is_known_by_what_srun_sets() -> None:
  assert cluster.under_slurm(_STEP)
  assert not cluster.under_slurm(_STEP | {'SLURM_NTASKS': '1'})
  # In the batch script itself, and in salloc's shell, there is no step.
  assert not cluster.under_slurm(
      {k: v for k, v in _STEP.items() if k != 'SLURM_STEP_NODELIST'}
  )


def test_chips_count_only_where_jax_would_use_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(cluster.glob, 'glob', lambda _: ['/dev/accel0'])
  monkeypatch.setattr(cluster.importlib.util, 'find_spec', lambda _: object())
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert not cluster.on_tpu()
  monkeypatch.setenv('JAX_PLATFORMS', '')
  assert cluster.on_tpu()
  monkeypatch.setattr(cluster.glob, 'glob', lambda _: [])
  assert not cluster.on_tpu()


def test_an_unknown_host_is_named_at_once() -> None:
  with pytest.raises(cluster.ClusterError) as error:
    cluster.initialize(Cluster('no-host.invalid:99', 2, 1))
  for word in ('no-host.invalid:99', 'process 1', 'IP of the host'):
    assert word in str(error.value)


def test_what_was_waited_for_is_told() -> None:
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
    told = cluster._why(Cluster(address, 4, 1, 20))
  assert told.startswith(
      f'process 1 of 4 at --coordinator_address={address}: not all 4 processes '
      'came in 20 s; start one for each --process_id from 0 to 3'
  )


def test_under_slurm_the_variables_of_the_step_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  for name, value in _STEP.items():
    monkeypatch.setenv(name, value)
  told = cluster._why(Cluster(initialization_timeout=9))
  assert 'did not all come in 9 s' in told and 'SLURM_PROCID=3' in told


def test_where_nothing_listens_the_process_ends_with_words() -> None:
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
  code = (
      'from ma_rlhf_jax.parallel import cluster\n'
      f'cluster.initialize(cluster.Cluster({address!r}, 2, 1, 1))'
  )
  done = subprocess.run(
      [sys.executable, '-c', code],
      env={**os.environ, 'PYTHONPATH': str(_ROOT)},
      capture_output=True,
      text=True,
      timeout=60,
  )
  assert done.returncode == 75
  assert done.stderr.startswith(
      f'error: process 1 of 2 at --coordinator_address={address}: nothing '
      'listens there after 1 s; start process 0 on that host'
  )
