"""What the compiler of TPUs makes of the programs: what they send and hold."""

import importlib.util
import math

import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.planning import compiling, topology
from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec('libtpu') is None,
        reason="needs libtpu: pip install -e '.[plan]'",
    ),
]

# On v5e:2x4 as data x fsdp x tensor = 1 x 4 x 2.
VOCAB, RESPONSE, MICRO, FSDP, TENSOR = 32768, 64, 16, 4, 2
# One device's logits, were they made of all its tokens at once.
_LOGITS = MICRO // FSDP * RESPONSE * VOCAB // TENSOR


def _config() -> config_lib.ConfigDict:
  return tiny.config(
      mesh__data=1,
      mesh__fsdp=FSDP,
      mesh__tensor=TENSOR,
      model__vocab_size=VOCAB,
      model__num_heads=4,
      model__logprob_chunk=16,
      model__dtype='bfloat16',
      data__max_prompt_len=64,
      data__max_response_len=RESPONSE,
      ppo__batch_size=32,
      ppo__micro_batch_size=MICRO,
      ppo__one_pass='off',
      stages=('ppo',),
  )


@pytest.fixture(scope='module')
def programs() -> dict[str, compiling.Compiled]:
  """Rollout, scoring and updates, as far as the schedule."""
  names = ('rollout', 'score', 'update_policy', 'update_critic')
  found = {}

  def take(child: compiling.Child) -> bool:
    found[child.program] = child.compiled()
    return True

  slice_ = topology.parse('v5e:2x4')
  make = lambda name: lambda: compiling.Child(
      _config(), slice_, f'ppo/{name}', rows=1000
  )
  compiling.run_all(map(make, names), 2, take)
  return found


def _gathered(program: compiling.Compiled, *, early: bool) -> list[int]:
  """Elements of what each loop gathers: of decode, or all others."""
  return [
      math.prod(array.dims)
      for c in program.collectives
      for array in c.arrays
      if c.kind == 'all-gather' and c.loops
      if c.in_decode_loop == early
  ]


def test_the_decode_loop_gathers_no_weight(programs):
  rollout = programs['ppo/rollout']
  of_layers = [math.prod(w) for w in rollout.weights if VOCAB not in w]
  gathered = _gathered(rollout, early=True)
  assert gathered  # logits of the likeliest tokens, by tensor
  assert max(gathered) < max(of_layers) // TENSOR


@pytest.mark.parametrize('name', ['ppo/score', 'ppo/update_policy'])
def test_no_loop_gathers_the_table(name: str, programs):
  program = programs[name]
  table = max(map(math.prod, program.weights))
  gathered = _gathered(program, early=False)
  assert gathered  # of layers, by fsdp
  assert max(gathered) < table // FSDP // TENSOR


@pytest.mark.parametrize('name', ['ppo/score', 'ppo/update_policy'])
def test_logits_of_all_tokens_never_exist(name: str, programs):
  assert programs[name].memory.temp < 4 * _LOGITS


@pytest.mark.parametrize('name', ['ppo/update_policy', 'ppo/update_critic'])
def test_the_state_is_updated_in_place(name: str, programs):
  program = programs[name]
  assert program.memory.out < 0.05 * program.resident_args
