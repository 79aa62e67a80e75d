"""Whether held-out rows have chosen what a run trains, or begins with."""

import pathlib

from etils import epath
import pytest

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.training import choice
from tests import tiny


def _start(workdir: pathlib.Path, which: str = 'last', **fields: str) -> None:
  config = tiny.config(export__which=which, **fields)
  workdir_lib.open_workdir(workdir, config)


def _is_made(workdir: pathlib.Path, **fields: str) -> bool:
  return choice.is_made(tiny.config(**fields), epath.Path(workdir))


def test_the_last_checkpoint_is_no_choice(tmp_path: pathlib.Path) -> None:
  assert not _is_made(tmp_path / 'new')
  assert _is_made(tmp_path / 'new', export__which='best')
  _start(tmp_path / 'run')
  assert not _is_made(tmp_path / 'run')
  assert not _is_made(tmp_path / 'run', sft__init='google/gemma-2b')


def test_every_start_of_the_run_counts(tmp_path: pathlib.Path) -> None:
  for which in ('last', 'best', 'last'):
    _start(tmp_path, which)
  assert _is_made(tmp_path)


@pytest.mark.parametrize(
    'field, path',
    [
        ('ppo__from_run', ''),
        ('ppo__policy_init', ''),
        ('ppo__reward_model', 'reward_model/hf'),
        ('ppo__critic_init', 'ppo/critic'),
        ('reward_model__init', 'sft/hf'),
        ('sft__init', 'sft/hf'),
    ],
)
def test_what_another_run_has_chosen_counts(
    tmp_path: pathlib.Path, field: str, path: str
) -> None:
  for which in ('last', 'best'):
    (tmp_path / which / path).mkdir(parents=True)
    _start_in_place(tmp_path / which, which)
    source = {field: str(tmp_path / which / path)}
    assert _is_made(tmp_path / 'new', **source) == (which == 'best')
    stage = {field: f'{tmp_path / which}:sft'}
    assert _is_made(tmp_path / 'new', **stage) == (which == 'best')
    # And through a run that begins with that one.
    _start(tmp_path / f'after-{which}', **source)
    found = _is_made(tmp_path / 'new', sft__init=f'{tmp_path}/after-{which}')
    assert found == (which == 'best')


def _start_in_place(workdir: pathlib.Path, which: str) -> None:
  """As `_start`, in a folder that already holds a product."""
  aside = workdir.with_name(f'{workdir.name}-aside')
  _start(aside, which)
  for path in aside.iterdir():
    path.rename(workdir / path.name)


def test_a_run_that_names_itself_ends(tmp_path: pathlib.Path) -> None:
  _start(tmp_path / 'run')
  _start(tmp_path / 'run', sft__init='')
  assert not _is_made(tmp_path / 'run', ppo__from_run=str(tmp_path / 'run'))


def test_a_start_cut_by_a_kill_does_not_count(tmp_path: pathlib.Path) -> None:
  _start(tmp_path)
  (tmp_path / 'run-0002.json').write_text('{"config": {"export.which": "be')
  assert not _is_made(tmp_path)
