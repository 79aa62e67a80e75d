"""From a config to a run: whose tokenizer, how many devices, which rows."""

import dataclasses
import pathlib
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict
import pytest

from ma_rlhf_jax.data import parts
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import exporting
from ma_rlhf_jax.training import automatic
from ma_rlhf_jax.training.products import SourceError
from ma_rlhf_jax.training.start import load_run
from tests import tiny
from tests.models.drawn import draw


def _config(**fields: Any) -> ConfigDict:
  """120 synthetic rows: 24 for SFT, 48 for each of the others."""
  defaults = {
      'data__synthetic_rows': 120,
      'data__eval_rows': 5,
      'data__max_prompt_len': 90,
      'data__max_response_len': 70,
      'tokenizer__vocab_size': 340,
      **{f'{s}__batch_size': 8 for s in ('sft', 'reward_model', 'ppo')},
  }
  return tiny.config(**{**defaults, **fields})


def test_without_a_model_the_tokenizer_is_trained_and_kept(
    tmp_path: pathlib.Path,
) -> None:
  run = load_run(_config(), epath.Path(tmp_path))
  assert (tmp_path / 'tokenizer' / 'tokenizer.json').is_file()
  assert len(run.tokenizer) == 340
  data = run.data
  assert (len(data.sft), len(data.reward_model), len(data.ppo)) == (24, 48, 48)
  assert len(data.eval) == 5
  assert (run.prompt_len, run.response_len) == (90, 70)
  assert run.mesh.devices.size == jax.device_count()
  prompt = run.text(data.eval.prompt[0])
  assert prompt.startswith('My ') and prompt.endswith('TL;DR:')
  assert run.gold(prompt, '') == -1.0


def test_what_chooses_the_best_is_not_compared(tmp_path: pathlib.Path) -> None:
  workdir = epath.Path(tmp_path)
  config = _config(data__eval_rows=12)
  whole = load_run(config, workdir).data
  assert whole.comparison is whole.eval and len(whole.eval) == 12
  config.export.which = 'best'
  run = load_run(config, workdir)
  ids = lambda rows: {tuple(rows.prompt[i].tolist()) for i in range(len(rows))}
  chosen, compared = ids(run.data.eval), ids(run.data.comparison)
  assert not chosen & compared
  assert chosen | compared == ids(whole.eval)
  # The rows of the synthetic task repeat no prompt here: a quarter chooses.
  assert (len(run.data.eval), len(run.data.comparison)) == (3, 9)
  told = parts.describe_counts(run.data.counts)
  assert '3 choose the best checkpoint, 9 are left for the comparison' in told
  # Neither how many are compared nor another start moves a row.
  config.evaluate.prompts = 2
  again = load_run(config, workdir).data
  assert again.eval.digest == run.data.eval.digest
  assert again.comparison.digest == run.data.comparison.digest


def test_too_few_held_out_rows_for_a_choice_are_refused(
    tmp_path: pathlib.Path,
) -> None:
  config = _config(data__eval_rows=3, export__which='best')
  with pytest.raises(ValueError, match='3 held-out rows.*data.eval_rows'):
    load_run(config, epath.Path(tmp_path))


def test_a_named_model_brings_its_tokenizer(tmp_path: pathlib.Path) -> None:
  folder = tmp_path / 'model'
  tokenizer_lib.train_tokenizer(['My boss was late. TL;DR:'], 300, str(folder))
  want = tokenizer_lib.load_tokenizer(str(folder))
  run = load_run(_config(sft__init=str(folder)), epath.Path(tmp_path / 'run'))
  assert tokenizer_lib.fingerprint(run.tokenizer) == (
      tokenizer_lib.fingerprint(want)
  )
  assert not (tmp_path / 'run' / 'tokenizer').exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
  missing = str(tmp_path / 'nothing')
  for field in ('ppo.policy_init', 'tokenizer.path', 'ppo.critic_init'):
    config = _config(**{field.replace('.', '__'): missing})
    with pytest.raises(SourceError, match='is not a folder') as caught:
      load_run(config, epath.Path(tmp_path))
    assert str(caught.value).startswith(f'{field}={missing}: ')
    assert 'sft.init' not in str(caught.value)


@pytest.mark.parametrize(
    'field',
    [
        'sft.init',
        'reward_model.init',
        'ppo.policy_init',
        'ppo.reward_model',
        'ppo.critic_init',
    ],
)
def test_a_model_is_refused_before_a_row_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
  folder = tmp_path / 'model'
  tokenizer_lib.train_tokenizer(['My boss was late. TL;DR:'], 300, str(folder))
  (folder / 'config.json').write_text('{"model_type": "llama"}')
  monkeypatch.setattr(parts, 'prepare', lambda *_: pytest.fail('rows are read'))
  config = _config(**{field.replace('.', '__'): str(folder)})
  with pytest.raises(SourceError, match="model_type is 'llama'") as caught:
    load_run(config, epath.Path(tmp_path / 'run'), check_models=True)
  assert str(caught.value).startswith(f'{field}={folder}: ')


def automatic_fields() -> dict[str, Any]:
  """Every field that knows auto, set to it, as `base()` has it."""
  fields = automatic.FIELDS.items()
  return {name.replace('.', '__'): auto for name, (auto, _) in fields}


def test_weights_that_do_not_fit_are_refused_before_a_row_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  folder = tmp_path / 'model'
  tokenizer_lib.train_tokenizer(['My boss was late. TL;DR:'], 300, str(folder))
  shape = dataclasses.replace(tiny.SHAPE, vocab_size=304, num_layers=1)
  words = tokenizer_lib.load_tokenizer(str(folder))
  params = draw('policy', shape, 1)
  exporting.save(folder / 'hf', params, shape, 'policy', words)
  monkeypatch.setattr(parts, 'prepare', lambda *_: pytest.fail('rows are read'))
  config = _config(ppo__reward_model=str(folder / 'hf'), **automatic_fields())
  with pytest.raises(SourceError, match='does not fit a reward model'):
    load_run(config, epath.Path(tmp_path / 'run'), check_models=True)


def test_an_adapter_is_told_to_be_merged(tmp_path: pathlib.Path) -> None:
  folder = tmp_path / 'adapter'
  folder.mkdir()
  content = '{"base_model_name_or_path": "google/gemma-2b"}'
  (folder / 'adapter_config.json').write_text(content)
  for check in (False, True):
    with pytest.raises(SourceError, match='sft.init=.* is a LoRA adapter') as e:
      config = _config(sft__init=str(folder))
      load_run(config, epath.Path(tmp_path / 'run'), check_models=check)
    assert 'google/gemma-2b' in str(e.value) and 'copy' not in str(e.value)


def test_batches_shrink_to_the_rows_the_same_way_at_each_start(
    tmp_path: pathlib.Path,
) -> None:
  sizes = {f'{s}__batch_size': 32 for s in ('sft', 'reward_model', 'ppo')}
  asked = _config(**sizes)
  for _ in range(2):
    run = load_run(asked, epath.Path(tmp_path))
    # Parts of 24, 48 and 48 rows.
    assert run.config.sft.batch_size == 16
    assert run.config.reward_model.batch_size == 32
    assert run.config.ppo.batch_size == run.spec.rows == 32
  assert asked.sft.batch_size == 32


def test_a_warm_up_that_leaves_the_policy_no_step_is_refused(
    tmp_path: pathlib.Path,
) -> None:
  config = _config(ppo__steps=3, ppo__critic_warmup_updates=3)
  with pytest.raises(ValueError, match='none of the 3 steps of PPO'):
    load_run(config, epath.Path(tmp_path))


def test_the_parts_of_given_stages_may_be_empty(tmp_path: pathlib.Path) -> None:
  folder = tmp_path / 'model'
  tokenizer_lib.train_tokenizer(['My boss was late. TL;DR:'], 300, str(folder))
  given = {'ppo__policy_init': str(folder), 'ppo__reward_model': str(folder)}
  config = _config(data__parts=(0, 0, 1), **given)
  run = load_run(config, epath.Path(tmp_path / 'run'))
  assert (len(run.data.sft), len(run.data.ppo)) == (0, 120)
