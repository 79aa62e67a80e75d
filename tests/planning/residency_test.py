"""What stays on a device."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from ma_rlhf_jax.planning import abstract, residency
from ma_rlhf_jax.ppo.programs import Programs
from tests import tiny


def _residents(
    **fields: object,
) -> tuple[dict[str, int], Programs]:
  config = tiny.config(
      mesh__data=1,
      mesh__fsdp=-1,
      ppo__batch_size=8,
      model__dtype='bfloat16',
      model__vocab_size=512,
      **fields,
  )
  mesh = abstract.mesh_over(config, jax.devices())
  programs = abstract.stages(config, mesh, rows=1000)['ppo'].programs
  return residency.sizes(residency.residents(programs)), programs


def test_sizes_are_those_of_one_shard() -> None:
  spec = PartitionSpec('fsdp', None)
  sharding = NamedSharding(tiny.mesh(1, 4, 2), spec)
  x = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=sharding)
  assert residency.device_bytes(x) == 2 * 6 * 2
  host = sharding.with_memory_kind('pinned_host')
  x = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=host)
  assert residency.device_bytes(x) == 0
  assert residency.device_bytes(jax.eval_shape(lambda: jax.random.key(0))) == 8


def test_trained_models_keep_moments_and_frozen_ones_are_half_as_wide() -> None:
  sizes, _ = _residents()
  assert set(sizes) == {
      'policy',
      'critic',
      'kl_coef',
      'ref_policy',
      'reward_model',
  }
  # Parameters and two moments in float32 against bfloat16.
  np.testing.assert_allclose(
      sizes['policy'] / sizes['ref_policy'], 6, rtol=0.05
  )


def test_adapters_share_their_frozen_weights() -> None:
  sizes, _ = _residents(lora__rank=2)
  assert sizes['policy'] < sizes['ref_policy']
  assert sizes['critic'] < sizes['reward_model']
  apart, _ = _residents(lora__rank=2, ppo__critic_init='elsewhere')
  assert apart['critic'] > apart['reward_model']
  assert apart['policy'] == sizes['policy']


def test_arguments_that_stay_are_told_from_those_of_a_step() -> None:
  _, programs = _residents(ppo__one_pass='off')
  with jax.set_mesh(programs.spec.mesh):
    program = programs.listing()['ppo/update_policy']
  found = residency.residents(programs)
  resident, others = residency.beside(program.args, found)
  sizes = residency.sizes(found)
  assert 0.99 < resident / sizes['policy'] <= 1
  # Eight rows of 24 + 16 tokens on eight devices: experience, a few bytes each.
  assert 0 < others < 40 * 100
