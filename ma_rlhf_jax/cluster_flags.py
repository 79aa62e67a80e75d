"""The flags that name the processes of a run, for commands of several hosts."""

from absl import flags

from ma_rlhf_jax.commands import absl_flags, verbs
from ma_rlhf_jax.parallel import cluster

absl_flags.define(verbs.PROCESSES)


def initialize() -> None:
  """Joins the processes that the flags name; see `cluster.initialize`."""
  values = {flag.name: flags.FLAGS[flag.name].value for flag in verbs.PROCESSES}
  cluster.initialize(cluster.Cluster(**values))
