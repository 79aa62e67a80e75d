"""Which rows each stage gets."""

import pathlib
import shutil

from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import manifest
from ma_rlhf_jax.data import parts
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.data.tasks import load_examples, split_parts
from tests.data.rows import BOS, DATA, EOS, assert_same, encoded_set


def _config(**fields: object) -> ConfigDict:
  config = config_lib.base()
  config.data.synthetic_rows, config.data.eval_rows = 100, 10
  for name in parts.STAGES:
    config[name].batch_size = 8
  config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope='module')
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple:
  workdir = tmp_path_factory.mktemp('run')
  data, tokenizer = parts.prepare(_config(), None, workdir)
  return data, tokenizer, workdir


def test_parts_hold_the_rows_of_the_split(prepared: tuple) -> None:
  data, tokenizer, _ = prepared
  train, held_out, _ = load_examples(_config())
  indices = split_parts(100, (2, 4, 4), 1234)
  groups = [[train[i] for i in rows] for rows in indices] + [held_out]
  for part, examples in zip(
      (data.sft, data.reward_model, data.ppo, data.eval), groups, strict=True
  ):
    assert len(part) == len(examples)
    for row, example in enumerate(examples):
      prompt = tokenizer_lib.decode(tokenizer, part.prompt[row])
      chosen = tokenizer_lib.decode(tokenizer, part.chosen[row])
      assert prompt == '<bos>' + example.prompt
      assert chosen == example.chosen + '<eos>'


def test_a_raw_row_keeps_its_part_when_another_is_dropped(
    prepared: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
  _, tokenizer, _ = prepared
  train, held_out, counts = load_examples(_config())
  lost = split_parts(100, (2, 4, 4), 1234)[0][3]
  train[lost] = None
  monkeypatch.setattr(
      parts.tasks, 'load_examples', lambda _: (train, held_out, counts)
  )
  data, _ = parts.prepare(_config(), tokenizer, tmp_path)
  kept = np.delete(np.arange(20), 3)
  assert_same(data.sft, prepared[0].sft.take(kept))
  assert_same(data.reward_model, prepared[0].reward_model)
  assert_same(data.ppo, prepared[0].ppo)


def test_the_trained_tokenizer_is_kept(prepared: tuple) -> None:
  data, tokenizer, workdir = prepared
  before = (workdir / 'tokenizer' / 'tokenizer.json').stat().st_mtime_ns
  again, same = parts.prepare(_config(), None, workdir)
  assert (workdir / 'tokenizer' / 'tokenizer.json').stat().st_mtime_ns == before
  assert tokenizer_lib.fingerprint(same) == tokenizer_lib.fingerprint(tokenizer)
  assert_same(data.ppo, again.ppo)
  path = str(workdir / 'tokenizer')
  _, named = parts.prepare(
      _config(**{'tokenizer.path': path}), None, workdir / 'other'
  )
  assert tokenizer_lib.fingerprint(named) == tokenizer_lib.fingerprint(same)
  assert not (workdir / 'other' / 'tokenizer').exists()


def test_a_tokenizer_that_a_kill_cut_is_trained_again(
    prepared: tuple, tmp_path: pathlib.Path
) -> None:
  """Its own file: there is nothing that could be downloaded again."""
  _, tokenizer, workdir = prepared
  shutil.copytree(workdir / 'tokenizer', tmp_path / 'tokenizer')
  path = tmp_path / 'tokenizer' / 'tokenizer_config.json'
  whole = path.read_bytes()
  path.write_bytes(whole[:40])
  (tmp_path / 'tokenizer' / manifest.NAME).unlink()
  _, again = parts.prepare(_config(), None, tmp_path)
  assert path.read_bytes() == whole
  assert again.get_vocab() == tokenizer.get_vocab()


def test_synthetic_rows_fit_the_default_lengths(tmp_path: pathlib.Path) -> None:
  config = _config(**{'data.synthetic_rows': 1000})
  data, tokenizer = parts.prepare(config, None, tmp_path)
  assert len(tokenizer) <= config.tokenizer.vocab_size
  prompt_len, response_len = config_lib.lengths(config)
  for part in (data.sft, data.reward_model, data.ppo):
    assert part.prompt.lengths().max() <= prompt_len
    assert part.chosen.lengths().max() <= response_len
    assert not part.chosen_truncated.any()
    assert not part.rejected_truncated.any()
  assert data.counts['ppo']['kept'] == 400


def test_cut_chosen_rows_leave_sft_only(
    prepared: tuple, tmp_path: pathlib.Path
) -> None:
  _, tokenizer, _ = prepared
  fields = {'data.max_response_len': 11, 'sft.batch_size': 2}
  config = _config(**fields, **{'data.drop_truncated': False})
  whole, _ = parts.prepare(config, tokenizer, tmp_path)
  data, _ = parts.prepare(_config(**fields), tokenizer, tmp_path)
  cut = whole.sft.chosen_truncated
  assert 0 < cut.sum() < len(cut)
  assert_same(data.sft, whole.sft.take(np.flatnonzero(~cut)))
  assert data.counts['sft']['dropped for a cut chosen'] == cut.sum()
  assert data.counts['sft']['kept'] == len(data.sft)
  assert_same(data.reward_model, whole.reward_model)
  assert data.reward_model.chosen_truncated.any()


def test_shuffled_labels_swap_half_of_the_pairs(
    prepared: tuple, tmp_path: pathlib.Path
) -> None:
  data, tokenizer, _ = prepared
  config = _config(**{'data.shuffle_labels': True})
  shuffled, _ = parts.prepare(config, tokenizer, tmp_path)
  assert_same(shuffled.sft, data.sft)
  assert_same(shuffled.eval, data.eval)
  a, b = data.reward_model, shuffled.reward_model
  assert_same(a.prompt, b.prompt)
  swapped = 0
  for row in range(len(a)):
    before = a.chosen[row].tolist(), a.rejected[row].tolist()
    after = b.chosen[row].tolist(), b.rejected[row].tolist()
    assert after in (before, before[::-1])
    swapped += after != before
  assert 10 < swapped < 30  # of 40
  assert_same(parts.shuffle_labels(a, 0), b)


def test_a_swap_takes_its_flag_along() -> None:
  seed = next(
      s for s in range(99) if np.random.default_rng(s).random(3)[1] < 0.5
  )
  shuffled = parts.shuffle_labels(DATA, seed)
  assert shuffled.chosen[1].tolist() == [11, 12, 13]
  assert shuffled.rejected[1].tolist() == [EOS]
  assert (shuffled.chosen_truncated[1], shuffled.rejected_truncated[1]) == (
      True,
      False,
  )


def test_a_part_of_no_rows_is_named(
    prepared: tuple, tmp_path: pathlib.Path
) -> None:
  _, tokenizer, _ = prepared
  config = _config(**{'data.parts': (0, 1, 0)})
  with pytest.raises(ValueError, match='sft part has no rows') as caught:
    parts.prepare(config, tokenizer, tmp_path)
  assert 'ppo part has no rows' in str(caught.value)
  assert 'data.parts=(0, 1, 0)' in str(caught.value)
  config.stages = ('reward_model',)
  parts.prepare(config, tokenizer, tmp_path)


def test_a_cache_that_cannot_be_a_folder_is_named(
    prepared: tuple, tmp_path: pathlib.Path
) -> None:
  _, tokenizer, _ = prepared
  (tmp_path / 'file').write_text('')
  config = _config(**{'data.cache_dir': str(tmp_path / 'file')})
  with pytest.raises(ValueError, match=f'data.cache_dir={tmp_path}/file '):
    parts.prepare(config, tokenizer, tmp_path)


def test_counts_are_told_in_a_line_a_part() -> None:
  text = parts.describe_counts(
      {
          'data': {'training rows': 9, 'prompts differ': 1},
          'sft': {'rows': 4, 'prompt too long': 4, 'kept': 0},
      }
  )
  assert text == (
      '        data: 9 training rows, 1 prompts differ\n'
      '         sft: 4 rows, 4 prompt too long, 0 kept'
  )


def test_columns_are_as_wide_as_the_rows_need() -> None:
  rows = lambda prompt, response: encoded_set(
      [([BOS] * prompt, [7] * response + [EOS], [EOS])]
  )
  data = parts.Datasets(rows(9, 3), rows(3, 2), rows(17, 4), rows(2, 8), {})
  config = config_lib.base()  # at most 24 and 16
  assert parts.widths(config, data) == (24, 16)  # 17 and 8 + 1, in eights
  config.data.max_prompt_len = 30
  assert parts.widths(config, data) == (30, 16)
  long = parts.Datasets(rows(99, 3), rows(3, 2), rows(17, 4), rows(2, 8), {})
  config.data.max_prompt_len = 0
  assert parts.widths(config, long) == (24, 16)


def test_stages_of_few_updates_are_told() -> None:
  config = config_lib.base()
  config.sft.batch_size, config.sft.steps = 2, 9
  config.reward_model.batch_size, config.reward_model.steps = 2, 10
  data = parts.Datasets(DATA, DATA, DATA, DATA, {})
  (line,) = parts.few_updates(config, data, ['sft', 'reward_model'])
  assert line.startswith('sft makes 9 update(s): 3 rows in batches of 2; ')
