"""The whole job as a user starts it, with a model of some thousand parameters.

One run of all stages is shared; the others start from its SFT and reward model
or compile the same programs, which a cache keeps.
"""

import gzip
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any

import orbax.checkpoint as ocp
import pytest

from ma_rlhf_jax import manifest
from ma_rlhf_jax.models import fingerprint, huggingface
from ma_rlhf_jax.training import metrics as metrics_lib
from ma_rlhf_jax.training import symptoms
from tests import whole_run
from tests.hashing import params_sha256

_ROOT = pathlib.Path(__file__).parents[1]
_STAGES = ('sft', 'reward_model', 'ppo')
_RECIPE = whole_run.recipe()
# Ends the process in the middle of PPO as `kill -9` does: after update 5 was
# logged and the checkpoint of step 4 committed.
_KILLED = """
import os, pathlib, signal, time
from ma_rlhf_jax.ppo import stage
from ma_rlhf_jax.training import metrics

metrics.MetricsWriter.__init__.__kwdefaults__['flush_seconds'] = 0.0
step = stage.PPO.step

def killed(self, states, index):
  if index == 6:
    while not (self.run.workdir / 'ppo' / 'checkpoints' / '4').exists():
      time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
  return step(self, states, index)

stage.PPO.step = killed
"""


class _Machine:
  """Runs `train` in processes of their own, on one device."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.recipe = folder / 'recipe.py'
    self.recipe.write_text(_RECIPE)
    flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')
    self.env = {
        **os.environ,
        'PYTHONPATH': str(_ROOT),
        'HF_HUB_OFFLINE': '1',
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': flags,
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }

  def train(
      self,
      workdir: str,
      *arguments: str,
      recipe: str | None = None,
      returncode: int = 0,
      **fields: Any,
  ) -> str:
    """What it printed."""
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'ma_rlhf_jax.train',
            f'--config={recipe or self.recipe}',
            f'--workdir={self.folder / workdir}',
            *arguments,
        ],
        **{'cwd': self.folder, 'env': self.env, **fields},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == returncode, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope='module')
def machine(tmp_path_factory: pytest.TempPathFactory) -> _Machine:
  return _Machine(tmp_path_factory.mktemp('end_to_end'))


@pytest.fixture(scope='module')
def first(machine: _Machine) -> tuple[pathlib.Path, str]:
  """A workdir with all stages done, and what was printed."""
  return machine.folder / 'first', machine.train('first')


def _done(workdir: pathlib.Path, stage: str) -> dict[str, Any]:
  return json.loads((workdir / stage / 'done.json').read_text())


def _rows(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Metric rows without what a clock says."""
  return [
      {k: v for k, v in row.items() if not k.startswith(('time/', 'host/'))}
      for row in metrics_lib.read_metrics(folder)
  ]


def _loaded_sha256(workdir: pathlib.Path, stage: str, kind: str) -> str:
  folder = workdir / stage / 'hf'
  shape = huggingface.read_shape(folder)
  return params_sha256(huggingface.load_params(folder, shape, kind))


def test_each_stage_logs_every_update_and_ends_with_its_marker(
    first: tuple[pathlib.Path, str],
) -> None:
  workdir, printed = first
  names = {
      'sft': ('loss/sft', 'policy/lr', 'policy/grad_norm'),
      'reward_model': ('loss/reward_model', 'reward_model/accuracy'),
      'ppo': (
          'objective/kl',
          'objective/score',
          'policy/clipfrac',
          'loss/policy',
          'loss/critic',
          'response/length',
          'sampler/kl',
      ),
  }
  evaluated = {
      'sft': ([0, 2, 3], 'eval/loss'),
      'reward_model': ([0, 3], 'eval/accuracy'),
      'ppo': ([0, 4, 8], 'eval/score'),
  }
  for stage in _STAGES:
    rows = _rows(workdir / stage)
    updates = {'ppo': 8}.get(stage, 3)
    assert [row['step'] for row in rows] == list(range(updates + 1))
    for row in rows[1:]:
      assert set(names[stage]) <= row.keys()
    steps, metric = evaluated[stage]
    assert [row['step'] for row in rows if metric in row] == steps
    assert _done(workdir, stage)['step'] == updates
    assert f'{stage}: done in ' in printed
  # The policy has not moved before the first update.
  before = _rows(workdir / 'ppo')[0]
  assert before['eval/kl'] == pytest.approx(0, abs=1e-5)
  assert -1 <= before['eval/gold'] <= 1 <= before['eval/length'] <= 48


def test_the_comparison_is_printed_and_kept(
    first: tuple[pathlib.Path, str],
) -> None:
  workdir, printed = first
  path = workdir / 'evaluate' / 'comparison.json'
  found = manifest.read_sealed(path)
  rows = found['rows']
  assert found['prompts'] == found['settings']['evaluate.prompts'] == 16
  assert set(rows) == {
      'score',
      'kl',
      'policy_kl',
      'gold',
      'length',
      'ended',
      'repeated',
      'win rate by gold',
  }
  mean, low, high = rows['score']['difference']
  assert low <= mean <= high
  assert rows['kl']['sft'] == pytest.approx([0, 0, 0], abs=1e-5)
  assert rows['kl']['ppo'][0] != 0
  assert rows['policy_kl'] == rows['kl']  # drawn at temperature 1, unfiltered
  assert '16 held-out prompts, mean [95 % interval]' in printed
  assert 'win rate by gold' in printed
  assert _done(workdir, 'evaluate')['comparison'] == found
  assert 'verdict: ' in printed
  codes = json.loads((workdir / 'evaluate' / 'verdict.json').read_text())
  assert set(codes) <= set(symptoms.CODES)


def _saved_sha256(workdir: pathlib.Path, stage: str, role: str) -> str:
  """Of the parameters in the last checkpoint of a stage."""
  steps = [int(p.name) for p in (workdir / stage / 'checkpoints').iterdir()]
  folder = workdir / stage / 'checkpoints' / str(max(steps)) / 'state'
  with ocp.StandardCheckpointer() as reader:
    return params_sha256(reader.restore(folder)[role]['params'])


def test_what_is_written_is_what_was_trained(
    first: tuple[pathlib.Path, str],
) -> None:
  workdir, _ = first
  roles = {'sft': 'policy', 'reward_model': 'reward_model', 'ppo': 'policy'}
  found = {}
  for stage, role in roles.items():
    kind = 'scalar' if role == 'reward_model' else 'policy'
    found[stage] = _loaded_sha256(workdir, stage, kind)
    assert found[stage] == _saved_sha256(workdir, stage, role)
    hf = f'{stage}/hf'
    want = manifest.digest_of(workdir / hf)
    assert _done(workdir, stage)['products'][hf] == want
  assert found['ppo'] != found['sft']
  origins = json.loads((workdir / 'ppo' / 'origins.json').read_text())
  for role, stage in (
      ('reference policy', 'sft'),
      ('reward model', 'reward_model'),
  ):
    used = origins[role]['sha256_of_files']
    assert used == fingerprint.of_folder(workdir / stage / 'hf')


def test_the_exported_policy_loads_in_transformers(
    first: tuple[pathlib.Path, str],
) -> None:
  transformers = pytest.importorskip('transformers')
  folder = str(first[0] / 'ppo' / 'hf')
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  text = ' work calm and fair rude also kind neat.'
  ids = tokenizer(text)['input_ids']
  assert ids[0] == tokenizer.bos_token_id == 2
  assert tokenizer.decode(ids[1:]) == text
  torch = pytest.importorskip('torch')
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  with torch.no_grad():
    logits = model(torch.tensor([ids])).logits
  assert logits.shape == (1, len(ids), 512)
  assert bool(torch.isfinite(logits).all())


def test_started_again_it_skips_what_is_done(
    machine: _Machine, first: tuple[pathlib.Path, str]
) -> None:
  workdir, _ = first
  marks = {
      stage: (workdir / stage / 'done.json').stat().st_mtime_ns
      for stage in _STAGES
  }
  printed = machine.train('first', f'--config.stages={_STAGES!r}')
  for stage, mark in marks.items():
    assert f'{stage}: done before, in {workdir / stage}' in printed
    assert (workdir / stage / 'done.json').stat().st_mtime_ns == mark
  assert sorted(p.name for p in workdir.glob('run-*.json')) == [
      'run-0001.json',
      'run-0002.json',
  ]


@pytest.mark.slow
def test_a_variant_shares_sft_and_reward_model_by_hash(
    machine: _Machine, first: tuple[pathlib.Path, str]
) -> None:
  workdir, _ = first
  printed = machine.train(
      'variant',
      f'--config.ppo.from={workdir}',
      recipe=f'{machine.recipe}:ngram=1',
  )
  variant = machine.folder / 'variant'
  for stage in ('sft', 'reward_model'):
    assert f'{stage}: skipped, ppo.from gives {workdir / stage / "hf"}' in (
        printed
    )
    assert not (variant / stage).exists()
  assert _rows(variant / 'ppo')[1]['macro/length_mean'] == 1
  used = [
      json.loads((folder / 'ppo' / 'origins.json').read_text())
      for folder in (workdir, variant)
  ]
  for role in ('reference policy', 'reward model'):
    assert used[0][role]['sha256_of_files'] == used[1][role]['sha256_of_files']
  assert _done(variant, 'ppo')['products'] != _done(workdir, 'ppo')['products']
  config = json.loads((variant / 'config.json').read_text())
  assert config['macro.ngram'] == 1
  assert (variant / 'evaluate' / 'comparison.json').is_file()


@pytest.mark.slow
def test_killed_and_started_again_it_ends_bit_for_bit_the_same(
    machine: _Machine, first: tuple[pathlib.Path, str]
) -> None:
  workdir, _ = first
  arguments = f'--config.ppo.from={workdir}', "--config.stages=('ppo',)"
  killing = machine.folder / 'killing.py'
  killing.write_text(_RECIPE + _KILLED)
  machine.train(
      'killed', *arguments, recipe=str(killing), returncode=-signal.SIGKILL
  )
  killed = machine.folder / 'killed' / 'ppo'
  before = _rows(killed)
  assert [row['step'] for row in before] == [0, 1, 2, 3, 4, 5]
  assert not (killed / 'done.json').exists()
  machine.train('killed', *arguments)
  # The second start went on after the checkpoint and wrote step 5 again.
  again = sorted((killed / 'metrics').glob('0002-*.jsonl'))
  assert json.loads(again[0].read_text().splitlines()[0])['step'] == 5
  assert _rows(killed) == _rows(workdir / 'ppo')
  assert _done(killed.parent, 'ppo') == _done(workdir, 'ppo')


def _anthropic_rows(count: int) -> list[dict[str, str]]:
  """Raw rows: whole dialogues that share all but the last reply."""
  rows = []
  for i in range(count):
    prompt = f'\n\nHuman: Is {i} even?\n\nAssistant:'
    good, bad = ('Yes', 'No') if i % 2 == 0 else ('No', 'Yes')
    rows.append(
        {'chosen': f'{prompt} {good}.', 'rejected': f'{prompt} {bad}, {i}.'}
    )
  return rows


@pytest.mark.slow
def test_raw_anthropic_rows_run_through_all_stages(machine: _Machine) -> None:
  rows = _anthropic_rows(150)
  rows[3] = {'chosen': 'no turn at all', 'rejected': 'none'}
  path = machine.folder / 'hh.jsonl.gz'
  with gzip.open(path, 'wt') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)
  printed = machine.train(
      'hh',
      '--config.data.task=hh',
      f'--config.data.path={path}',
  )
  # 134 rows are dealt 2 : 4 : 4; one of all 150 is no dialogue
  assert '134 training rows, 16 held-out rows, 1 no assistant turn' in printed
  rows = json.loads(
      (machine.folder / 'hh' / 'evaluate' / 'comparison.json').read_text()
  )['rows']
  assert 'gold' not in rows and 'win rate by score' in rows
  accuracies = [
      row['eval/accuracy']
      for row in _rows(machine.folder / 'hh' / 'reward_model')
      if 'eval/accuracy' in row
  ]
  assert len(accuracies) == 2 and all(0 <= a <= 1 for a in accuracies)


@pytest.mark.slow
def test_installed_it_trains_a_recipe_of_a_foreign_folder(
    machine: _Machine, tmp_path: pathlib.Path
) -> None:
  source, target = tmp_path / 'source', tmp_path / 'target'
  source.mkdir()  # the build writes into its folder
  for name in ('ma_rlhf_jax', 'configs'):
    shutil.copytree(
        _ROOT / name,
        source / name,
        ignore=shutil.ignore_patterns('__pycache__'),
    )
  for name in ('setup.py', 'pyproject.toml', 'LICENSE'):
    shutil.copy(_ROOT / name, source)
  install = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps']
  install += ['--no-build-isolation', '--target', str(target), str(source)]
  subprocess.run(install, check=True, cwd='/')
  shutil.rmtree(source)
  machine.train(
      'installed', cwd='/', env={**machine.env, 'PYTHONPATH': str(target)}
  )
  workdir = machine.folder / 'installed'
  start = json.loads((workdir / 'run-0001.json').read_text())
  assert start['git'] is None  # not the checkout
  assert _done(workdir, 'ppo')['step'] == 8
  found = subprocess.run(
      [
          sys.executable,
          '-c',
          'from ma_rlhf_jax import config; print(config.default_recipe())',
      ],
      cwd='/',
      env={**machine.env, 'PYTHONPATH': str(target)},
      capture_output=True,
      text=True,
      check=True,
  ).stdout.strip()
  assert found == str(target / 'ma_rlhf_jax' / 'configs' / 'tiny.py')
