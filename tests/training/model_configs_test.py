"""Tests of `training.model_configs`."""

import dataclasses

from ma_rlhf_jax.config import base
from ma_rlhf_jax.models import presets
from ma_rlhf_jax.training import model_configs
from tests.tiny import SHAPE as TINY


def test_choices_of_a_run_leave_the_shape_alone() -> None:
  config = base()
  config.model.dtype, config.model.param_dtype = 'bfloat16', 'float32'
  config.model.remat, config.model.unroll = 'none', 1
  config.model.logprob_chunk = 64
  config.model.embed_dim = TINY.embed_dim + 1
  whole = dataclasses.replace(
      TINY,
      dtype='bfloat16',
      param_dtype='float32',
      remat='none',
      logprob_chunk=64,
  )
  frozen = dataclasses.replace(whole, kernel_dtype='bfloat16')
  assert model_configs.trained(TINY, config) == whole
  assert model_configs.frozen(TINY, config.model) == frozen
  config.lora.rank, config.lora.alpha = 4, 6.0
  config.lora.targets = ('up', 'query')
  adapters = presets.Lora(4, 6.0, ('query', 'up'))
  assert adapters.scale == 1.5
  with_adapters = dataclasses.replace(frozen, lora=adapters)
  assert model_configs.trained(TINY, config) == with_adapters
  # What was chosen before does not matter.
  assert model_configs.trained_whole(with_adapters, config.model) == whole
