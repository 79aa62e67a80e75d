"""Names of slices, and what their networks carry."""

import pytest

from ma_rlhf_jax.planning import topology


def test_chips_and_devices() -> None:
  assert topology.parse('v5e:4x8').num_devices == 32
  half = topology.parse('tpu7x:2x2x2')
  assert (half.num_chips, half.num_devices) == (8, 16)
  box = topology.parse('gpu:h200:8')
  assert (box.platform, box.num_devices) == ('gpu', 8)
  assert topology.parse('gpu:l4').num_devices == 1


@pytest.mark.parametrize(
    ('name', 'gigabytes'),
    [
        ('v5e:8x8', 50 + 50),  # two lines, one link each
        ('v5e:16x16', 100 + 100),  # two rings, two links each
        ('v5e:8x16', 50 + 100),
        ('v5p:2x2x4', 3 * 100),
        ('v5p:4x4x4', 6 * 100),
        ('v5p:2x2x1', 2 * 100),
        ('v5e:1x1', 50),  # nothing is sent
        ('gpu:h100:8', 450),
    ],
)
def test_links_of_lines_and_rings(name: str, gigabytes: float) -> None:
  assert topology.parse(name).wire == gigabytes * 1e9


@pytest.mark.parametrize(
    ('name', 'mesh', 'can'),
    [
        ('v6e:8x8', (1, 16, 4), False),
        ('v6e:8x8', (1, 8, 8), True),
        ('v6e:4x8', (1, 4, 8), True),
        ('v5e:8x8', (1, 16, 4), True),
        ('v5p:2x2x4', (1, 4, 4), True),
        ('v5p:2x2x4', (2, 4, 2), True),
        ('v5p:4x4x4', (1, 32, 2), False),
        ('tpu7x:2x2x1', (1, 4, 2), True),
        ('gpu:h100:8', (1, 2, 4), True),
    ],
)
def test_a_mesh_takes_whole_axes_of_a_slice(
    name: str, mesh: tuple[int, ...], can: bool
) -> None:
  assert topology.parse(name).can_be_split(mesh) == can


@pytest.mark.parametrize(
    ('name', 'why'),
    [
        ('v5litepod-16', 'is unknown'),
        ('v5p-8', 'is unknown'),
        ('v5e', 'is unknown'),
        ('v5e:8', 'no slice 8'),
        ('v5e:32x32', 'no slice 32x32'),
        ('v5p:4x4', 'three axes'),
        ('v5p:3x3x3', 'must be even'),
        ('v5p:2x2x32', 'ends at 16x16x24'),
        ('', 'is needed'),
        ('gpu:a1000:1', "no GPU 'a1000'"),
        ('gpu:h100:0', "no number '0'"),
    ],
)
def test_a_name_that_is_none_is_told_with_those_that_are(
    name: str, why: str
) -> None:
  with pytest.raises(ValueError, match=why) as caught:
    topology.parse(name)
  for known in (name, 'v5e:4x8', '2x4', 'v5p:16x16x24', 'gpu:h200:8'):
    assert known in str(caught.value)
