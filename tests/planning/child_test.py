"""The compiling process: its answers, and libtpu where it is installed."""

import importlib.util
import json
import os
import pathlib

import jax.numpy as jnp
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.planning import child, compiling, topology
from ma_rlhf_jax.training.shared import Shared
from tests import tiny

_needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="needs libtpu: pip install -e '.[plan]'",
)


def test_bytes_are_read_from_refusals() -> None:
  message = (
      'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, '
      'the total memory required for HLO temporaries (21.13G) exceeds '
      'available HBM (15.75G). HLO module: jit_step.'
  )
  assert child.bytes_in(child._REQUIRED, message) == int(21.13 * 2**30)
  assert child.bytes_in(child._AVAILABLE, message) == int(15.75 * 2**30)
  assert child.bytes_in(child._REQUIRED, 'something else') is None


def test_a_survey_tells_programs_sizes_and_operations(
    tmp_path: pathlib.Path,
) -> None:
  config = tiny.config(
      mesh__data=1,
      mesh__fsdp=-1,
      ppo__batch_size=8,
      ppo__one_pass='off',
      stages=('ppo',),
  )
  answer = tmp_path / 'answer.json'
  job = {
      'config': config_lib.flatten(config),
      'topology': 'gpu:l4:8',
      'program': '',
      'rows': 1000,
      'caller': os.getppid(),
      'ask_hbm': False,
      'count': True,
      'answer': str(answer),
  }
  (tmp_path / 'job.json').write_text(json.dumps(job))
  child.main(str(tmp_path / 'job.json'))
  told = json.loads(answer.read_text())
  assert list(told['stages']) == ['ppo']
  ppo = told['stages']['ppo']
  assert ppo['steps'] == 3
  assert set(ppo['resident']) >= {'policy', 'critic', 'ref_policy'}
  update = ppo['programs']['ppo/update_policy']
  assert update['flops'] > ppo['programs']['ppo/experience']['flops']
  assert update['resident_args'] > update['other_args'] > 0


def _compiled(
    config: config_lib.ConfigDict, name: str, full: bool, program: str
) -> compiling.Compiled:
  found = []
  make = lambda: compiling.Child(
      config, topology.parse(name), program, rows=1000, full=full
  )
  compiling.run_all([make], 1, lambda c: found.append(c.compiled()) or True)
  return found[0]


def _small(**fields: object) -> config_lib.ConfigDict:
  defaults = {
      'mesh__data': 1,
      'mesh__fsdp': -1,
      'model__vocab_size': 2048,
      'model__dtype': 'bfloat16',
      'data__max_prompt_len': 64,
      'data__max_response_len': 64,
      'ppo__batch_size': 16,
      'ppo__micro_batch_size': 8,
      'ppo__one_pass': 'off',
  }
  return tiny.config(**{**defaults, **fields})


def test_weights_are_found_among_those_that_models_share() -> None:
  kernel, table = jnp.ones((3, 4, 8)), jnp.ones((100, 4))
  policy = {'embedding': table, 'layers': {'mlp': {'up': kernel}}}
  given = Shared({'policy': policy, 'ref_policy': policy})
  assert child._weights((given,), 100) == [[4, 8], [100, 4]]


@pytest.mark.slow
@_needs_libtpu
@pytest.mark.parametrize('program', ['ppo/update_policy', 'ppo/rollout'])
def test_the_dump_tells_what_memory_analysis_tells(program: str) -> None:
  fast = _compiled(_small(), 'v5e:2x2', False, program)
  # `full` replaces what was parsed by what the finished compile reports.
  full = _compiled(_small(), 'v5e:2x2', True, program)
  assert fast.memory.args == pytest.approx(full.memory.args, rel=0.01)
  assert fast.memory.temp == pytest.approx(full.memory.temp, rel=0.01, abs=2e5)
  assert fast.flops == full.flops
  assert fast.wire == full.wire > 0


@pytest.mark.slow
@_needs_libtpu
def test_an_overflow_of_hbm_is_an_answer() -> None:
  config = _small(
      model__preset='gemma-7b', ppo__batch_size=4, ppo__micro_batch_size=0
  )
  found = _compiled(config, 'v5e:2x2', True, 'ppo/update_policy')
  assert found.memory is None
  assert found.required > 15.75 * 2**30
