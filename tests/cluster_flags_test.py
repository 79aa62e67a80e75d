"""The flags of a cluster reach the place that joins it."""

from absl import flags
from absl.testing import flagsaver
import pytest

from ma_rlhf_jax import cluster_flags
from ma_rlhf_jax.parallel import cluster


@pytest.mark.parametrize(
    ('arguments', 'want'),
    [
        ([], cluster.Cluster()),
        (
            [
                '--coordinator_address=10.0.0.1:99',
                '--num_processes=3',
                '--process_id=2',
                '--initialization_timeout=7',
            ],
            cluster.Cluster('10.0.0.1:99', 3, 2, 7),
        ),
    ],
)
def test_each_flag_reaches_its_field(
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    want: cluster.Cluster,
) -> None:
  given = []
  monkeypatch.setattr(cluster, 'initialize', given.append)
  with flagsaver.flagsaver():
    flags.FLAGS(['train', *arguments], known_only=True)
    cluster_flags.initialize()
  assert given == [want]
