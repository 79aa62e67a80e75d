"""The formulas, against compiles for TPUs and by their parts."""

import dataclasses

import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.parallel import chips, partition
from ma_rlhf_jax.planning import estimate
from ma_rlhf_jax.training import automatic

_GIB = 2**30
_V5E = chips.TPUS['v5e']


def _config(**fields: object) -> config_lib.ConfigDict:
  made = automatic.fixed(config_lib.published('google/gemma-7b', 'gemma-7b'))
  flat = {name.replace('__', '.'): value for name, value in fields.items()}
  made.update_from_flattened_dict({'reward_model.batch_size': 64} | flat)
  return made


@pytest.mark.parametrize(
    ('name', 'temp', 'wire'),
    [
        ('reward_model/update', 2.04, 56.9),
        ('ppo/rollout', 3.75, 44.8),
        ('ppo/reshard', None, 0.98),
        ('ppo/score', 1.53, None),
        ('ppo/update_policy', 6.94, None),  # with the table gathered in a loop
        ('ppo/update_critic', 2.86, 56.9),
    ],
)
def test_formulas_are_near_what_was_compiled_for_v5e_8x8(
    name: str, temp: float | None, wire: float | None
) -> None:
  # Gemma-7B, 27 Nov 2026, libtpu 0.0.52, GiB of a device.
  load = estimate.load(name, _config(), 64, _V5E)
  if temp is not None:
    assert load.temp / _GIB == pytest.approx(temp, rel=0.4)
  if wire is not None:
    assert load.wire / _GIB == pytest.approx(wire, rel=0.35)


@pytest.mark.parametrize(
    ('gpu', 'kernel'),
    [
        ('h100', 'cudnn'),
        ('h200', 'cudnn'),
        ('a100', 'xla'),
        ('l4', 'xla'),
        ('l40s', 'xla'),
        ('rtx4090', 'xla'),
        ('b200', 'xla'),
    ],
)
def test_scores_of_attention_are_counted_where_no_kernel_saves_them(
    gpu: str, kernel: str
) -> None:
  chip = chips.GPUS[gpu]
  no_kernel = dataclasses.replace(chip, capability=None)
  one = {'ppo__micro_batch_size': 1, 'ppo__one_pass': 'off'}
  config = _config(lora__rank=32, **one)
  found = estimate.load('ppo/update_policy', config, 1, chip).temp
  plain = estimate.load('ppo/update_policy', config, 1, no_kernel).temp
  # 16 heads of 1024 x 1024 scores, in float32 and in bfloat16
  scores = 16 * 1024 * 1024 * (4 + 2)
  assert plain - found == (scores if kernel == 'cudnn' else 0)
  decode = lambda on: estimate.load('ppo/rollout', config, 1, on)
  assert decode(chip) == decode(no_kernel)  # always plain


def test_a_loss_over_padding_is_counted_with_plain_attention() -> None:
  hopper = partition.Machine('gpu', (9, 0))
  fused = lambda **fields: estimate.is_fused(
      'reward_model/update', _config(**fields), hopper
  )
  assert fused() and not fused(reward_model__loss='authors')
  assert fused(sft__loss_on='everything')  # of another stage


def test_no_weight_is_sent_while_tokens_are_drawn() -> None:
  whole = estimate.load('ppo/rollout', _config(rollout__tensor=1), 64, _V5E)
  assert whole.wire == 0
  split = estimate.load('ppo/rollout', _config(rollout__tensor=8), 64, _V5E)
  assert split.hbm < whole.hbm
  assert split.wire > 0


def test_more_passes_need_less_memory_and_more_wire() -> None:
  whole = estimate.load('ppo/update_policy', _config(), 32, _V5E)
  split = estimate.load(
      'ppo/update_policy', _config(ppo__micro_batch_size=32), 32, _V5E
  )
  assert split.temp < whole.temp
  assert split.wire == pytest.approx(8 * whole.wire)
  assert split.flops == whole.flops


def test_passes_of_each_program() -> None:
  config = _config(
      ppo__micro_batch_size=32,
      ppo__ppo_epochs=2,
      ppo__minibatches=2,
      rollout__batch_size=64,
      reward_model__micro_batch_size=8,
  )
  assert estimate.passes_of('ppo/update_policy', config) == (16, 32)
  assert estimate.passes_of('ppo/score', config) == (8, 32)
  assert estimate.passes_of('ppo/rollout', config) == (4, 64)
  assert estimate.passes_of('reward_model/update', config) == (8, 16)


def test_one_device_sends_nothing_and_gathers_nothing() -> None:
  config = _config(lora__rank=32, ppo__micro_batch_size=1)
  for name in ('ppo/update_policy', 'ppo/score', 'ppo/rollout'):
    assert estimate.load(name, config, 1, _V5E).wire == 0
  adapters = estimate.load('ppo/update_policy', config, 1, _V5E).temp
  whole = estimate.load(
      'ppo/update_policy', _config(ppo__micro_batch_size=1), 1, _V5E
  ).temp
  assert whole - adapters > 8 * 8.5e9  # gradients, twice, in float32


def test_the_cache_holds_every_layer() -> None:
  z = estimate.Sizes.of(_config(), 64, _V5E)
  # 448 KiB a token, 1024 tokens a row
  assert estimate.cache_bytes(z, 4) == 4 * 1024 * 448 * 1024


def test_of_other_programs_little_is_said() -> None:
  assert estimate.load('ppo/experience', _config(), 64, _V5E).temp < 0.01 * _GIB
