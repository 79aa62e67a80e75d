"""Which model each stage starts from."""

import dataclasses
import pathlib

import pytest

from ma_rlhf_jax.training import sources
from ma_rlhf_jax.training.products import Source
from tests import tiny
from tests.training.stores import (
    MODEL,
    Store,
    store_config,
)


@pytest.mark.parametrize(
    'fields, want',
    [
        ({}, ['', '/w/sft/hf', '/w/sft/hf', '/w/reward_model/hf']),
        (
            {'sft__init': 'policy', 'reward_model__init': 'workdir'},
            [
                '{policy}',
                '{workdir}/sft/hf',
                '/w/sft/hf',
                '/w/reward_model/hf',
            ],
        ),
        (
            {'ppo__policy_init': 'policy', 'ppo__critic_init': 'finished'},
            ['', '{policy}', '{policy}', '{finished}/ppo/critic'],
        ),
    ],
)
def test_what_a_stage_starts_from(
    store: Store, fields: dict[str, str], want: list[str]
) -> None:
  config = store_config(store, **fields)
  found = [
      sources.base(config, '/w', stage)
      for stage in ('sft', 'reward_model', 'ppo', 'critic')
  ]
  assert found == [x.format(**dataclasses.asdict(store)) for x in want]


def test_what_a_stage_starts_from_is_a_whole_path_or_a_hub_id(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
  folder = pathlib.Path(store.policy)
  monkeypatch.chdir(folder.parent)
  config = tiny.config(sft__init=f'./{folder.name}')
  assert sources.base(config, '/w', 'sft') == store.policy
  config = tiny.config(sft__init='google/gemma-2b')
  assert sources.base(config, '/w', 'sft') == 'google/gemma-2b'


def test_nothing_given_means_the_products_of_this_run(store: Store) -> None:
  config = store_config(store)
  assert sources.source(config, '/w', 'ppo') == Source('', '/w/sft/hf')
  reward_model = Source('', '/w/reward_model/hf')
  assert sources.source(config, '/w', 'score') == reward_model
  assert sources.source(config, '/w', 'critic') == reward_model
  assert sources.given_stages(config, '/w') == {}
  assert sources.named_source(config, 'tokenizer') is None


@pytest.mark.parametrize(
    'fields, want',
    [
        ({'ppo__policy_init': 'policy'}, {'sft': 'ppo.policy_init {policy}'}),
        (
            {'ppo__policy_init': 'workdir'},
            {'sft': 'ppo.policy_init {workdir}/sft/hf'},
        ),
        (
            {'ppo__reward_model': 'scalar'},
            {'reward_model': 'ppo.reward_model {scalar}'},
        ),
        (
            {'ppo__reward_model': 'workdir'},
            {'reward_model': 'ppo.reward_model {workdir}/reward_model/hf'},
        ),
        (
            {'ppo__from_run': 'workdir'},
            {
                'sft': 'ppo.from {workdir}/sft/hf',
                'reward_model': 'ppo.from {workdir}/reward_model/hf',
            },
        ),
        (  # what is named goes before what a whole run gives
            {'ppo__from_run': 'workdir', 'ppo__policy_init': 'policy'},
            {
                'sft': 'ppo.policy_init {policy}',
                'reward_model': 'ppo.from {workdir}/reward_model/hf',
            },
        ),
        ({'sft__init': 'policy', 'reward_model__init': 'policy'}, {}),
        ({'ppo__critic_init': 'scalar'}, {}),
    ],
)
def test_stages_whose_product_is_given(
    store: Store, fields: dict[str, str], want: dict[str, str]
) -> None:
  found = sources.given_stages(store_config(store, **fields), '/w')
  assert found == {
      stage: text.format(**dataclasses.asdict(store)).replace(' ', ' gives ')
      for stage, text in want.items()
  }


def test_the_critic_of_another_run_is_the_one_that_ppo_left(
    store: Store,
) -> None:
  config = store_config(store, ppo__critic_init='finished')
  want = Source('ppo.critic_init', f'{store.finished}/ppo/critic')
  assert sources.source(config, '/w', 'critic') == want
  # Where PPO is not done, a critic starts from the reward model as ever.
  want = Source('ppo.critic_init', f'{store.workdir}/reward_model/hf')
  found = sources.source(
      store_config(store, ppo__critic_init='workdir'), '/w', 'critic'
  )
  assert found == want


def test_the_tokenizer_is_that_of_the_first_model_named(store: Store) -> None:
  order = ['reward_model__init', 'ppo__reward_model', 'ppo__from_run']
  want = [store.scalar, store.scalar, f'{store.workdir}/sft/hf']
  given = {'reward_model__init': 'scalar'}
  found = []
  for name, entry in zip(order, ('scalar', 'scalar', 'workdir'), strict=True):
    given[name] = entry
    found.append(
        sources.named_source(store_config(store, **given), 'tokenizer').path
    )
  assert found == want
  given['sft__init'] = 'foreign'
  config = store_config(store, **given)
  assert sources.named_source(config, 'tokenizer').path == store.foreign
  config.tokenizer.path = 'elsewhere'
  want = Source('tokenizer.path', 'elsewhere')
  assert sources.named_source(config, 'tokenizer') == want
  alone = store_config(store, ppo__critic_init='scalar')
  assert sources.named_source(alone, 'tokenizer').path == store.scalar


def test_a_run_whose_ppo_is_done_stands_for_its_ppo_policy(
    store: Store,
) -> None:
  policy = f'{store.finished}/ppo/hf'
  for field, use in (
      ('sft.init', 'sft'),
      ('reward_model.init', 'reward_model'),
      ('ppo.policy_init', 'ppo'),
  ):
    name = field.replace('.', '__')
    config = store_config(store, **{name: 'finished'})
    assert sources.named_source(config, use) == Source(field, policy)
    block, name = field.split('.')
    config[block][name] = f'{store.finished}:sft'
    want = Source(field, f'{store.finished}/sft/hf')
    assert sources.named_source(config, use) == want
  # ppo.from says itself which stages it takes over.
  config = store_config(store, ppo__from_run='finished')
  want = Source('ppo.from', f'{store.finished}/sft/hf')
  assert sources.source(config, '/w', 'ppo') == want
  assert sources.base(config, '/w', 'reward_model') == want.path


def test_the_start_says_what_each_field_stands_for(store: Store) -> None:
  config = store_config(store, ppo__policy_init='finished', sft__init='policy')
  assert sources.describe(config) == [
      f'sft.init: {store.policy}',
      f'ppo.policy_init: {store.finished}/ppo/hf, stage ppo of the workdir '
      f'{store.finished}',
  ]


def test_a_home_folder_is_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('HOME', str(pathlib.Path(store.workdir).parent))
  config = tiny.config(**MODEL, ppo__from_run='~/workdir')
  source = sources.source(config, '/w', 'ppo')
  assert source == Source('ppo.from', f'{store.workdir}/sft/hf')
