"""Arrays that stand in a tree several times are passed once."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from ma_rlhf_jax.models import lora
from ma_rlhf_jax.ppo.stage import PPO
from ma_rlhf_jax.structs import Models
from ma_rlhf_jax.training import model_configs
from ma_rlhf_jax.training.shared import Shared
from tests import tiny


def test_a_program_gets_each_array_once_and_sees_the_whole_tree() -> None:
  a, b = jnp.arange(3.0), jnp.ones(2)
  tree = {'x': (a, b), 'y': [b, a, a], 'z': None}
  first, second = jax.tree.leaves(Shared(tree))
  assert first is a
  assert second is b
  (_, last), _ = jax.tree_util.tree_flatten_with_path(Shared(tree))
  assert jax.tree_util.keystr(last[0], simple=True) == 'x/1'
  seen = []

  @jax.jit
  def double(given: Shared) -> dict:
    seen.append(jax.tree.structure(given.tree))
    return jax.tree.map(lambda x: 2 * x, given.tree)

  want = jax.tree.map(lambda x: 2 * x, tree)
  jax.tree.map(np.testing.assert_array_equal, double(Shared(tree)), want)
  assert len(double.trace(Shared(tree)).jaxpr.in_avals) == 2
  # The same arrays in other places are another program.
  swapped = {'x': (b, a), 'y': [b, a, b], 'z': None}
  want = jax.tree.map(lambda x: 2 * x, swapped)
  jax.tree.map(np.testing.assert_array_equal, double(Shared(swapped)), want)
  assert seen[0] == jax.tree.structure(tree)


def test_equal_arrays_that_are_not_the_same_stay_apart() -> None:
  tree = [jnp.zeros(2), jnp.zeros(2)]
  assert len(jax.tree.leaves(Shared(tree))) == 2


def test_adapters_pass_their_frozen_weights_once(
    tmp_path: pathlib.Path,
) -> None:
  run = tiny.run(tmp_path, tiny.config(lora__rank=2), mesh=tiny.mesh(1, 1, 1))
  learns = model_configs.trained(tiny.SHAPE, run.config)
  frozen = dataclasses.replace(learns, lora=None)
  base = tiny.params('policy', 0), tiny.params('scalar', 1)
  key = jax.random.key(0)
  with jax.set_mesh(run.mesh):
    params = Models(
        policy=lora.add_adapters('policy', learns, base[0], key),
        ref_policy=base[0],
        critic=lora.add_adapters('scalar', learns, base[1], key),
        reward_model=base[1],
    )
    stage = PPO(run, Models(learns, frozen, learns, frozen), params)
    models = stage.params(stage.states)
    passed = jax.tree.leaves(stage.programs.listing()['ppo/one_pass'].args[:2])
  given = jax.tree.leaves((models, stage.states))
  assert len(passed) == len({id(x) for x in given}) - 1  # without kl_coef
