"""Where weights come from, across workdirs."""

import dataclasses
import pathlib

import pytest

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.models.presets import PRESETS
from ma_rlhf_jax.publishing import lineage
from tests import tiny

_STAGES = ('sft', 'reward_model', 'ppo', 'critic')


@pytest.mark.parametrize(
    'name, on_hub',
    [
        ('google/gemma-2b', True),
        ('user/name_1.0', True),
        ('gemma-2b', False),
        ('/models/gemma', False),
        ('./models/gemma', False),
        ('~/gemma', False),
        ('a/b/c', False),
        ('data/rows.jsonl', False),
        ('data/rows.jsonl.gz', False),
        ('user/na me', False),
        ('gs://bucket/x', False),
        ('', False),
    ],
)
def test_names_on_the_hub(name: str, on_hub: bool) -> None:
  assert lineage.is_hub_id(name) == on_hub


def test_a_folder_of_that_name_goes_before_the_hub(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  (tmp_path / 'google' / 'gemma-2b').mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  assert not lineage.is_hub_id('google/gemma-2b')


@pytest.mark.parametrize(
    'fields, want',
    [
        ({}, ('', '', '', '')),
        ({'sft__init': 'a'}, ('a', 'a', 'a', 'a')),
        # What PPO starts from is what the reward model starts from, too.
        ({'sft__init': 'a', 'ppo__policy_init': 'b'}, ('a', 'b', 'b', 'b')),
        ({'sft__init': 'a', 'reward_model__init': 'c'}, ('a', 'c', 'a', 'c')),
        ({'sft__init': 'a', 'ppo__reward_model': 'd'}, ('a', 'a', 'a', 'd')),
        ({'sft__init': 'a', 'ppo__critic_init': 'e'}, ('a', 'a', 'a', 'e')),
    ],
)
def test_every_stage_goes_back_to_what_was_named(
    fields: dict[str, str], want: tuple[str, ...]
) -> None:
  config = tiny.config(**fields)
  found = tuple(lineage.base_model(config, stage) for stage in _STAGES)
  assert found == want


def test_workdirs_are_followed_to_their_own_start(
    tmp_path: pathlib.Path,
) -> None:
  first, second = tmp_path / 'first', tmp_path / 'second'
  workdir_lib.open_workdir(first, tiny.config(sft__init='google/gemma-2b'))
  other = tiny.config(ppo__from_run=str(first))
  workdir_lib.open_workdir(second, other)
  for folder, stage in (
      (first, 'sft'),
      (first, 'reward_model'),
      (second, 'sft'),
  ):
    workdir_lib.mark_done(folder, stage, {'step': 1})
  third = tiny.config(sft__init=str(second), ppo__reward_model='me/rm')
  bases = [lineage.base_model(third, stage) for stage in _STAGES]
  # SFT of `second` was never made; it has random weights for its start.
  assert bases == ['', '', '', 'me/rm']
  assert [lineage.base_model(other, s) for s in ('ppo', 'critic')] == (
      ['google/gemma-2b'] * 2
  )


def test_terms_of_gemma_hold_for_its_shapes_and_names() -> None:
  shape = dataclasses.replace(
      PRESETS['gemma-2-2b'], vocab_size=256_128, dtype='bfloat16'
  )
  assert lineage.is_gemma('/models/mine', shape)
  assert lineage.is_gemma('google/gemma-3-1b', tiny.SHAPE)
  assert not lineage.is_gemma('me/small', tiny.SHAPE)
  assert not lineage.is_gemma('', shape)  # random weights of that shape


@pytest.mark.parametrize(
    ('base', 'name'),
    [
        ('google/gemma-2b', 'google/gemma-2b'),
        (
            '/c/hub/models--google--gemma-2b/snapshots/0123abc',
            'google/gemma-2b',
        ),
        ('/home/me/gemma-2b', ''),
        ('gs://bucket/gemma', ''),
    ],
)
def test_a_base_is_called_by_its_place_on_the_hub(base: str, name: str) -> None:
  assert lineage.public_name(base) == name
