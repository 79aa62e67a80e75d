"""Weights that decode: where they lie, and what their program sends around."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.models import heads, presets
from ma_rlhf_jax.parallel import chips
from ma_rlhf_jax.parallel import mesh as mesh_lib
from ma_rlhf_jax.parallel.mesh import place
from ma_rlhf_jax.rollout import decode, layout, scoring, split
from ma_rlhf_jax.structs import Params, PromptBatch, Rollout
from tests import tiny, tolerance

T = tiny.RESPONSE_LEN
SETTINGS = decode.SamplingSettings(T, tiny.EOS, tiny.PAD, temperature=0.9)
# Two kv heads of four; and one, whose cache is split by rows.
GROUPED = dataclasses.replace(tiny.SHAPE, num_heads=4, num_kv_heads=2)
SINGLE = dataclasses.replace(GROUPED, num_kv_heads=1)
PROMPTS = tiny.prompts([0, 1, 2, 4] * 2)


def _mesh(*shape: int) -> jax.sharding.Mesh:
  devices = np.array(jax.devices()[:8]).reshape(shape)
  types = (jax.sharding.AxisType.Auto,) * 3
  return jax.sharding.Mesh(devices, mesh_lib.AXES, axis_types=types)


def _drawn(
    shape: presets.GemmaConfig, mesh: jax.sharding.Mesh | None, tensor: int = 0
) -> Rollout:
  made = layout.make_layout(shape, mesh, tensor)
  key = jax.random.key(0)
  how = {'layout': made, 'settings': SETTINGS}
  if mesh is None:
    params = heads.init_params('policy', shape, jax.random.key(7))
    return layout.sample_responses(params, PROMPTS, key, 3, **how)
  with jax.set_mesh(mesh):
    params = heads.init_params('policy', shape, jax.random.key(7))
    prompts: PromptBatch = place(PROMPTS, mesh)
    return layout.sample_responses(params, prompts, key, 3, **how)


_MESHES = [((8, 1, 1), 1), ((1, 8, 1), 2), ((1, 8, 1), 4), ((2, 2, 2), 4)]
_SHAPES = {'grouped': GROUPED, 'single': SINGLE}


@pytest.mark.parametrize(
    ('shape', 'axes', 'tensor'),
    [
        pytest.param(
            shape,
            axes,
            tensor,
            id=f'{axes} {tensor} {name}',
            marks=() if i == 3 and name == 'grouped' else pytest.mark.slow,
        )
        for i, (axes, tensor) in enumerate(_MESHES)
        for name, shape in _SHAPES.items()
    ],
)
def test_layouts_draw_the_same_tokens(
    shape: presets.GemmaConfig, axes: tuple[int, ...], tensor: int
) -> None:
  alone, split = _drawn(shape, None), _drawn(shape, _mesh(*axes), tensor)
  jax.tree.map(np.testing.assert_array_equal, split.sequences, alone.sequences)
  params = heads.init_params('policy', shape, jax.random.key(7))
  score = jax.jit(
      functools.partial(scoring.response_logprobs, shape, temperature=0.9)
  )
  bounds = tiny.rounding(lambda p: score(p, alone.sequences)[0], params)
  tolerance.assert_close(
      split.sample_logprobs_BT, alone.sample_logprobs_BT, bounds
  )


def test_a_stack_of_layers_moves_as_it_is() -> None:
  mesh = _mesh(2, 2, 2)
  made = layout.make_layout(GROUPED, mesh, 4)
  stacked = dataclasses.replace(made.config, unrolled=False)
  made = dataclasses.replace(made, config=stacked)
  with jax.set_mesh(mesh):
    params = heads.init_params('policy', GROUPED, jax.random.key(7))
    found = layout.to_decode(params, layout=made)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  kernel = found['layers']['attention']['query']
  spec = jax.sharding.PartitionSpec(None, None, 'tensor')
  want = jax.sharding.NamedSharding(made.mesh, spec)
  assert kernel.sharding.is_equivalent_to(want, kernel.ndim)


def test_the_weights_of_a_layer_are_its_own_and_cast() -> None:
  shape = dataclasses.replace(tiny.SHAPE, dtype='bfloat16')
  params = heads.init_params('policy', shape, jax.random.key(7))
  made = layout.make_layout(shape, None)
  found = layout.to_decode(params, layout=made)
  kernel = params['layers']['mlp']['up'][1].astype(jnp.bfloat16)
  np.testing.assert_array_equal(found['layer_1']['mlp']['up'], kernel)
  assert found['final_norm']['scale'].dtype == jnp.float32
  assert found['embedding'].dtype == jnp.bfloat16


def test_without_a_number_the_fastest_split_is_taken() -> None:
  shape = dataclasses.replace(presets.PRESETS['gemma-7b'], dtype='bfloat16')
  mesh, rows = _mesh(1, 8, 1), {'rows': 64, 'columns': 1024}
  found = layout.make_layout(shape, mesh, **rows).mesh.shape['tensor']
  work = split.Decoding(shape, (1, 8, 1), 64, 1024)
  # CPUs have no datasheet and count as v5e.
  assert found == split.fastest(work, chips.TPUS['v5e']) == 8
  assert layout.make_layout(shape, mesh, 2, **rows).mesh.shape['tensor'] == 2


def _gathered(text: str) -> list[int]:
  """Elements of what all-gathers of a compiled program give."""
  return [
      int(np.prod([int(n) for n in shape.split(',') if n]))
      for found in re.findall(r'= (\S+) all-gather(?:-start)?\(', text)
      for shape in re.findall(r'\w+\[([\d,]*)\]', found)
  ]


def _sizes(params: Params) -> list[int]:
  """Elements of each array but norms."""
  return [x.size for x in jax.tree.leaves(params) if x.ndim > 1]


@pytest.mark.parametrize(
    'axes', [(1, 8, 1), (1, 4, 2)], ids=lambda axes: str(axes)
)
def test_no_device_gets_more_of_a_weight_than_it_keeps(
    axes: tuple[int, ...],
) -> None:
  # All that is split has parts of equal size.
  shape = dataclasses.replace(GROUPED, num_kv_heads=4, mlp_dim=24)
  mesh = _mesh(*axes)
  made = layout.make_layout(shape, mesh, 4)
  with jax.set_mesh(mesh):
    params = heads.init_params('policy', shape, jax.random.key(7))
    function, copied = layout.decode_program(params, made)
    text = function.lower(copied).compile().as_text()
  assert 0 < max(_gathered(text)) <= max(_sizes(params)) // 4


def test_no_weight_moves_while_tokens_are_drawn() -> None:
  mesh = _mesh(1, 8, 1)
  made = layout.make_layout(GROUPED, mesh, 2)
  with jax.set_mesh(mesh):
    params = heads.init_params('policy', GROUPED, jax.random.key(7))
    decoding = layout.to_decode(params, layout=made)
    lowered = layout.draw.lower(
        decoding,
        place(PROMPTS, mesh),
        jax.random.key(0),
        0,
        layout=made,
        settings=SETTINGS,
    )
  gathered = _gathered(lowered.compile().as_text())
  assert max(gathered, default=0) < min(_sizes(decoding)) / 2
  want = layout.abstract_params(params, made)
  same = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
  assert jax.tree.all(jax.tree.map(same, decoding, want))


def test_a_copy_must_lie_on_devices_that_divide_the_mesh() -> None:
  with pytest.raises(ValueError, match=r'rollout.tensor=3 must divide the 8'):
    layout.make_layout(GROUPED, _mesh(1, 8, 1), 3)
