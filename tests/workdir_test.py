"""A workdir takes the run that it belongs to and refuses all others."""

import json
import logging
import os
import pathlib
import subprocess
import sys

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import manifest
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.parallel import processes
from ma_rlhf_jax.workdir import (
    WorkdirError,
    default_workdir,
    mark_done,
    open_workdir,
    read_done,
)
from tests import tiny


def _config(**fields: object) -> ConfigDict:
  config = config_lib.base()
  config.update_from_flattened_dict(
      {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return config


@pytest.mark.parametrize(
    'recipe, slug',
    [
        ('configs/tiny.py', 'tiny'),
        ('/abs/configs/tiny.py:ngram=1', 'tiny-ngram=1'),
        ('tiny.py:ngram=1,seed=2', 'tiny-ngram=1,seed=2'),
        ('my recipes/a b$(c).py:x=../../y z', 'a-b-c-x=..-..-y-z'),
        ('..', 'run'),
        ('x' * 300 + '.py', 'x' * 80),
    ],
)
def test_default_workdir_names_recipe_arguments_and_config(recipe, slug):
  config = _config(seed=3)
  digest = config_lib.fingerprint(config)[:8]
  assert default_workdir(recipe, config) == f'runs/{slug}-{digest}'
  assert default_workdir(recipe, _config(seed=4)) != f'runs/{slug}-{digest}'


def test_a_new_workdir_holds_config_and_start(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'argv', ['train', '--config.seed=3'])
  config = _config(seed=3)
  workdir = open_workdir('runs/x', config)
  assert workdir == epath.Path(tmp_path / 'runs' / 'x')
  stored = manifest.read_sealed(workdir / 'config.json')
  assert stored == config_lib.flatten(config)
  start = manifest.read_sealed(workdir / 'run-0001.json')
  assert start['command'] == ['train', '--config.seed=3']
  assert start['config'] == stored
  assert start['packages']['jax'] == jax.__version__
  assert start['packages']['numpy'] == np.__version__
  assert start['python'].split('.')[0] == '3'
  assert start['devices']['count'] == jax.device_count()
  assert start['devices']['platform'] == jax.default_backend()


def test_each_start_is_kept_and_resumable_fields_may_differ(tmp_path):
  folder = tmp_path / 'run'
  open_workdir(folder, _config())
  for start in range(2, 5):
    open_workdir(folder, _config(checkpoint__every=start))
  names = sorted(p.name for p in folder.iterdir())
  assert names == ['config.json'] + [f'run-000{n}.json' for n in range(1, 5)]
  last = json.loads((folder / 'run-0004.json').read_text())
  assert last['config']['checkpoint.every'] == 4
  first = json.loads((folder / 'config.json').read_text())
  assert first['checkpoint.every'] == config_lib.base().checkpoint.every


def test_another_config_is_refused_with_the_fields(tmp_path):
  folder = tmp_path / 'run'
  open_workdir(folder, _config())
  with pytest.raises(WorkdirError) as caught:
    open_workdir(folder, _config(ppo__kl_coef=0.125, seed=7, log__every=9))
  message = str(caught.value)
  assert 'ppo.kl_coef: stored 0.05, now 0.125' in message
  assert 'seed: stored 0, now 7' in message
  assert 'log.every' not in message
  assert '--workdir' in message and 'restore these values' in message
  assert not (folder / 'run-0002.json').exists()


def test_files_and_folders_of_something_else_are_refused(tmp_path):
  file = tmp_path / 'file'
  file.write_text('x')
  with pytest.raises(WorkdirError, match='is a file'):
    open_workdir(file, _config())
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'thesis.tex').write_text('x')
  with pytest.raises(WorkdirError, match='found thesis.tex'):
    open_workdir(other, _config())
  assert [p.name for p in other.iterdir()] == ['thesis.tex']
  hidden = tmp_path / 'hidden'
  hidden.mkdir()
  (hidden / '.DS_Store').write_text('')
  assert (open_workdir(hidden, _config()) / 'config.json').exists()


def test_a_damaged_config_is_taken_from_a_start_or_named(tmp_path, caplog):
  folder = tmp_path / 'run'
  open_workdir(folder, _config(seed=3))
  file, start = folder / 'config.json', folder / 'run-0001.json'
  whole = file.read_text()
  # Still JSON, of another run.
  for damaged in (whole.replace('"seed": 3', '"seed": 7'), whole[:100], ''):
    file.write_text(damaged)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      _, found = workdir_lib.read_config(folder)
      assert found.seed == 3
      with pytest.raises(WorkdirError, match='seed: stored 3, now 7'):
        open_workdir(folder, _config(seed=7))
    assert 'is damaged' in caplog.text and start.name in caplog.text
    open_workdir(folder, _config(seed=3))
    assert file.read_text() == whole
    workdir_lib._warn_once.cache_clear()
  file.write_text(whole.replace('"seed": 3', '"seed": 7'))
  for path in folder.glob('run-*.json'):
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 7'))
  with pytest.raises(WorkdirError, match='config.json is damaged.*--workdir'):
    open_workdir(folder, _config(seed=7))


def test_a_config_cut_in_the_first_moment_is_written_again(tmp_path):
  folder = tmp_path / 'run'
  open_workdir(folder, _config())
  whole = (folder / 'config.json').read_text()
  (folder / 'config.json').write_text(whole[:100])
  (folder / 'run-0001.json').unlink()
  open_workdir(folder, _config())
  assert (folder / 'config.json').read_text() == whole


def test_other_processes_must_see_what_the_first_wrote(tmp_path, monkeypatch):
  open_workdir(tmp_path / 'shared', _config())
  monkeypatch.setattr(processes, 'is_first', lambda: False)
  folder = open_workdir(tmp_path / 'shared', _config())
  assert [p.name for p in folder.glob('run-*')] == ['run-0001.json']
  with pytest.raises(WorkdirError, match='give a folder that all hosts share'):
    open_workdir(tmp_path / 'of_this_host', _config())
  workdir_lib.mark_done(folder, 'sft', {'step': 1})
  assert workdir_lib.read_done(folder, 'sft') is None


def test_a_stage_is_done_once_its_marker_is_whole(tmp_path, caplog):
  product = {'step': 40, 'products': {'sft/hf': 'ab'}}
  assert read_done(tmp_path, 'sft') is None
  mark_done(tmp_path, 'sft', product)
  assert read_done(tmp_path, 'sft') == product
  assert read_done(tmp_path, 'ppo') is None
  path = tmp_path / 'sft' / 'done.json'
  whole = path.read_text()
  with caplog.at_level(logging.WARNING):
    for cut in range(len(whole) - 1):  # the last character is the newline
      path.write_text(whole[:cut])
      assert read_done(tmp_path, 'sft') is None
      workdir_lib._warn_once.cache_clear()
    path.write_text(whole.replace('40', '41'))  # whole JSON, another step
    assert read_done(tmp_path, 'sft') is None
  assert f'{path} is damaged' in caplog.text
  path.write_text(whole)
  assert read_done(tmp_path, 'sft') == product
  path.write_text('{"step": 3, "params_sha256": {}}')  # of an earlier version
  assert read_done(tmp_path, 'sft') == {'step': 3, 'params_sha256': {}}
  workdir_lib.mark_undone(tmp_path, 'sft')
  assert read_done(tmp_path, 'sft') is None


def test_git_is_recorded_only_for_a_file_that_the_checkout_tracks(tmp_path):
  env = os.environ | {
      'GIT_CONFIG_GLOBAL': os.devnull,
      'GIT_AUTHOR_NAME': 'a',
      'GIT_AUTHOR_EMAIL': 'a@example.org',
      'GIT_COMMITTER_NAME': 'a',
      'GIT_COMMITTER_EMAIL': 'a@example.org',
  }

  def git(*arguments: str) -> str:
    return subprocess.run(
        ['git', *arguments],
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()

  tracked, foreign = tmp_path / 'a.py', tmp_path / 'b.py'
  tracked.write_text('1')
  foreign.write_text('1')
  assert workdir_lib._git(tracked) is None
  git('init')
  git('add', 'a.py')
  git('commit', '-m', 'a')
  head = git('rev-parse', 'HEAD')
  assert workdir_lib._git(tracked) == {'revision': head, 'dirty': False}
  assert workdir_lib._git(foreign) is None
  tracked.write_text('2')
  assert workdir_lib._git(tracked) == {'revision': head, 'dirty': True}
  assert workdir_lib._git(pathlib.Path('/nowhere/at/all.py')) is None


def test_an_abandoned_start_leaves_nothing_of_its_own(tmp_path):
  path = workdir_lib.open_workdir(tmp_path / 'run', _config())
  (path / 'tokenizer').mkdir()
  (path / 'data').mkdir()
  (path / 'data' / 'rows.npz').write_text('x')
  workdir_lib.abandon(path)
  assert not (tmp_path / 'run').exists()

  (tmp_path / '.git').mkdir()
  path = workdir_lib.open_workdir(tmp_path, _config())
  workdir_lib.abandon(path)
  assert [p.name for p in tmp_path.iterdir()] == ['.git']


def test_the_config_of_a_workdir_is_read_back(tmp_path):
  config = _config()
  config.ppo.kl_coef = 0.25
  config.macro.random_lengths = (4, 7)
  workdir_lib.open_workdir(tmp_path / 'run', config)
  path, read = workdir_lib.read_config(tmp_path / 'run')
  assert path == epath.Path(tmp_path / 'run')
  assert config_lib.flatten(read) == config_lib.flatten(config)
  assert read.macro.random_lengths == (4, 7)
  with pytest.raises(WorkdirError, match='no workdir'):
    workdir_lib.read_config(tmp_path / 'absent')


def test_batches_are_those_that_stages_that_are_done_used(
    tmp_path: pathlib.Path,
) -> None:
  asked = tiny.config(sft__batch_size=64, reward_model__batch_size=64)
  workdir_lib.mark_done(tmp_path, 'sft', {'step': 1, 'batch_size': 32})
  workdir_lib.mark_done(tmp_path, 'reward_model', {'step': 1})
  found = workdir_lib.as_trained(tmp_path, asked)
  assert (found.sft.batch_size, found.reward_model.batch_size) == (32, 64)
  assert asked.sft.batch_size == 64


def test_a_workdir_that_cannot_be_made_names_the_flag(
    tmp_path: pathlib.Path,
) -> None:
  (tmp_path / 'file').write_text('')
  with pytest.raises(WorkdirError, match='--workdir=.*file/run cannot be made'):
    workdir_lib.open_workdir(tmp_path / 'file' / 'run', tiny.config())


def test_a_config_tells_a_start_though_its_run_files_are_missing(tmp_path):
  open_workdir(tmp_path, _config())
  for path in tmp_path.glob('run-*.json'):
    path.unlink()
  assert workdir_lib.is_started(tmp_path) and not workdir_lib.is_workdir(
      tmp_path
  )
  assert not workdir_lib.is_started(tmp_path / 'other')
