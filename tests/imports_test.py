"""Start-up: what is imported before it is needed."""

import json
import subprocess
import sys

import pytest

# Each takes from half a second to many seconds, or claims an accelerator.
_HEAVY = (
    'datasets',
    'spacy',
    'tensorboardX',
    'tensorflow',
    'tensorflow_text',
    'torch',
    'transformers',
    'wandb',
)


def _loaded(statement: str, names: tuple[str, ...]) -> list[str]:
  """Those of the modules `names` that a fresh process has after `statement`."""
  code = (
      f'{statement}\nimport json, sys\n'
      f'print(json.dumps(sorted(sys.modules.keys() & set({names!r}))))'
  )
  done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def test_loaded_modules_are_seen() -> None:
  assert _loaded('import csv, wave', ('csv', 'wave', 'gzip')) == ['csv', 'wave']


@pytest.mark.parametrize(
    'verb',
    [
        'train',
        'generate',
        pytest.param('evaluate', marks=pytest.mark.slow),
        pytest.param('export', marks=pytest.mark.slow),
    ],
)
def test_verbs_start_without_heavy_modules(verb: str) -> None:
  assert _loaded(f'import ma_rlhf_jax.{verb}', _HEAVY) == []


def test_config_needs_no_accelerator_library() -> None:
  names = (*_HEAVY, 'flax', 'jax', 'optax', 'orbax')
  assert _loaded('import ma_rlhf_jax.config', names) == []
