"""Tests of `parallel.partition`, on eight CPU devices."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax.config_fields import KERNELS
from ma_rlhf_jax.models import gemma, heads, lora
from ma_rlhf_jax.models.presets import PRESETS, GemmaConfig, Lora
from ma_rlhf_jax.parallel.mesh import AXES, make_mesh, place
from ma_rlhf_jax.parallel.partition import (
    constrain,
    constrain_params,
    in_memory,
    indivisible,
    machine,
    merge_micro_batches,
    micro_batches,
    on_device,
    param_axes,
    param_spec,
    spec,
)
from tests import tolerance
from tests.models.drawn import (
    LENGTHS,
    ONE_KV_HEAD,
    TINY_2,
    draw,
    gradient_rounding,
    left_padded,
    loss,
    value_and_grad,
)

CONFIG = ONE_KV_HEAD  # it cannot be split, and need not be


@pytest.fixture(scope='module')
def mesh() -> Mesh:
  return make_mesh(ConfigDict({'data': 2, 'fsdp': 2, 'tensor': 2}))


def _abstract_mesh(*sizes: int) -> AbstractMesh:
  return AbstractMesh(sizes, AXES)


@pytest.mark.parametrize(
    ('told', 'want'),
    [
        (['7.5'], (7, 5)),
        (['8.6', '8.6'], (8, 6)),
        (['12.0', '8.9', '10.0'], (8, 9)),  # the lowest, and as numbers
        (['9.0', '9.0'], (9, 0)),
        (['10.0'], (10, 0)),
        (['gfx942'], None),  # AMD
        ([None, '9.0'], None),
    ],
)
def test_gpus_are_asked_for_their_capability(
    monkeypatch: pytest.MonkeyPatch,
    told: list[str | None],
    want: tuple[int, int] | None,
) -> None:
  devices = [
      types.SimpleNamespace(**({'compute_capability': t} if t else {}))
      for t in told
  ]
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cuda')
  monkeypatch.setattr(jax, 'devices', lambda backend: devices)
  assert machine() == ('gpu', want)


def test_other_platforms_have_no_capability() -> None:
  assert machine() == ('cpu', None)


def test_spec_by_hand() -> None:
  assert spec(('layers', 'embed', 'heads', 'head')) == PartitionSpec(
      None, 'fsdp', 'tensor', None
  )
  assert spec(('batch', None)) == PartitionSpec(('data', 'fsdp'), None)


def test_param_axes_by_hand() -> None:
  assert param_axes('embedding') == ('vocab', 'embed')
  assert param_axes('backbone/final_norm/scale') == ('norm',)
  assert param_axes('head') == ('embed',)
  assert param_axes('backbone/layers/mlp/up') == ('layers', 'embed', 'mlp')
  out = 'layers/attention/out'
  assert param_axes(out) == ('layers', 'heads', 'head', 'embed')
  assert param_axes(f'{out}_lora_a') == ('layers', 'heads', 'head', 'rank')
  assert param_axes(f'{out}_lora_b') == ('layers', 'rank', 'embed')


@pytest.mark.parametrize(
    ('preset', 'tensor', 'axis'),
    [
        ('gemma-2b', 2, None),  # one key head
        ('gemma-7b', 8, 'tensor'),  # sixteen
        ('gemma-2-2b', 4, 'tensor'),  # four
        ('gemma-2-2b', 8, None),
    ],
)
def test_key_heads_are_split_where_they_divide(
    preset: str, tensor: int, axis: str | None
) -> None:
  config, mesh = PRESETS[preset], _abstract_mesh(1, 4, tensor)
  shape = (config.num_layers, config.embed_dim, config.num_kv_heads, 256)
  want = PartitionSpec(None, 'fsdp', axis, None)
  assert param_spec('layers/attention/key', shape, mesh) == want


@pytest.mark.parametrize('preset', sorted(PRESETS))
def test_every_preset_is_split_evenly(preset: str) -> None:
  adapters = Lora(rank=8, alpha=8, targets=KERNELS)
  config = dataclasses.replace(PRESETS[preset], lora=adapters)
  flat = lora.flatten(heads.abstract_params('scalar', config))
  assert len(flat) == 3 * len(KERNELS) + (7 if config.post_norms else 5)
  # Chips along (data, fsdp, tensor).
  for sizes in ((1, 1, 8), (1, 256, 1), (4, 8, 8), (8, 64, 1)):
    mesh, found = _abstract_mesh(*sizes), set()
    for path, x in flat.items():
      split = param_spec(path, x.shape, mesh)
      NamedSharding(mesh, split).shard_shape(x.shape)  # raises where it cannot
      found |= set(split)
    assert found == {None, 'fsdp', 'tensor'}


def test_constraints_are_in_the_lowered_program(mesh: Mesh) -> None:
  def lowered() -> str:
    params = heads.abstract_params('policy', CONFIG)
    tokens, mask = left_padded(LENGTHS, 9)
    states = jax.jit(gemma.hidden_states, static_argnums=0)
    return states.lower(CONFIG, params, tokens, mask).as_text()

  assert 'sharding_constraint' not in lowered()
  with jax.set_mesh(mesh):
    rows = re.findall(
        r'sharding_constraint .*\[\{"data", "fsdp"\}, \{\}, \{\}\]', lowered()
    )
  assert len(rows) == 2  # what enters the layers, and what leaves each


def test_constrained_parameters_lie_as_they_do_in_a_state(mesh: Mesh) -> None:
  with jax.set_mesh(mesh):
    params = heads.abstract_params('scalar', CONFIG)
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    made = jax.jit(lambda: constrain_params(zeros()))()
  same = jax.tree.map(
      lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim),
      made,
      params,
  )
  assert all(jax.tree.leaves(same))


def test_an_unknown_axis_is_an_error() -> None:
  with pytest.raises(KeyError, match='wdith'):
    spec(('batch', 'wdith'))
  with pytest.raises(KeyError, match='querry'):
    param_axes('layers/attention/querry')


def test_without_a_mesh_nothing_is_constrained() -> None:
  x = jnp.asarray(np.ones((2, 3)))
  assert constrain(x, ('batch', 'width')) is x
  leaves = jax.tree.leaves(heads.abstract_params('scalar', CONFIG))
  assert all(leaf.sharding is None for leaf in leaves)


def test_parameters_are_split_as_named(mesh: Mesh) -> None:
  with jax.set_mesh(mesh):
    params = heads.abstract_params('scalar', CONFIG)
  layers = params['backbone']['layers']
  piece = lambda x: x.sharding.shard_shape(x.shape)
  # Of [V, D] = [50, 24], [X, D, N, H] = [3, 24, 4, 10], [3, 24, 1, 10], ...
  assert piece(params['backbone']['embedding']) == (25, 12)
  assert piece(layers['attention']['query']) == (3, 12, 2, 10)
  assert piece(layers['attention']['key']) == (3, 12, 1, 10)
  assert piece(layers['attention']['out']) == (3, 2, 10, 12)
  assert piece(layers['mlp']['down']) == (3, 18, 12)
  assert piece(layers['mlp_norm']['scale']) == (3, 24)
  assert piece(params['head']) == (12,)


@pytest.mark.parametrize(
    'config',
    [
        pytest.param(CONFIG, id='one key head', marks=pytest.mark.slow),
        pytest.param(TINY_2, id='two key heads'),
    ],
)
def test_eight_devices_agree_with_one(config: GemmaConfig, mesh: Mesh) -> None:
  params = draw('policy', config, seed=3)
  tokens, mask = left_padded(LENGTHS, 9)
  alone = value_and_grad(config, params, tokens, mask)
  with jax.set_mesh(mesh):
    shardings = jax.tree.map(
        lambda x: x.sharding, heads.abstract_params('policy', config)
    )
    spread = jax.jit(
        jax.value_and_grad(loss, argnums=1),
        static_argnums=0,
        out_shardings=(None, shardings),
    )(config, jax.device_put(params, shardings), *place((tokens, mask), mesh))
  assert len(spread[1]['embedding'].sharding.device_set) == 8
  bounds = gradient_rounding(config, params, tokens, mask)
  tolerance.assert_close(spread, alone, bounds)


def test_micro_batches_by_hand() -> None:
  rows = {'x': np.arange(12).reshape(6, 2), 'y': np.arange(6)}
  split = micro_batches(rows, 3)
  # Micro-batch j holds rows j and 3 + j.
  np.testing.assert_array_equal(split['y'], [[0, 3], [1, 4], [2, 5]])
  np.testing.assert_array_equal(split['x'][1], [[2, 3], [8, 9]])
  merged = merge_micro_batches(split)
  jax.tree.map(np.testing.assert_array_equal, merged, rows)


def test_micro_batches_move_nothing_between_devices(mesh: Mesh) -> None:
  rows = place(np.arange(16.0, dtype=np.float32).reshape(8, 2), mesh)
  split = jax.jit(lambda x: micro_batches(x, 2))
  with jax.set_mesh(mesh):
    program = split.lower(rows).compile().as_text()
  for moved in ('all-to-all', 'all-gather', 'collective-permute'):
    assert moved not in program


def test_what_a_mesh_cannot_split_is_named(mesh: Mesh) -> None:
  # (data, fsdp, tensor) = (2, 2, 2)
  sharding = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  struct = lambda shape, s: jax.ShapeDtypeStruct(shape, np.float32, sharding=s)
  tree = {
      'even': struct((4, 3), sharding('fsdp', None)),
      'odd': struct((4, 3), sharding(None, 'tensor')),
      'whole': struct((3,), None),
  }
  (line,) = indivisible(tree)
  assert line.startswith('odd of shape (4, 3) by ')


def test_parameters_wait_on_the_host_and_compute_on_the_device(
    mesh: Mesh,
) -> None:
  with jax.set_mesh(mesh):
    like = heads.abstract_params('scalar', CONFIG)['head']
    here = jax.device_put(jnp.arange(24.0), like.sharding)
    there = in_memory({'head': here}, 'host')['head']
    doubled = jax.jit(lambda x: on_device(x) * 2)
    made = doubled(there)
    moves = lambda x: str(doubled.trace(x).jaxpr).count('device_put')
    assert (moves(there), moves(here)) == (1, 0)
  assert in_memory(here, 'device') is here
  assert in_memory(like, 'host').sharding == there.sharding
  assert there.sharding.memory_kind == 'pinned_host'
  assert there.sharding.spec == here.sharding.spec
  assert made.sharding.memory_kind == 'device'
  np.testing.assert_array_equal(made, 2 * np.arange(24.0))
