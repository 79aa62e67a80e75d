"""What auto becomes on a CPU and elsewhere, by sizes worked out by hand."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.config_fields import FIELDS
from ma_rlhf_jax.models import presets
from ma_rlhf_jax.training import automatic

# The two workloads of the comparison with other trainers.
SMALL = presets.GemmaConfig(8192, 4, 256, 1024, 4, 1, 64)
LARGE = dataclasses.replace(SMALL, vocab_size=256_000)


def _config(**fields: Any) -> ConfigDict:
  config = config_lib.base()
  config.stages = ('ppo',)
  flat = {name.replace('__', '.'): value for name, value in fields.items()}
  config.update_from_flattened_dict({'ppo.batch_size': 16} | flat)
  return config


def _resolved(
    config: ConfigDict,
    shape: presets.GemmaConfig | None = SMALL,
    platform: str = 'cpu',
    length: int = 64,
) -> tuple[Any, ...]:
  found = automatic.resolve(
      config, shape, prompt_len=length, response_len=length, platform=platform
  )
  flat = config_lib.flatten(found)
  return tuple(flat[name] for name in automatic.FIELDS)


def test_base_says_auto_and_other_devices_get_the_fixed_values() -> None:
  flat = config_lib.flatten(config_lib.base())
  for name, (auto, _) in automatic.FIELDS.items():
    assert flat[name] == auto
  for platform in ('tpu', 'gpu'):
    found = _resolved(_config(), platform=platform)
    assert found == ('full', 1, 512, 'joint')
  assert _resolved(_config(), None) == found  # a tokenizer alone


def test_a_small_model_on_a_cpu_keeps_all_and_has_no_loop() -> None:
  # 2**18 / 8192 tokens of logits are a megabyte.
  assert _resolved(_config()) == ('none', 0, 32, 'joint')


def test_a_large_table_on_a_cpu_has_one_gradient_at_a_time() -> None:
  # 8 rows: the weights take 4 * 68.7M = 275 MB, what is kept 107 MB.
  found = _resolved(_config(ppo__batch_size=8), LARGE)
  assert found == ('none', 0, 32, 'policy')
  # With adapters the gradients are small.
  found = _resolved(_config(ppo__batch_size=8, lora__rank=4), LARGE)
  assert found[-1] == 'joint'


def test_the_bound_of_what_is_kept_is_that_of_the_largest_stage() -> None:
  # Of a token in a layer: 4 * 256 + 3 * 256 + 2 * 64 + 4 * 128 + 4 * 1024 =
  # 6528 floats; in 4 layers of 128 tokens 13.4 MB a row: 160 rows fit 2 GiB.
  assert _resolved(_config(ppo__batch_size=160))[:2] == ('none', 0)
  assert _resolved(_config(ppo__batch_size=161))[:2] == ('full', 1)
  micro = _config(ppo__batch_size=800, ppo__micro_batch_size=80)
  assert _resolved(micro)[0] == 'none'
  micro.stages = ('reward_model', 'ppo')
  micro.reward_model.batch_size = 80  # pairs: 160 rows
  assert _resolved(micro)[0] == 'none'
  micro.reward_model.batch_size = 81
  assert _resolved(micro)[0] == 'full'


def test_many_layers_stay_in_a_loop() -> None:
  deep = dataclasses.replace(SMALL, num_layers=9)
  assert _resolved(_config(ppo__batch_size=4), deep)[:2] == ('none', 1)


def test_a_small_vocabulary_takes_more_tokens_at_once() -> None:
  tiny = dataclasses.replace(SMALL, vocab_size=512)
  assert _resolved(_config(), tiny)[2] == 512


def test_what_is_said_stays_and_the_given_config_is_not_touched() -> None:
  given = _config(
      model__remat='dots',
      model__unroll=2,
      model__logprob_chunk=100,
      ppo__one_pass='off',
  )
  before = config_lib.flatten(given)
  assert _resolved(given) == ('dots', 2, 100, 'off')
  assert config_lib.flatten(given) == before
  # Remat by hand keeps the loop, without which it would do nothing.
  assert _resolved(_config(model__remat='full'))[:2] == ('full', 1)


def test_the_start_says_what_was_chosen() -> None:
  given = _config(model__unroll=2)
  found = automatic.resolve(
      given, SMALL, prompt_len=64, response_len=64, platform='cpu'
  )
  text = automatic.describe(given, found)
  for part in ('model.remat=none', 'logprob_chunk=32', 'ppo.one_pass=joint'):
    assert part in text
  assert 'unroll' not in text
  assert automatic.describe(found, found) == ''


def test_resuming_may_choose_anew() -> None:
  assert all(FIELDS[name].resumable for name in automatic.FIELDS)
