"""A product that is no longer as it was written is made again."""

import logging
import pathlib
import shutil

import pytest

from ma_rlhf_jax import manifest
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.training import product_digests
from tests import tiny

STAGES = ('sft', 'reward_model', 'ppo')


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
  """Three done stages; PPO has made a policy and a critic."""
  for name in ('sft/hf', 'reward_model/hf', 'ppo/hf', 'ppo/critic'):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / 'model.safetensors').write_text(name)
    manifest.write(tmp_path / name)
  for stage in STAGES:
    made = product_digests.digests(tmp_path, stage)
    workdir_lib.mark_done(tmp_path, stage, {'step': 1, 'products': made})
  return tmp_path


def _done(workdir: pathlib.Path) -> list[str]:
  return [s for s in STAGES if workdir_lib.read_done(workdir, s)]


def test_the_marker_names_every_folder_of_a_stage(
    workdir: pathlib.Path,
) -> None:
  assert workdir_lib.read_done(workdir, 'ppo')['products'] == {
      name: manifest.digest_of(workdir / name)
      for name in ('ppo/hf', 'ppo/critic')
  }
  product_digests.discard_damaged(tiny.config(), workdir)
  assert _done(workdir) == list(STAGES)


@pytest.mark.parametrize(
    'stage, damage',
    [
        (
            'sft',
            lambda w: (w / 'sft/hf/model.safetensors').write_text('sft/hg'),
        ),
        ('reward_model', lambda w: shutil.rmtree(w / 'reward_model/hf')),
        ('ppo', lambda w: (w / 'ppo/critic' / manifest.NAME).unlink()),
        # whole, but another one
        (
            'ppo',
            lambda w: shutil.copytree(
                w / 'sft/hf', w / 'ppo/hf', dirs_exist_ok=True
            ),
        ),
    ],
)
def test_the_stage_of_a_damaged_product_is_not_done_any_more(
    workdir: pathlib.Path, caplog: pytest.LogCaptureFixture, stage, damage
) -> None:
  damage(workdir)
  with caplog.at_level(logging.WARNING):
    product_digests.discard_damaged(tiny.config(), workdir)
  assert _done(workdir) == [s for s in STAGES if s != stage]
  (line,) = [r.getMessage() for r in caplog.records]
  assert 'damaged' in line and f'{workdir / stage}' in line
  assert 'made again' in line


def test_stages_that_the_config_does_not_list_are_left_alone(
    workdir: pathlib.Path,
) -> None:
  shutil.rmtree(workdir / 'sft' / 'hf')
  product_digests.discard_damaged(tiny.config(stages=('ppo',)), workdir)
  assert _done(workdir) == list(STAGES)


def test_a_damaged_product_of_a_stage_that_is_not_run_ends_the_start(
    workdir: pathlib.Path,
) -> None:
  (workdir / 'sft/hf/model.safetensors').write_text('sft/hg')
  with pytest.raises(manifest.DamagedError, match="sft/hf.*'sft' is in stages"):
    product_digests.discard_damaged(tiny.config(stages=('ppo',)), workdir)
