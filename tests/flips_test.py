"""One flipped bit anywhere in a workdir is never used in silence.

Either all that the run makes is the same, byte for byte, or a line holds the
word `damaged` and the file.
"""

from collections.abc import Callable
import logging
import pathlib
import shutil
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import export, manifest, train
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.generation import finished
from ma_rlhf_jax.ppo.stage import PPO
from ma_rlhf_jax.training.products import SourceError
from ma_rlhf_jax.training.sft import SFT
from tests import products, whole_run

_FLIPS = 100
_PRODUCTS = ('sft/hf', 'reward_model/hf', 'ppo/hf', 'ppo/critic')


def _flip(path: pathlib.Path, random: np.random.Generator) -> None:
  content = bytearray(path.read_bytes())
  bit = int(random.integers(8 * len(content)))
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A workdir whose stages are done, made without training."""
  return pathlib.Path(
      products.make(tmp_path_factory.mktemp('made'), stages=('ppo',)).workdir
  )


@pytest.mark.parametrize(
    'file',
    [
        'model.safetensors',
        'config.json',
        'tokenizer.json',
        'tokenizer_config.json',
        'generation_config.json',
        manifest.NAME,
    ],
)
def test_a_damaged_product_is_neither_served_nor_exported(
    made: pathlib.Path, tmp_path: pathlib.Path, file: str
) -> None:
  workdir = tmp_path / 'run'
  shutil.copytree(made, workdir)
  path = workdir / 'ppo' / 'hf' / file
  text = path.read_bytes()
  # One bit of a name, a letter or a weight, where no parser looks twice.
  at = text.rindex(b'a') if file.endswith('.json') else len(text) - 2
  path.write_bytes(text[:at] + bytes([text[at] ^ 2]) + text[at + 1 :])
  with pytest.raises(SourceError) as caught:
    finished.find('model', str(workdir), 'float32').load()
  assert f'{path} is damaged' in str(caught.value)
  assert f'run the train command of {workdir} again' in str(caught.value)
  with pytest.raises(ValueError, match=f'{file} is damaged'):
    export.export(export.Request(str(workdir), str(tmp_path / 'out')))
  assert not (tmp_path / 'out').exists()


def _config(*stages: str) -> ConfigDict:
  config = config_lib.base()
  config.update_from_flattened_dict(whole_run.FIELDS | {
      'sft.steps': 4, 'sft.eval_every': 0, 'reward_model.steps': 2,
      'ppo.steps': 4, 'ppo.eval_every': 0, 'checkpoint.every': 1,
      'log.samples': 0, 'stages': stages,
  })  # fmt: skip
  return config


def _start(workdir: pathlib.Path, *stages: str) -> str:
  """What `train` says when it ends with an error; '' = it was done."""
  config = _config(*(stages or ('sft', 'reward_model', 'ppo')))
  try:
    run = train.set_up(config, 'flips.py', str(workdir))
    with jax.set_mesh(run.mesh):
      train.train(run)
  except (*train._SET_UP_ERRORS, *train._ERRORS) as error:
    return str(error)
  return ''


def _bytes(workdir: pathlib.Path) -> dict[str, bytes]:
  """All that the run has made for others."""
  return {
      str(path.relative_to(workdir)): path.read_bytes()
      for name in (*_PRODUCTS, 'tokenizer')
      if (workdir / name).exists()
      for path in sorted((workdir / name).iterdir())
  }


@pytest.fixture(scope='module')
def runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, pathlib.Path]:
  """A finished run, and two that were stopped half-way: in SFT and in PPO."""
  root = tmp_path_factory.mktemp('runs')
  assert _start(root / 'finished') == ''
  with pytest.MonkeyPatch.context() as patched:
    for stage, stages, last in ((SFT, ('sft',), 3), (PPO, (), 2)):
      patched.setattr(stage, 'step', _stopping(stage.step, after=last))
      with pytest.raises(KeyboardInterrupt):
        _start(root / stage.__name__, *stages)
  return {path.name: path for path in root.iterdir()}


def _stopping(step: Callable[..., Any], after: int) -> Callable[..., Any]:
  def stopped(self: Any, states: dict, index: int) -> tuple:
    if index == after:
      raise KeyboardInterrupt
    return step(self, states, index)

  return stopped


_KINDS = {
    'checkpoints': '*/checkpoints/*/**/*',
    'products': '*/hf/*',
    'critic': 'ppo/critic/*',
    'data': 'data/*',
    'tokenizer': 'tokenizer/*',
    'markers': '*.json',
    'stage markers': '*/*.json',
    'metrics': '*/metrics/*',
}


def _place(
    workdir: pathlib.Path, random: np.random.Generator
) -> pathlib.Path | None:
  """A file of a kind, both by chance; None where there is none."""
  kind = list(_KINDS)[int(random.integers(len(_KINDS)))]
  files = sorted(p for p in workdir.glob(_KINDS[kind]) if p.is_file())
  files = [p for p in files if p.stat().st_size]
  return files[int(random.integers(len(files)))] if files else None


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_no_flipped_bit_is_used_in_silence(
    runs: dict[str, pathlib.Path],
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
  random = np.random.default_rng(0)
  want, wrong, told = _bytes(runs['finished']), [], 0
  for number in range(_FLIPS):
    # One in five in PPO, which takes longest.
    name = ('finished', 'SFT', 'finished', 'SFT', 'PPO')[number % 5]
    source, stages = runs[name], ('sft',) if name == 'SFT' else ()
    while (place := _place(source, random)) is None:
      pass
    workdir = tmp_path / str(number)
    shutil.copytree(source, workdir)
    file = workdir / place.relative_to(source)
    _flip(file, random)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      error = _start(workdir, *stages)
    workdir_lib._warn_once.cache_clear()
    lines = [record.getMessage() for record in caplog.records]
    seen = any('damaged' in line for line in (*lines, error))
    told += seen
    made = _bytes(workdir)
    same = not error and made.items() <= want.items() and len(made) > 5
    print(number, place.relative_to(source.parent), seen, same, error)
    if not same and not ('damaged' in error and '\n' not in error):
      wrong.append((str(place), lines, error))
    shutil.rmtree(workdir)
  assert wrong == []
  assert told > _FLIPS / 2
