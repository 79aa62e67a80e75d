"""Batches of small data."""

import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.data import batch_sizes

_ROWS = {'sft': 60, 'reward_model': 120, 'ppo': 120}


def _config(**fields: int) -> config_lib.ConfigDict:
  config = config_lib.base()
  config.ppo.batch_size = 64
  flat = {name.replace('__', '.'): value for name, value in fields.items()}
  config.update_from_flattened_dict(flat)
  return config


def test_a_config_whose_batches_are_filled_is_left_alone() -> None:
  config = _config(sft__batch_size=60)
  assert batch_sizes.fitted(config, _ROWS) is config
  none = _ROWS | {'sft': 0}  # SFT is given and does not train
  assert batch_sizes.fitted(config, none) is config


@pytest.mark.parametrize(
    ('batch_size', 'rows', 'want'),
    [
        (64, 60, 32),
        (64, 64, 64),
        (64, 15, 8),
        (48, 40, 24),  # a multiple of 3 stays one
        (50, 20, 10),
        (7, 5, 1),
        (64, 1, 1),
    ],
)
def test_a_batch_is_the_largest_divisor_that_the_rows_fill(
    batch_size: int, rows: int, want: int
) -> None:
  asked = _config(sft__batch_size=batch_size)
  used = batch_sizes.fitted(asked, _ROWS | {'sft': rows})
  assert used.sft.batch_size == want
  assert asked.sft.batch_size == batch_size
  assert used.reward_model.batch_size == 64  # the others stay


def test_passes_divide_the_smaller_batches() -> None:
  asked = _config(
      sft__micro_batch_size=16,
      ppo__samples_per_prompt=3,
      ppo__minibatches=4,
      ppo__micro_batch_size=24,
      rollout__batch_size=96,
  )
  used = batch_sizes.fitted(asked, {'sft': 9, 'reward_model': 64, 'ppo': 20})
  # 64 -> 8; 16 -> 8. 64 -> 16 prompts, 48 responses, minibatches of 12.
  assert (used.sft.batch_size, used.sft.micro_batch_size) == (8, 8)
  assert used.ppo.batch_size == 16
  assert (used.ppo.micro_batch_size, used.rollout.batch_size) == (12, 48)
  assert used.reward_model.micro_batch_size == 0  # 0 stays "all"


def test_batches_keep_their_minibatches() -> None:
  rows = {'sft': 64, 'reward_model': 64, 'ppo': 7}
  used = batch_sizes.fitted(_config(ppo__minibatches=4), rows)
  assert used.ppo.batch_size == 4
  with pytest.raises(ValueError, match='ppo.minibatches=8'):
    batch_sizes.fitted(_config(ppo__minibatches=8), rows)


def test_each_smaller_batch_of_a_stage_that_trains_is_told() -> None:
  asked = _config()
  rows = {'sft': 60, 'reward_model': 10, 'ppo': 120}
  used = batch_sizes.fitted(asked, rows)
  assert batch_sizes.describe(
      asked, used, rows, ['sft', 'ppo', 'evaluate']
  ) == ['sft.batch_size=32 in place of 64: the sft part has 60 rows']


def test_steps_follow_from_the_smaller_batch() -> None:
  used = batch_sizes.fitted(_config(sft__epochs=3), _ROWS)
  assert config_lib.num_steps(used.sft, 60) == 5  # 180 // 32
