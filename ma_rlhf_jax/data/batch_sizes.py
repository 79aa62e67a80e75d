"""Batches that small data can fill.

A config's `batch_size` is what a stage takes where its part of the rows fills
one batch. A smaller part gets the largest divisor of it that the part fills.
The rule looks at rows and config alone, not at devices, so that every start of
a run, on whatever machine, makes the same batches.
"""

from collections.abc import Mapping, Sequence
import math

from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib

_STAGES = ('sft', 'reward_model', 'ppo')


def fitted(config: ConfigDict, num_rows: Mapping[str, int]) -> ConfigDict:
  """The config with batches that the rows fill; itself where they all do.

  Sizes of passes become divisors of the new batches, so that they never grow.

  Args:
    config: see `config.base`.
    num_rows: rows of 'sft', 'reward_model' and 'ppo'; a part of none belongs
      to a stage that does not train, and changes nothing.

  Raises:
    ValueError: if `ppo.minibatches` divides no batch that the rows fill.
  """
  small = [s for s in _STAGES if 0 < num_rows[s] < config[s].batch_size]
  if not small:
    return config
  config = config_lib.restore(config_lib.flatten(config))
  for stage in small:
    whole = config[stage].batch_size
    unit = _unit(config) if stage == 'ppo' else 1
    config[stage].batch_size = _largest_divisor(whole, num_rows[stage], unit)
    if not config[stage].batch_size:
      raise ValueError(
          f'the ppo part has {num_rows["ppo"]} rows, of which no batch splits '
          f'into ppo.minibatches={config.ppo.minibatches}; give more rows, a '
          f'smaller ppo.minibatches, or another ppo.batch_size ({whole} now)'
      )
  _fit_passes(config)
  return config


def _unit(config: ConfigDict) -> int:
  """Prompts of a PPO batch come in multiples of it."""
  p = config.ppo
  return p.minibatches // math.gcd(p.minibatches, p.samples_per_prompt)


def _largest_divisor(whole: int, most: int, unit: int) -> int:
  """The largest divisor of `whole` that is at most `most`; 0 if there is none.

  It is a multiple of `unit`.
  """
  fitting = (n for n in range(most, 0, -1) if not whole % n and not n % unit)
  return next(fitting, 0)


def _fit_passes(config: ConfigDict) -> None:
  """Passes divide the batches that they are a part of; 0 stays 0 = all."""
  p = config.ppo
  rows = p.batch_size * p.samples_per_prompt
  for block, name, whole in (
      (config.sft, 'micro_batch_size', config.sft.batch_size),
      (config.reward_model, 'micro_batch_size', config.reward_model.batch_size),
      (p, 'micro_batch_size', rows // p.minibatches),
      (config.rollout, 'batch_size', rows),
  ):
    if block[name]:
      block[name] = math.gcd(block[name], whole)


def describe(
    asked: ConfigDict,
    used: ConfigDict,
    num_rows: Mapping[str, int],
    stages: Sequence[str],
) -> list[str]:
  """One line for each of `stages` whose batches `fitted` made smaller."""
  return [
      f'{stage}.batch_size={used[stage].batch_size} in place of '
      f'{asked[stage].batch_size}: the {stage} part has {num_rows[stage]} rows'
      for stage in stages
      if stage in _STAGES and used[stage].batch_size != asked[stage].batch_size
  ]
