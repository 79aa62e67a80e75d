"""Set-ups that may be planned."""

import dataclasses

import pytest

from ma_rlhf_jax.config_fields import FIELDS
from ma_rlhf_jax.fields import one_of
from ma_rlhf_jax.models import gemma
from ma_rlhf_jax.planning import setups
from tests.planning.planner_test import config, make


def test_options_come_from_the_config_and_its_choices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  space = {'model.remat': (), 'mesh.tensor': (1, 2), 'model.nothing': (3,)}
  found = list(setups.layouts(config(), make(), space))
  assert {(c.model.remat, c.mesh.tensor) for c in found} == {
      (remat, tensor) for remat in gemma.REMAT for tensor in (1, 2)
  }
  known = dataclasses.replace(
      FIELDS['model.dtype'], check=one_of('float32', 'bfloat16')
  )
  monkeypatch.setitem(FIELDS, 'model.dtype', known)
  found = list(setups.layouts(config(), make(), {'model.dtype': ()}))
  assert [c.model.dtype for c in found] == ['bfloat16', 'float32']


def test_knobs_of_programs() -> None:
  assert setups.knob('ppo/rollout') == 'rollout.batch_size'
  assert setups.knob('ppo/update_critic') == 'ppo.micro_batch_size'
  assert setups.knob('sft/update') == 'sft.micro_batch_size'
  assert not setups.halve(config(), setups.knob('ppo/reshard'), 8)


def test_passes_are_halved_while_every_device_has_a_row() -> None:
  made = config()
  assert setups.halve(made, 'ppo.micro_batch_size', 64)
  assert setups.halve(made, 'ppo.micro_batch_size', 64)
  assert made.ppo.micro_batch_size == 64
  assert not setups.halve(made, 'ppo.micro_batch_size', 64)
  assert made.ppo.micro_batch_size == 64
