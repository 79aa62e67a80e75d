"""The flags that name the processes of a run, for commands of several hosts."""

from absl import flags

from ma_rlhf_jax.parallel import cluster

_ADDRESS = flags.DEFINE_string(
    'coordinator_address',
    '',
    'host:port of process 0, for several processes on GPUs or CPUs. TPU pods '
    'and srun need none of these flags.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes', 0, 'Processes in all; with --coordinator_address.'
)
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', -1, 'Which one this is, from 0; with --coordinator_address.'
)
_TIMEOUT = flags.DEFINE_integer(
    'initialization_timeout', 300, 'Seconds in which all processes must come.'
)


def initialize() -> None:
  """Joins the processes that the flags name; see `cluster.initialize`."""
  cluster.initialize(
      cluster.Cluster(
          coordinator_address=_ADDRESS.value,
          num_processes=_NUM_PROCESSES.value,
          process_id=_PROCESS_ID.value,
          initialization_timeout=_TIMEOUT.value,
      )
  )
