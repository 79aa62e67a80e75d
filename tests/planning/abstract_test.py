"""Runs without rows, tokenizer or weights have the programs of real ones."""

from typing import Any

import jax
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.models import heads, presets
from ma_rlhf_jax.planning import abstract
from ma_rlhf_jax.ppo import programs as ppo
from ma_rlhf_jax.structs import Models, Params
from ma_rlhf_jax.training import checkpoint, model_configs
from tests import tiny

_SHAPE = {
    f'model__{name}': getattr(tiny.SHAPE, name)
    for name in presets.SHAPE_FIELDS
    if name != 'sliding_layers'
}


def _programs(**fields: object) -> dict[str, Any]:
  """The programs of each stage of a tiny run on one device."""
  config = tiny.config(**_SHAPE, **fields)
  spec = tiny.spec(config)
  with jax.set_mesh(spec.mesh):
    rows = dict.fromkeys(config.stages, 8)
    made = abstract.programs_of(spec, tiny.SHAPE.vocab_size, rows)
  return {name: planned.programs for name, planned in made.items()}


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
      for name, program in stage.programs.listing().items():
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
  mesh = _mesh(config)
  programs = abstract.stages(config, mesh, rows=1000)['ppo'].programs
  with jax.set_mesh(mesh):
    fused = programs.listing()['ppo/one_pass']
  # A program that is given where they open macro actions.
  assert fused.args[-1].starts_BT.shape == (8, programs.spec.response_len)


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


@pytest.mark.slow
def test_the_stages_of_the_config_are_made() -> None:
  stages = _programs(stages=('sft', 'ppo'), ppo__one_pass='off')
  assert list(stages) == ['sft', 'ppo']
  assert list(stages['sft'].listing()) == ['sft/update']
  assert list(stages['ppo'].listing()) == [
      'ppo/reshard',
      'ppo/rollout',
      'ppo/score',
      'ppo/experience',
      'ppo/update_policy',
      'ppo/update_critic',
  ]
  for one_pass, rest in (('joint', []), ('policy', ['ppo/update_critic'])):
    programs = _programs(ppo__one_pass=one_pass)['ppo']
    assert list(programs.listing())[2:] == ['ppo/one_pass', *rest]
  without = _programs(ppo__baseline='rloo', ppo__samples_per_prompt=2)
  assert 'ppo/update_critic' not in without['ppo'].listing()


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 2])
def test_a_state_has_the_shapes_of_a_real_one(rank: int) -> None:
  fields = {'lora__rank': rank, 'ppo__one_pass': 'off'}
  spec = tiny.spec(tiny.config(**_SHAPE, **fields))
  with jax.set_mesh(spec.mesh):
    found = _programs(**fields)['ppo']
    learns = model_configs.trained(tiny.SHAPE, spec.config)
    frozen = model_configs.frozen(tiny.SHAPE, spec.config.model)

    def model(kind: str, shape: presets.GemmaConfig) -> Params:
      return heads.init_params(kind, shape, jax.random.key(0))

    shapes = Models(learns, frozen, learns, frozen)
    kinds = Models('policy', 'policy', 'scalar', 'scalar')
    params = Models(*map(model, kinds, shapes))
    real = ppo.Programs(spec, shapes, params, 3)
    states = checkpoint.abstract_of(real.init_states(params))
    assert found.abstract_states == real.abstract_states == states
    want = checkpoint.abstract_of(real.listing()['ppo/score'].args[0].tree)
    assert found.listing()['ppo/score'].args[0].tree == want


@pytest.mark.slow
@pytest.mark.parametrize('one_pass', ['off', 'policy'])
def test_each_program_is_given_what_the_one_before_makes(one_pass: str) -> None:
  found = _programs(ppo__one_pass=one_pass)['ppo']
  with jax.set_mesh(found.spec.mesh):
    programs = found.listing()
    made = {n: jax.eval_shape(p.function, *p.args) for n, p in programs.items()}
  looks = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  rollout = looks(made['ppo/rollout'])
  if one_pass == 'off':
    assert looks(programs['ppo/score'].args[1]) == rollout.sequences
    told = looks(programs['ppo/experience'].args[:2])
    assert told == (rollout, looks(made['ppo/score']))
    experience = looks(made['ppo/experience'][0])
    assert looks(programs['ppo/update_policy'].args[2]) == experience
  else:
    assert looks(programs['ppo/one_pass'].args[2]) == rollout
    experience = looks(made['ppo/one_pass'][1])
  assert looks(programs['ppo/update_critic'].args[2]) == experience


def test_frozen_models_may_wait_on_the_host() -> None:
  found = _programs(model__frozen_memory='host', ppo__one_pass='off')['ppo']
  with jax.set_mesh(found.spec.mesh):
    score = found.listing()['ppo/score']
    program = str(score.function.trace(*score.args).jaxpr)
  models = score.args[0].tree
  kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
  waiting = (models.ref_policy, models.reward_model)
  assert kinds(waiting) == {'pinned_host'}
  assert kinds((models.policy, models.critic)) == {'device'}
  assert program.count('device_put') == len(jax.tree.leaves(waiting))
