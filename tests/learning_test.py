"""What the tiny recipe learns: the true preference, and only from labels."""

import json
import os
import pathlib
import statistics
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_SEEDS = range(5)


def _train(workdir: pathlib.Path, *flags: str) -> dict:
  """The rows of the comparison that one run ends with."""
  environment = os.environ | {'XLA_FLAGS': ''}  # one device, as a user has
  subprocess.run(
      [
          sys.executable,
          '-m',
          'ma_rlhf_jax.train',
          f'--workdir={workdir}',
          "--config.log.sinks=('jsonl',)",
          *flags,
      ],
      cwd=_ROOT,
      env=environment,
      check=True,
  )
  path = workdir / 'evaluate' / 'comparison.json'
  return json.loads(path.read_text())['rows']


@pytest.fixture(scope='module')
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, list]:
  """One run a seed, with the labels as they are: folder and comparisons."""
  folder = tmp_path_factory.mktemp('real')
  found = [_train(folder / str(s), f'--config.seed={s}') for s in _SEEDS]
  return folder, found


@pytest.mark.slow
@pytest.mark.parametrize('seed', _SEEDS)
def test_gold_score_rises_at_a_like_length(seed: int, real: tuple) -> None:
  rows = real[1][seed]
  _, low, _ = rows['gold']['difference']
  assert low > 0
  sft, ppo = rows['length']['sft'][0], rows['length']['ppo'][0]
  assert sft / 1.5 < ppo < 1.5 * sft


@pytest.mark.slow
def test_labels_by_coin_teach_little(
    real: tuple, tmp_path: pathlib.Path
) -> None:
  folder, with_labels = real
  by_coin = [
      _train(
          tmp_path / str(seed),
          f'--config.seed={seed}',
          '--config.data.shuffle_labels=True',
          f'--config.ppo.policy_init={folder / str(seed)}:sft',
          "--config.stages=('reward_model','ppo','evaluate')",
      )
      for seed in _SEEDS
  ]
  gain = lambda runs: statistics.mean(r['gold']['difference'][0] for r in runs)
  assert gain(by_coin) < gain(with_labels) / 4
