"""Tests of `models.tensor_names`."""

import numpy as np

from ma_rlhf_jax.models import heads
from ma_rlhf_jax.models.tensor_names import list_tensors, to_ours, to_theirs
from tests.models.drawn import TINY


def test_layouts_by_hand() -> None:
  # [D, N, H] = [2, 1, 3] -> [N * H, D], and [N, H, D] = [1, 3, 2] -> [D, N * H]
  x = np.array([[[1, 2, 3]], [[4, 5, 6]]])
  theirs = to_theirs(x, 1)
  np.testing.assert_array_equal(theirs, [[1, 4], [2, 5], [3, 6]])
  np.testing.assert_array_equal(to_ours(theirs, 1, x.shape), x)
  x = np.array([[[1, 2], [3, 4], [5, 6]]])
  theirs = to_theirs(x, 2)
  np.testing.assert_array_equal(theirs, [[1, 3, 5], [2, 4, 6]])
  np.testing.assert_array_equal(to_ours(theirs, 2, x.shape), x)
  np.testing.assert_array_equal(to_theirs(x, 0), x)


def test_every_parameter_has_a_tensor() -> None:
  for kind in heads.MODELS:
    tensors = list_tensors(kind, TINY)
    assert len({t.name for t in tensors}) == len(tensors)
    count = sum(int(np.prod(t.shape)) for t in tensors)
    assert count == TINY.num_params + (24 if kind == 'scalar' else 0)
  shapes = {t.name: t.shape for t in tensors}
  assert shapes['model.layers.2.self_attn.q_proj.weight'] == (40, 24)
  assert shapes['model.layers.2.self_attn.k_proj.weight'] == (20, 24)
  assert shapes['model.layers.2.self_attn.o_proj.weight'] == (24, 40)
  assert shapes['model.layers.2.mlp.down_proj.weight'] == (24, 36)
  assert shapes['score.weight'] == (1, 24)


def test_names_of_backbone_and_head_can_be_others() -> None:
  tensors = list_tensors('scalar', TINY, prefix='x.', head='y')
  found = {(t.name, t.path, t.layer) for t in tensors}
  assert ('y', 'head', None) in found
  assert ('x.norm.weight', 'backbone/final_norm/scale', None) in found
  up = ('x.layers.1.mlp.up_proj.weight', 'backbone/layers/mlp/up', 1)
  assert up in found
