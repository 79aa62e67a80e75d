"""Whether two checkouts train the same: `configs/tiny.py` in float64.

  python -m tests.same_training OLD_CHECKOUT NEW_CHECKOUT [--steps=3]

In each checkout three PPO steps are taken from the same random weights, for
five variants and three ways to learn, and what they drew, logged and learned is
compared. A redesign of the core must show no difference above 1e-10 of a
number's size; it ends with 1 where one does.

The same code runs in both checkouts, as far back as cf5e105.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

_VARIANTS = ('', 'paper', 'authors', 'token_ppo', 'rloo')
_WAYS = ('joint', 'policy', 'off')
_ROWS = {'data.synthetic_rows': 2000, 'ppo.batch_size': 16, 'ppo.steps': 8}
_BOUND = 1e-10


def _find(*names: str) -> Any:
  """The first of these that the checkout has: `module:attribute`."""
  for name in names:
    module, _, attribute = name.partition(':')
    try:
      return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
      continue
  raise ImportError(f'none of {names} is in this checkout')


def _stage(recipe: str, variant: str, way: str, workdir: str) -> Any:
  """A PPO stage of the recipe on random float64 weights."""
  from etils import epath
  import jax
  import jax.numpy as jnp

  from ma_rlhf_jax.models import heads
  from ma_rlhf_jax.training import start

  models = _find(
      'ma_rlhf_jax.structs:Models', 'ma_rlhf_jax.training.experience:Models'
  )
  stage = _find('ma_rlhf_jax.ppo.stage:PPO', 'ma_rlhf_jax.training.ppo:PPO')
  made = _find(
      'ma_rlhf_jax.models.presets:from_config',
      'ma_rlhf_jax.models.presets:from_fields',
  )
  trained = _find(
      'ma_rlhf_jax.training.model_configs:trained',
      'ma_rlhf_jax.models.presets:trained',
  )
  config = _recipe(recipe).get_config(variant)
  config.update_from_flattened_dict(_ROWS | {'ppo.one_pass': way})
  if variant == 'rloo':
    config.ppo.one_pass = 'off'
  run = start.load_run(config, epath.Path(workdir))
  shape = made(run.config.model, len(run.tokenizer))
  model = dataclasses.replace(
      trained(shape, run.config),
      dtype='float64',
      param_dtype='float64',
  )
  wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
  draw = lambda kind, seed: wide(
      heads.init_params(kind, model, jax.random.key(seed))
  )
  kinds = ('policy', 'policy', 'scalar', 'scalar')
  params = [draw(kind, seed) for seed, kind in enumerate(kinds)]
  configs = [model] * 4
  if variant == 'rloo':
    params[2] = configs[2] = None
  return stage(run, models(*configs), models(*params))


def _recipe(path: str) -> Any:
  spec = importlib.util.spec_from_file_location('recipe', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _respond(stage: Any, states: Any, prompts: Any) -> Any:
  if hasattr(stage, 'respond'):  # before there was `ppo.step`
    return stage.respond(states, prompts, 0)
  step = importlib.import_module('ma_rlhf_jax.ppo.step')
  return step.respond(stage.programs, states, prompts, 0)


def record(recipe: str, output: str, steps: int) -> None:
  """Writes what this checkout does to an .npz file."""
  import jax

  jax.config.update('jax_enable_x64', True)
  from ma_rlhf_jax.training import judge

  found: dict[str, np.ndarray] = {}
  with tempfile.TemporaryDirectory() as folder:
    for variant in _VARIANTS:
      for way in _WAYS if variant != 'rloo' else ('off',):
        name = f'{variant or "ours"} {way}'
        print(f'  {name}', flush=True)
        stage = _stage(recipe, variant, way, f'{folder}/{variant}')
        with jax.set_mesh(stage.run.mesh):
          states = stage.states
          prompts = judge.prompt_batch(
              stage.run,
              stage.data,
              stage.rows(0),
              stage.config.samples_per_prompt,
          )
          drawn = _respond(stage, states, prompts).sequences.tokens_BL
          found[f'{name} tokens'] = np.asarray(drawn)
          for index in range(steps):
            states, metrics = stage.step(states, index)
            for key, value in metrics.items():
              found[f'{name} {index} {key}'] = np.asarray(value)
        for model in ('policy', 'critic'):
          if model in states:
            leaves = jax.tree.leaves(states[model].params)
            joined = np.concatenate([np.ravel(x) for x in leaves])
            found[f'{name} {model}'] = joined
  np.savez(output, **found)


def compare(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> int:
  """Prints the largest difference of each kind; how many are too large."""
  names = sorted(old.keys() & new.keys())
  only = sorted(old.keys() ^ new.keys())
  if only:
    print('in one checkout only:', ', '.join(only[:8]))
  worst: dict[str, tuple[float, str]] = {}
  wrong = 0
  for name in names:
    a, b = old[name].astype(np.float64), new[name].astype(np.float64)
    scale = max(1.0, float(np.max(np.abs(a), initial=0.0)))
    gap = float(np.max(np.abs(a - b), initial=0.0)) / scale
    wrong += not gap <= _BOUND
    kind = ' '.join(name.split()[:2])
    worst[kind] = max(worst.get(kind, (0.0, '')), (gap, name))
  for kind, (gap, name) in worst.items():
    words = 'bit for bit' if gap == 0 else f'{gap:.1e} in {name!r}'
    print(f'{kind:20}{words}')
  print(f'{len(names)} arrays compared, {wrong} differ by more than {_BOUND:g}')
  return wrong


def main() -> int:
  """Records in both checkouts, each in a process of its own, and compares."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('old', type=pathlib.Path)
  parser.add_argument('new', type=pathlib.Path)
  parser.add_argument('--steps', type=int, default=3)
  parser.add_argument('--record', help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.record:
    recipe = given.new / 'configs' / 'tiny.py'
    record(str(recipe), given.record, given.steps)
    return 0
  with tempfile.TemporaryDirectory() as folder:
    found = []
    for checkout in (given.old, given.new):
      print(f'{checkout}:', flush=True)
      output = f'{folder}/{len(found)}.npz'
      subprocess.run(
          [
              sys.executable,
              str(pathlib.Path(__file__).resolve()),
              str(given.old),
              str(checkout.resolve()),
              f'--steps={given.steps}',
              f'--record={output}',
          ],
          check=True,
          cwd=checkout,
          env=os.environ
          | {'PYTHONPATH': str(checkout.resolve()), 'JAX_PLATFORMS': 'cpu'},
      )
      with np.load(output) as arrays:
        found.append(dict(arrays))
  return int(compare(*found) > 0)


if __name__ == '__main__':
  sys.exit(main())
