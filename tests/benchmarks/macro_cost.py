"""What macro actions cost: their one program against one PPO update.

  python -m tests.benchmarks.macro_cost [--rows=256 --columns=512 --runs=10]

For each termination rule, one compiled program makes ids, pools, runs GAE and
spreads; another makes one update of policy and critic of configs/tiny.py at the
same shape. They are run in turns; the medians and their ratio are printed, and
how often each program was compiled.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from configs import tiny
from ma_rlhf_jax import masking
from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.models import heads, presets
from ma_rlhf_jax.objective.advantage import Objective
from ma_rlhf_jax.ppo import learn, step
from ma_rlhf_jax.ppo.host import HostAnswers
from ma_rlhf_jax.ppo.method import Method
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    Models,
    Scored,
    SequenceBatch,
)
from ma_rlhf_jax.training import buckets, optim, update

_PROMPT = 24  # columns


def _sequences(
    rows: int, columns: int, vocab_size: int, seed: int
) -> SequenceBatch:
  """Random tokens; responses of 1 to `columns` tokens."""
  random = np.random.default_rng(seed)
  lengths = random.integers(1, columns + 1, size=(rows, 1))
  mask = np.arange(columns)[None] < lengths
  prompt = random.integers(3, vocab_size, size=(rows, _PROMPT))
  tokens = random.integers(3, vocab_size, size=(rows, columns))
  return masking.join(
      jnp.asarray(prompt, jnp.int32),
      jnp.ones(prompt.shape, bool),
      jnp.asarray(np.where(mask, tokens, 0), jnp.int32),
      jnp.asarray(mask),
  )


def _scored(mask: Array, seed: int) -> Scored:
  random = np.random.default_rng(seed)
  normal = lambda: jnp.where(
      mask, jnp.asarray(random.normal(size=mask.shape), jnp.float32), 0
  )
  return Scored(
      logprobs_BT=normal() - 3,
      ref_logprobs_BT=normal() - 3,
      entropy_BT=normal(),
      values_BT=normal(),
      score_B=jnp.asarray(random.normal(size=mask.shape[0]), jnp.float32),
  )


def _update_program(config: ConfigDict, method: Method, micro: int) -> Any:
  """(function, states): one update of policy and critic."""
  optimizer = optim.make_optimizer(config.ppo.optim, 100)
  shape, names = method.configs.policy, ('policy', 'critic')
  params = {
      'policy': heads.init_params('policy', shape, jax.random.key(0)),
      'critic': heads.init_params('scalar', shape, jax.random.key(1)),
  }
  states = {n: update.init_state(p, optimizer) for n, p in params.items()}

  def both(states: Any, batch: Experience, key: Array) -> Any:
    how = {'method': method, 'optimizer': optimizer}
    how |= {'epochs': 1, 'minibatches': 1}
    how['split'] = buckets.Buckets((0,), (micro,))
    return {
        name: learn.update_model(
            states[name], {}, batch, key, name=name, **how
        )[0]
        for name in names
    }

  return jax.jit(both), states


def _method(config: ConfigDict) -> Method:
  shape = presets.from_config(config.model, config.tokenizer.vocab_size)
  shape = dataclasses.replace(shape, remat='none')
  return Method(
      Models(*[shape] * 4),
      Objective.from_config(config),
      termination.TerminationSettings.from_config(config.macro),
      temperature=1.0,
  )


def _seconds(function: Any, *args: Any) -> tuple[float, Any]:
  start = time.perf_counter()
  made = jax.block_until_ready(function(*args))
  return time.perf_counter() - start, made


def measure(
    config: ConfigDict, rows: int, columns: int, runs: int, micro: int
) -> dict[str, Any]:
  """Median seconds of both programs, their ratio, and compilations."""
  method = _method(config)
  estimate = jax.jit(
      functools.partial(
          step.form_experience,
          kl_coef=jnp.float32(config.ppo.kl_coef),
          host=HostAnswers(),
          method=method,
      )
  )
  learned, states = _update_program(config, method, micro)
  vocab_size, key = config.tokenizer.vocab_size, jax.random.key(3)
  times = {'macro': [], 'update': []}
  for run in range(runs + 1):  # the first compiles
    sequences = _sequences(rows, columns, vocab_size, run)
    scored = _scored(sequences.response_mask_BT, run)
    keys_B = jax.random.split(jax.random.fold_in(key, run), rows)
    macro_s, (batch, _) = _seconds(estimate, sequences, scored, keys_B)
    update_s, _ = _seconds(learned, states, batch, key)
    if run:
      times['macro'].append(macro_s)
      times['update'].append(update_s)
  medians = {name: statistics.median(found) for name, found in times.items()}
  return {
      'macro_s': medians['macro'],
      'update_s': medians['update'],
      'ratio': medians['macro'] / medians['update'],
      'compiled': (estimate._cache_size(), learned._cache_size()),
  }


def main() -> None:
  """Prints one line a rule."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rows', type=int, default=256)
  parser.add_argument('--columns', type=int, default=512)
  parser.add_argument('--runs', type=int, default=10)
  parser.add_argument('--micro', type=int, default=16)
  parser.add_argument('--rules', nargs='+', default=['fixed', 'ppl'])
  flags = parser.parse_args()
  print(
      f'{jax.default_backend()}, [{flags.rows}, {flags.columns}], '
      f'median of {flags.runs} alternating runs'
  )
  for rule in flags.rules:
    found = measure(
        tiny.get_config(f'termination={rule}'),
        flags.rows,
        flags.columns,
        flags.runs,
        flags.micro,
    )
    print(
        f'{rule:16} macro {1e3 * found["macro_s"]:.1f} ms  update '
        f'{found["update_s"]:.2f} s  ratio {found["ratio"]:.3%}  compiled '
        f'{found["compiled"]} times',
        flush=True,
    )


if __name__ == '__main__':
  main()
