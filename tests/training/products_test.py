"""What a field or flag that takes a model stands for."""

import importlib.util
import pathlib

import pytest

from ma_rlhf_jax import manifest
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.training import products
from ma_rlhf_jax.training.products import Source, SourceError
from tests import tiny


def _made(folder: pathlib.Path, *stages: str, **fields: str) -> str:
  """A workdir in which these stages are done."""
  workdir_lib.open_workdir(folder, tiny.config(**fields))
  for stage in stages:
    workdir_lib.mark_done(folder, stage, {'step': 1})
  return str(folder)


def test_products_lie_in_the_folder_of_their_stage() -> None:
  assert products.product('/w', 'sft') == '/w/sft/hf'
  assert products.product('/w', 'ppo') == '/w/ppo/hf'
  assert products.product('/w', 'critic') == '/w/ppo/critic'


def test_adapters_lie_beside_the_model_of_their_stage() -> None:
  assert products.adapter('/w', 'sft') == '/w/sft/adapter'
  assert products.adapter('/w', 'ppo') == '/w/ppo/adapter'
  assert products.adapter('/w', 'critic') == '/w/ppo/critic_adapter'


@pytest.mark.parametrize(
    ('done', 'role', 'suffix', 'want'),
    [
        (['sft', 'reward_model', 'ppo'], 'policy', '', 'ppo/hf'),
        (['sft', 'reward_model', 'ppo'], 'policy', ':sft', 'sft/hf'),
        (['sft', 'reward_model'], 'policy', '', 'sft/hf'),
        (['sft', 'reward_model', 'ppo'], 'reward model', '', 'reward_model/hf'),
        (['reward_model', 'ppo'], 'reward model', ':critic', 'ppo/critic'),
        (['reward_model', 'ppo'], 'critic', '', 'ppo/critic'),
        (['reward_model', 'ppo'], 'critic', ':reward_model', 'reward_model/hf'),
        (['reward_model'], 'critic', '', 'reward_model/hf'),
        (['reward_model'], 'tokenizer', '', 'reward_model/hf'),
    ],
)
def test_a_workdir_is_the_last_finished_stage_that_fits(
    tmp_path: pathlib.Path, done: list[str], role: str, suffix: str, want: str
) -> None:
  run = _made(tmp_path / 'run', *done)
  found = products.locate('f', run + suffix, role)
  assert found == Source('f', f'{run}/{want}') and found.workdir == run
  stage = want.replace('ppo/critic', 'critic').removesuffix('/hf')
  assert found.describe() == (
      f'f: {run}/{want}, stage {stage} of the workdir {run}'
  )


def test_a_run_without_a_critic_has_none_to_give(
    tmp_path: pathlib.Path,
) -> None:
  run = _made(tmp_path / 'run', 'reward_model')
  workdir_lib.mark_done(run, 'ppo', {'products': {'ppo/hf': 'x'}})
  assert products.locate('f', run, 'critic').stage == 'reward_model'
  with pytest.raises(SourceError, match='f=.*:critic is a workdir in which'):
    products.locate('f', f'{run}:critic', 'critic')


@pytest.mark.parametrize(
    'value', ['/a/folder', 'google/gemma-2b', 'gs://bucket/model', 'a/b:c/d']
)
def test_other_names_stand_for_themselves(value: str) -> None:
  if (
      value.startswith('gs://')
      and importlib.util.find_spec('tensorflow') is None
  ):
    pytest.importorskip('gcsfs')
  assert products.locate('f', value, 'policy') == Source('f', value)
  assert Source('f', value).describe() == f'f: {value}'


def test_a_folder_whose_name_ends_so_is_that_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.chdir(tmp_path)
  _made(tmp_path / 'x', 'sft', 'ppo')
  assert products.locate('f', 'x:sft', 'policy').path == 'x/sft/hf'
  (tmp_path / 'x:sft').mkdir()
  assert products.locate('f', 'x:sft', 'policy') == Source('f', 'x:sft')
  run = _made(tmp_path / 'y:sft', 'sft', 'ppo')
  assert products.locate('f', run, 'policy').path == f'{run}/ppo/hf'
  assert products.locate('f', f'{run}:sft', 'policy').path == f'{run}/sft/hf'


@pytest.mark.parametrize(
    ('suffix', 'role', 'said'),
    [
        (':reward_model', 'policy', ['no stage', 'ppo, sft']),
        (':nonsense', 'reward model', ["'nonsense'", 'reward_model, critic']),
        (':ppo', 'policy', ['ppo', 'finish it']),
    ],
)
def test_a_stage_that_does_not_serve_is_refused(
    tmp_path: pathlib.Path, suffix: str, role: str, said: list[str]
) -> None:
  run = _made(tmp_path / 'run', 'sft')
  with pytest.raises(SourceError) as caught:
    products.locate('ppo.policy_init', run + suffix, role)
  assert f'ppo.policy_init={run}{suffix}' in str(caught.value)
  assert all(part in str(caught.value) for part in said)


def test_a_stage_of_a_folder_that_is_no_run_is_refused(
    tmp_path: pathlib.Path,
) -> None:
  with pytest.raises(SourceError, match='is no workdir'):
    products.locate('f', f'{tmp_path}:sft', 'policy')


def test_a_product_that_a_run_was_given_is_named(
    tmp_path: pathlib.Path,
) -> None:
  run = _made(tmp_path / 'run', ppo__policy_init='google/gemma-2b')
  with pytest.raises(SourceError, match='ppo.policy_init=google/gemma-2b'):
    products.locate('f', run, 'policy')


def test_a_function_is_no_reward_model() -> None:
  with pytest.raises(SourceError, match='ppo.reward_model=my:score') as caught:
    products.locate('ppo.reward_model', 'my:score', 'reward model')
  assert 'function' in str(caught.value)
  assert 'sft.init' not in str(caught.value)


def test_a_field_that_takes_a_whole_run_takes_no_part_of_one(
    tmp_path: pathlib.Path,
) -> None:
  run = _made(tmp_path / 'run', 'sft', 'ppo')
  assert products.locate('ppo.from', run, 'policy', 'sft').stage == 'sft'
  for value in (f'{run}:ppo', str(tmp_path), 'google/gemma-2b'):
    with pytest.raises(SourceError, match='ppo.policy_init'):
      products.locate('ppo.from', value, 'policy', 'sft')


def test_a_product_that_was_exchanged_is_not_used(
    tmp_path: pathlib.Path,
) -> None:
  run = _made(tmp_path / 'run', 'sft')
  folder = pathlib.Path(run) / 'sft' / 'hf'
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'model.safetensors').write_text('as trained')
  made = {'sft/hf': manifest.write(folder)}
  workdir_lib.mark_done(run, 'sft', {'step': 1, 'products': made})
  assert products.locate('f', run, 'policy').stage == 'sft'
  (folder / 'model.safetensors').write_text('another one')
  manifest.write(folder)  # whole, and not what the stage has made
  with pytest.raises(manifest.DamagedError, match='sft/hf is damaged'):
    products.locate('f', run, 'policy')
  (folder / manifest.NAME).unlink()
  with pytest.raises(manifest.DamagedError, match='sft/hf is damaged'):
    products.locate('f', f'{run}:sft', 'policy')
