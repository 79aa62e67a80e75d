"""Joining the other processes of a run, before any device is touched."""

from collections.abc import Mapping
import dataclasses
import glob
import importlib.util
import os
import socket
import sys
import threading

import jax

from ma_rlhf_jax.parallel import processes

# What srun sets for each of its processes, and jax reads.
_SLURM = (
    'SLURM_JOB_ID',
    'SLURM_STEP_NODELIST',
    'SLURM_NTASKS',
    'SLURM_PROCID',
    'SLURM_LOCALID',
)
_CHIPS = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
# What jax gets more of than the watch: it ends the process without a word.
_GRACE = 60  # seconds


class ClusterError(ValueError):
  """The processes cannot be joined as the flags say."""


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The processes of a run.

  Attributes:
    coordinator_address: host:port of process 0; '' = found out.
    num_processes: in all; 0 = found out.
    process_id: of this one, from 0; -1 = found out.
    initialization_timeout: seconds in which all must have come.
  """

  coordinator_address: str = ''
  num_processes: int = 0
  process_id: int = -1
  initialization_timeout: int = 300


def check(cluster: Cluster) -> None:
  """Raises ClusterError on flags that do not go together."""
  c = cluster
  given = {
      '--coordinator_address': bool(c.coordinator_address),
      '--num_processes': c.num_processes != 0,
      '--process_id': c.process_id != -1,
  }
  problems = []
  if any(given.values()) and not all(given.values()):
    missing = [flag for flag, is_given in given.items() if not is_given]
    problems.append(
        f'{", ".join(missing)} missing: give all of {", ".join(given)}, or '
        'none on TPU and under srun'
    )
  host, _, port = c.coordinator_address.rpartition(':')
  if c.coordinator_address and not (
      host and port.isdecimal() and 0 < int(port) < 2**16
  ):
    problems.append(
        f'--coordinator_address={c.coordinator_address}: needs host:port of '
        'process 0, 10.0.0.1:8476 for example'
    )
  if all(given.values()) and not 0 <= c.process_id < c.num_processes:
    problems.append(
        f'--process_id={c.process_id}: must be at least 0 and below '
        f'--num_processes={c.num_processes}'
    )
  if c.initialization_timeout < 1:
    problems.append(
        f'--initialization_timeout={c.initialization_timeout}: must be at '
        'least 1 second'
    )
  if problems:
    raise ClusterError('\n'.join(problems))


def initialize(cluster: Cluster) -> None:
  """Joins the other processes, if there are any; to be called first.

  What the flags leave out is found out on TPU pods and under Slurm's srun.
  Only the first process prints to standard output afterwards.

  Raises:
    ClusterError: if the flags are wrong, or the coordinator cannot start. Where
      processes do not come in time, this one ends with exit code 75.
  """
  check(cluster)
  given = {}
  if cluster.coordinator_address:
    given = {
        'coordinator_address': cluster.coordinator_address,
        'num_processes': cluster.num_processes,
        'process_id': cluster.process_id,
        # Else srun's variables give each process one GPU only.
        'cluster_detection_method': 'deactivate',
    }
    _check_host(cluster)
  elif under_slurm(os.environ):
    given = {'cluster_detection_method': 'slurm'}
  elif not on_tpu():
    return
  _connect(cluster, given)
  if jax.distributed.is_initialized():
    jax.devices()  # waits for the devices of all processes
    if not processes.is_first():
      sys.stdout = open(os.devnull, 'w')  # noqa: SIM115 - until the end


def under_slurm(environment: Mapping[str, str]) -> bool:
  """Whether srun has started this process as one of several."""
  return all(name in environment for name in _SLURM) and (
      int(environment['SLURM_NTASKS']) > 1
  )


def on_tpu() -> bool:
  """Whether this host has TPU chips that jax will use."""
  platforms = os.environ.get('JAX_PLATFORMS', '')
  return (
      platforms in ('', 'tpu', 'tpu,cpu')
      and importlib.util.find_spec('libtpu') is not None
      and any(glob.glob(pattern) for pattern in _CHIPS)
  )


def _check_host(cluster: Cluster) -> None:
  host, _, port = cluster.coordinator_address.rpartition(':')
  try:
    socket.getaddrinfo(host.strip('[]'), int(port))
  except OSError as error:
    raise ClusterError(
        f'--coordinator_address={cluster.coordinator_address}, process '
        f'{cluster.process_id}: no address belongs to {host!r} ({error}); give '
        'the name or the IP of the host of process 0'
    ) from error


def _connect(cluster: Cluster, given: dict) -> None:
  """`jax.distributed.initialize`, watched."""
  # On CPUs two programs that wait for other processes may else run in another
  # order there, and wait for each other for good. No accelerator does that.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  watch = threading.Timer(cluster.initialization_timeout, _give_up, [cluster])
  watch.daemon = True
  watch.start()
  try:
    jax.distributed.initialize(
        **given, initialization_timeout=cluster.initialization_timeout + _GRACE
    )
  except ValueError as error:
    # One TPU host without the metadata of a pod: nobody else is there.
    if given or 'should be defined' not in str(error):
      raise
  except RuntimeError as error:
    if not cluster.coordinator_address:
      raise ClusterError(
          f'the processes of this pod or job cannot be joined: {error}'
      ) from error
    raise ClusterError(
        f'process {cluster.process_id} cannot serve at --coordinator_address='
        f'{cluster.coordinator_address} ({error}); choose a free port, the '
        'same for all processes, or set '
        'JAX_COORDINATOR_BIND_ADDRESS=0.0.0.0:PORT where there is no IPv6'
    ) from error
  finally:
    watch.cancel()


def _give_up(cluster: Cluster) -> None:
  print(f'error: {_why(cluster)}', file=sys.stderr, flush=True)
  os._exit(processes.EXIT_AGAIN)


def _why(cluster: Cluster) -> str:
  """What was waited for, and what helps."""
  seconds = cluster.initialization_timeout
  fix = 'raise --initialization_timeout if hosts start slowly'
  if not cluster.coordinator_address:
    variables = ', '.join(
        f'{name}={os.environ[name]}' for name in _SLURM if name in os.environ
    )
    return (
        f'the processes of this pod or job did not all come in {seconds} s '
        f'({variables or "TPU"}); start the same command on every host, and '
        f'see the logs of the others; {fix}'
    )
  where = (
      f'process {cluster.process_id} of {cluster.num_processes} at '
      f'--coordinator_address={cluster.coordinator_address}'
  )
  if not _listens(cluster.coordinator_address):
    return (
        f'{where}: nothing listens there after {seconds} s; start process 0 on '
        'that host with the same address, and open the port in its firewall; '
        f'{fix}'
    )
  return (
      f'{where}: not all {cluster.num_processes} processes came in {seconds} '
      's; start one for each --process_id from 0 to '
      f'{cluster.num_processes - 1}, and see the logs of the others; {fix}'
  )


def _listens(address: str) -> bool:
  host, _, port = address.rpartition(':')
  try:
    socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
  except OSError:
    return False
  return True
