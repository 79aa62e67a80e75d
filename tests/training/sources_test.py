"""Which model each stage starts from, and which are refused."""

import dataclasses
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax import manifest
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import exporting, heads, lora, presets
from ma_rlhf_jax.training import model_configs, sources
from ma_rlhf_jax.training.run import Run
from ma_rlhf_jax.training.sources import Source, SourceError
from tests import tiny
from tests.hashing import params_sha256
from tests.models.drawn import draw

SHAPE = dataclasses.replace(tiny.SHAPE, vocab_size=310, num_layers=1)
_MODEL = {
    f'model__{name}': getattr(SHAPE, name)
    for name in presets.SHAPE_FIELDS
    if name != 'sliding_layers'  # follows from the window
}


@dataclasses.dataclass(frozen=True)
class _Store:
  """Models on disk.

  Attributes:
    policy: a Hugging Face folder.
    scalar: a Hugging Face folder of a reward model.
    foreign: a policy with another tokenizer.
    workdir: a run whose SFT and reward model are done, and nothing more.
    finished: a run whose PPO is done too.
    tokenizer: of all but `foreign`.
    larger: a tokenizer of more entries.
  """

  policy: str
  scalar: str
  foreign: str
  workdir: str
  finished: str
  tokenizer: Any
  larger: Any


def _tokenizer(folder: pathlib.Path, text: str, size: int) -> Any:
  tokenizer_lib.train_tokenizer([text] * 4, size, str(folder))
  return tokenizer_lib.load_tokenizer(str(folder))


@pytest.fixture(scope='module')
def store(tmp_path_factory: pytest.TempPathFactory) -> _Store:
  root = tmp_path_factory.mktemp('store')
  tokenizer = _tokenizer(root / 'ours', 'the boat and the goat', 300)
  other = _tokenizer(root / 'theirs', 'a quick brown fox', 300)
  text = 'the quick brown fox jumps over the lazy dogs and back to the goat 123'
  larger = _tokenizer(root / 'larger', text, 340)
  assert len(larger) > SHAPE.vocab_size >= max(len(tokenizer), len(other))

  def save(path: str, kind: str, seed: int, words: Any = tokenizer) -> str:
    exporting.save(root / path, draw(kind, SHAPE, seed), SHAPE, kind, words)
    return str(root / path)

  for name in ('workdir', 'finished'):
    workdir_lib.open_workdir(root / name, tiny.config())
    save(f'{name}/sft/hf', 'policy', 1)
    save(f'{name}/reward_model/hf', 'scalar', 2)
    for stage in ('sft', 'reward_model'):
      workdir_lib.mark_done(root / name, stage, {'step': 1})
  workdir_lib.mark_done(root / 'finished', 'ppo', {'step': 1})
  return _Store(
      policy=save('policy', 'policy', 3),
      scalar=save('scalar', 'scalar', 4),
      foreign=save('foreign', 'policy', 5, other),
      workdir=str(root / 'workdir'),
      finished=str(root / 'finished'),
      tokenizer=tokenizer,
      larger=larger,
  )


def _config(store: _Store, **fields: str) -> ConfigDict:
  """A config in which each field names an entry of the store."""
  named = {name: getattr(store, entry) for name, entry in fields.items()}
  return tiny.config(**_MODEL, **named)


def _run(store: _Store, tmp_path: pathlib.Path, **fields: str) -> Run:
  made = _config(store, **fields)
  return tiny.run(tmp_path, made, tokenizer=store.tokenizer)


def _sha256(kind: str, seed: int) -> str:
  return params_sha256(draw(kind, SHAPE, seed))


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
    store: _Store, fields: dict[str, str], want: list[str]
) -> None:
  config = _config(store, **fields)
  found = [
      sources.base(config, '/w', stage)
      for stage in ('sft', 'reward_model', 'ppo', 'critic')
  ]
  assert found == [x.format(**dataclasses.asdict(store)) for x in want]


def test_what_a_stage_starts_from_is_a_whole_path_or_a_hub_id(
    store: _Store, monkeypatch: pytest.MonkeyPatch
) -> None:
  folder = pathlib.Path(store.policy)
  monkeypatch.chdir(folder.parent)
  config = tiny.config(sft__init=f'./{folder.name}')
  assert sources.base(config, '/w', 'sft') == store.policy
  config = tiny.config(sft__init='google/gemma-2b')
  assert sources.base(config, '/w', 'sft') == 'google/gemma-2b'


def test_nothing_given_means_the_products_of_this_run(store: _Store) -> None:
  config = _config(store)
  assert sources.policy_source(config, '/w') == Source('', '/w/sft/hf')
  reward_model = Source('', '/w/reward_model/hf')
  assert sources.reward_model_source(config, '/w') == reward_model
  assert sources.critic_source(config, '/w') == reward_model
  assert sources.given_stages(config, '/w') == {}
  assert sources.tokenizer_source(config) is None


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
    store: _Store, fields: dict[str, str], want: dict[str, str]
) -> None:
  found = sources.given_stages(_config(store, **fields), '/w')
  assert found == {
      stage: text.format(**dataclasses.asdict(store)).replace(' ', ' gives ')
      for stage, text in want.items()
  }


def test_the_critic_of_another_run_is_the_one_that_ppo_left(
    store: _Store,
) -> None:
  config = _config(store, ppo__critic_init='finished')
  want = Source('ppo.critic_init', f'{store.finished}/ppo/critic')
  assert sources.critic_source(config, '/w') == want
  # Where PPO is not done, a critic starts from the reward model as ever.
  want = Source('ppo.critic_init', f'{store.workdir}/reward_model/hf')
  found = sources.critic_source(
      _config(store, ppo__critic_init='workdir'), '/w'
  )
  assert found == want


@pytest.mark.parametrize(
    'field', ['sft.init', 'ppo.policy_init', 'ppo.from', 'ppo.reward_model']
)
def test_a_workdir_whose_stage_is_not_done_is_refused(
    store: _Store, tmp_path: pathlib.Path, field: str
) -> None:
  workdir_lib.open_workdir(tmp_path / 'new', tiny.config())
  name = field.replace('from', 'from_run').replace('.', '__')
  run = tiny.run(
      tmp_path,
      tiny.config(**{**_MODEL, name: str(tmp_path / 'new')}),
      tokenizer=store.tokenizer,
  )
  with pytest.raises(SourceError) as caught:
    sources.given_stages(run.config, tmp_path)
    sources.initial_policy(run)
  message = str(caught.value)
  assert message.startswith(f'{field}={tmp_path}/new is a workdir in which')
  assert 'is done' in message and 'finish it' in message


def test_the_tokenizer_is_that_of_the_first_model_named(store: _Store) -> None:
  order = ['reward_model__init', 'ppo__reward_model', 'ppo__from_run']
  want = [store.scalar, store.scalar, f'{store.workdir}/sft/hf']
  given = {'reward_model__init': 'scalar'}
  found = []
  for name, entry in zip(order, ('scalar', 'scalar', 'workdir'), strict=True):
    given[name] = entry
    found.append(sources.tokenizer_source(_config(store, **given)).path)
  assert found == want
  given['sft__init'] = 'foreign'
  config = _config(store, **given)
  assert sources.tokenizer_source(config).path == store.foreign
  config.tokenizer.path = 'elsewhere'
  want = Source('tokenizer.path', 'elsewhere')
  assert sources.tokenizer_source(config) == want
  alone = _config(store, ppo__critic_init='scalar')
  assert sources.tokenizer_source(alone).path == store.scalar


def test_a_run_whose_ppo_is_done_stands_for_its_ppo_policy(
    store: _Store,
) -> None:
  policy = f'{store.finished}/ppo/hf'
  for field, use in (
      ('sft.init', 'sft'),
      ('reward_model.init', 'reward_model'),
      ('ppo.policy_init', 'ppo'),
  ):
    name = field.replace('.', '__')
    config = _config(store, **{name: 'finished'})
    assert sources.named_source(config, use) == Source(field, policy)
    block, name = field.split('.')
    config[block][name] = f'{store.finished}:sft'
    want = Source(field, f'{store.finished}/sft/hf')
    assert sources.named_source(config, use) == want
  # ppo.from says itself which stages it takes over.
  config = _config(store, ppo__from_run='finished')
  want = Source('ppo.from', f'{store.finished}/sft/hf')
  assert sources.policy_source(config, '/w') == want
  assert sources.base(config, '/w', 'reward_model') == want.path


def test_the_start_says_what_each_field_stands_for(store: _Store) -> None:
  config = _config(store, ppo__policy_init='finished', sft__init='policy')
  assert sources.describe(config) == [
      f'sft.init: {store.policy}',
      f'ppo.policy_init: {store.finished}/ppo/hf, stage ppo of the workdir '
      f'{store.finished}',
  ]


def test_sft_starts_from_a_folder_or_another_run(
    store: _Store, tmp_path: pathlib.Path
) -> None:
  shape, params = sources.initial_policy(
      _run(store, tmp_path, sft__init='policy')
  )
  want = model_configs.trained_whole(SHAPE, tiny.config().model)
  assert shape == want
  assert params_sha256(params) == _sha256('policy', 3)
  _, of_run = sources.initial_policy(_run(store, tmp_path, sft__init='workdir'))
  assert params_sha256(of_run) == _sha256('policy', 1)


def test_random_weights_have_the_rows_of_the_tokenizer_and_a_seed(
    store: _Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(
      heads, 'init_params', lambda kind, shape, key: (kind, shape, key)
  )
  run = _run(store, tmp_path)
  shape, (kind, same, key) = sources.initial_policy(run)
  want = model_configs.trained_whole(SHAPE, run.config.model)
  assert shape == same == want and kind == 'policy'
  run.config.model.vocab_size = 0
  run.config.seed = 1
  shape, (_, _, other) = sources.initial_policy(run)
  assert shape.vocab_size == len(store.tokenizer) < 310
  data = [jax.random.key_data(k).tolist() for k in (key, other)]
  assert data[0] != data[1]


@pytest.mark.parametrize(
    'fields, seed',
    [
        ({'reward_model__init': 'policy'}, 3),
        ({'reward_model__init': 'workdir'}, 1),
        ({'ppo__policy_init': 'policy'}, 3),
    ],
)
def test_a_reward_model_starts_from_a_policy_with_a_new_head(
    store: _Store, tmp_path: pathlib.Path, fields: dict[str, str], seed: int
) -> None:
  run = _run(store, tmp_path, **fields)
  _, params = sources.initial_reward_model(run)
  assert params_sha256(params['backbone']) == _sha256('policy', seed)
  assert params['head'].shape == (16,)
  assert 0.05 < float(np.std(params['head'])) < 0.6  # about 1 / sqrt(17)


def test_a_model_is_read_in_the_dtype_of_the_run(
    store: _Store, tmp_path: pathlib.Path
) -> None:
  run = _run(store, tmp_path)
  run.config.model.dtype = 'bfloat16'
  source = Source('ppo.reward_model', store.scalar)
  # What does not learn is held as it is computed with, but for norms and head.
  shape, params = sources.load(run, source, 'scalar')
  assert (shape.param_dtype, shape.kernel_dtype) == ('float32', 'bfloat16')
  for path, x in lora.flatten(params).items():
    small = path == 'head' or path.endswith('scale')
    assert x.dtype == ('float32' if small else 'bfloat16'), path
  # What learns keeps its bits.
  _, params = sources.load_to_train(run, source, 'scalar', 'critic')
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'float32'}


@pytest.mark.slow
def test_adapters_share_the_weights_of_the_model_they_start_from(
    store: _Store, tmp_path: pathlib.Path
) -> None:
  run = _run(store, tmp_path)
  run.config.lora.rank = 2
  source = Source('ppo.reward_model', store.scalar)
  frozen = sources.load(run, source, 'scalar')
  shape, params = sources.load_to_train(run, source, 'scalar', 'critic', frozen)
  assert shape.lora.rank == 2
  base, learning = map(lora.flatten, lora.split(shape, params))
  before = lora.flatten(frozen[1])
  assert all(x is before[path] for path, x in base.items())
  assert learning['head'] is not before['head']
  policy = sources.load_to_train(
      run, Source('sft.init', store.policy), 'policy', 'sft'
  )
  ours = lora.flatten(policy[1])['layers/mlp/up_lora_a']
  theirs = learning['backbone/layers/mlp/up_lora_a']
  assert not np.array_equal(ours, theirs)  # each with keys of its own
  # Random weights are no base to keep: all of them learn.
  assert sources.initial_policy(run)[0].lora is None


def test_another_tokenizer_is_refused(
    store: _Store, tmp_path: pathlib.Path
) -> None:
  run = _run(store, tmp_path)
  with pytest.raises(SourceError) as caught:
    sources.load(run, Source('ppo.policy_init', store.foreign), 'policy')
  message = str(caught.value)
  assert message.startswith('ppo.policy_init: the tokenizer in')
  assert store.foreign in message and 'tokenizer.path' in message


def test_an_embedding_too_small_for_the_tokenizer_is_refused(
    store: _Store, tmp_path: pathlib.Path
) -> None:
  folder = tmp_path / 'bare'
  params = draw('policy', SHAPE, 0)
  exporting.save(folder, params, SHAPE, 'policy', store.tokenizer)
  for name in ('tokenizer_config.json', manifest.NAME):
    (folder / name).unlink()
  run = tiny.run(tmp_path, _config(store), tokenizer=store.larger)
  with pytest.raises(SourceError) as caught:
    sources.load(run, Source('ppo.policy_init', str(folder)), 'policy')
  need = f'310 rows, fewer than the {len(store.larger)} entries'
  assert need in str(caught.value)


def test_rows_without_an_entry_of_the_tokenizer_are_noted_once(
    store: _Store, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
  run = _run(store, tmp_path, sft__init='policy', ppo__reward_model='scalar')
  sources._note.cache_clear()  # other tests inspect these models too
  sources.check(run)
  sources.initial_policy(run)
  lines = capsys.readouterr().out.splitlines()
  rows = f'has 310 rows for the {len(store.tokenizer)} entries of the tokenizer'
  assert len(store.tokenizer) < 310
  assert [line.partition(':')[0] for line in lines] == ['note'] * 2
  assert f'sft.init {store.policy}: the embedding {rows}' in lines[0]
  assert f'ppo.reward_model {store.scalar}: the embedding {rows}' in lines[1]
  same = dataclasses.replace(run, tokenizer=range(310))
  source = Source('sft.init', store.policy)
  sources._check_fit(same, source, SHAPE, 'policy')
  assert not capsys.readouterr().out


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'ppo__reward_model': 'policy'}, 'score.weight is missing'),
        ({'ppo__policy_init': 'foreign'}, 'differs from the one of this run'),
    ],
)
def test_what_cannot_be_loaded_later_is_refused_at_the_start(
    store: _Store, tmp_path: pathlib.Path, fields: dict, message: str
) -> None:
  (field,) = fields
  with pytest.raises(SourceError, match=message) as error:
    sources.check(_run(store, tmp_path, **fields))
  assert field.replace('__', '.') in str(error.value)


def test_a_new_model_must_hold_the_tokenizer_and_suit_the_mesh(
    store: _Store, tmp_path: pathlib.Path
) -> None:
  sources.check(_run(store, tmp_path))
  config = _config(store)
  config.model.vocab_size = 10
  run = tiny.run(tmp_path, config, tokenizer=store.tokenizer)
  with pytest.raises(SourceError, match='the embedding has 10 rows'):
    sources.check(run)
  uneven = _run(store, tmp_path)
  uneven = dataclasses.replace(uneven, mesh=tiny.mesh(1, 1, 8))
  with pytest.raises(SourceError, match="'tensor': 8} does not split evenly"):
    sources.check(uneven)


def test_a_home_folder_is_found(
    store: _Store, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('HOME', str(pathlib.Path(store.workdir).parent))
  config = tiny.config(**_MODEL, ppo__from_run='~/workdir')
  source = sources.policy_source(config, '/w')
  assert source == Source('ppo.from', f'{store.workdir}/sft/hf')


def test_a_run_of_another_shape_is_not_reused(
    store: _Store, tmp_path: pathlib.Path
) -> None:
  run = _run(store, tmp_path, ppo__from_run='workdir')
  source = sources.policy_source(run.config, tmp_path)
  _, params = sources.load(run, source, 'policy')
  assert params_sha256(params) == _sha256('policy', 1)
  run.config.model.mlp_dim = 40
  run.config.model.rope_theta = 500.0
  with pytest.raises(SourceError) as caught:
    sources.load(run, source, 'policy')
  message = str(caught.value)
  assert message.startswith(f'ppo.from={store.workdir} has a model of another')
  assert 'mlp_dim: 22 there, 40 here' in message
  assert 'rope_theta: 10000.0 there, 500.0 here' in message
  assert 'head_dim' not in message
