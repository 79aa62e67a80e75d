"""Runs without rows, tokenizer or weights."""

import jax
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.planning import abstract
from tests import tiny


def _mesh(config: config_lib.ConfigDict) -> jax.sharding.Mesh:
  return abstract.mesh_over(config, jax.devices())


def test_programs_can_be_traced() -> None:
  # Those of PPO are in child_test.
  config = tiny.config(
      mesh__data=1, mesh__fsdp=-1, stages=('sft', 'reward_model')
  )
  mesh = _mesh(config)
  stages = abstract.stages(config, mesh, rows=1000)
  traced = {}
  with jax.set_mesh(mesh):
    for stage in stages.values():
      for name, program in stage.programs().items():
        traced[name] = abstract.traced(program)
  assert {'sft/update', 'reward_model/update'} <= set(traced)
  assert all(t.jaxpr.eqns for t in traced.values())


def test_rules_of_the_host_are_not_loaded() -> None:
  config = tiny.config(
      ppo__batch_size=8,
      stages=('ppo',),
      macro__termination='parsing',
      macro__parser='module:that_is_nowhere',
  )
  stage = abstract.stages(config, _mesh(config), rows=1000)['ppo']
  assert stage.run.host_termination() is not None


def test_steps_follow_from_the_rows_of_each_part() -> None:
  config = tiny.config(ppo__batch_size=8, ppo__steps=0, sft__batch_size=8)
  stages = abstract.stages(config, _mesh(config), rows=1000)
  # 2 : 4 : 4 of 1000 rows
  assert stages['sft'].num_steps == 200 // 8
  assert stages['ppo'].num_steps == 400 // 8


def test_rows_of_published_data_sets_are_known() -> None:
  config = tiny.config(data__task='hh')
  assert abstract.num_rows(config) == 112_052
  config.data.max_rows = 100
  assert abstract.num_rows(config) == 100
  assert abstract.num_rows(tiny.config(data__task='columns')) is None
  assert abstract.num_rows(tiny.config(data__synthetic_rows=70)) == 70


def test_the_name_of_a_model_tells_its_shape() -> None:
  named = abstract.with_preset(tiny.config(sft__init='google/gemma-2b-it'))
  assert named.model.preset == 'gemma-2b'
  known = tiny.config(sft__init='somewhere/else', model__preset='gemma-7b')
  assert abstract.with_preset(known).model.preset == 'gemma-7b'
  with pytest.raises(ValueError, match='--config.model.preset, one of gemma'):
    abstract.with_preset(tiny.config(sft__init='somewhere/else'))
