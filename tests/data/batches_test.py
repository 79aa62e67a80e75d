"""Token ids, truncation, caching, parts, batches by hand, position in data."""

import dataclasses
import pathlib

from ml_collections import ConfigDict
import numpy as np
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.data import batches
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.data.tasks import Example, load_examples, split_parts

PAD, EOS, BOS = 0, 1, 2
TEXTS = ['the boat and the goat'] * 4


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
  path = tmp_path_factory.mktemp('tokenizer')
  tokenizer_lib.train_tokenizer(TEXTS, 300, str(path))
  return tokenizer_lib.load_tokenizer(str(path))


def _set(rows: list[tuple[list[int], list[int], list[int]]]) -> object:
  """An EncodedSet of (prompt, chosen, rejected) ids."""
  prompt, chosen, rejected = zip(*rows, strict=True)
  return batches.EncodedSet(
      prompt=batches.Ragged.of(prompt),
      chosen=batches.Ragged.of(chosen),
      rejected=batches.Ragged.of(rejected),
      chosen_truncated=np.array([row[-1] != EOS for row in chosen]),
      rejected_truncated=np.array([row[-1] != EOS for row in rejected]),
  )


DATA = _set(
    [
        ([2, 7], [8, 1], [9, 10, 1]),
        ([2], [1], [11, 12, 13]),
        ([2, 3, 4], [5, 6, 1], [14, 1]),
    ]
)


def _same(a: object, b: object) -> None:
  for x, y in zip(_arrays(a), _arrays(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def _arrays(value: object) -> list[np.ndarray]:
  if isinstance(value, np.ndarray):
    return [value]
  fields = [getattr(value, f.name) for f in dataclasses.fields(value)]
  return [array for field in fields for array in _arrays(field)]


def test_bos_and_eos_come_once(tokenizer: object) -> None:
  # The text '<eos>' and the tokenizer's own BOS add none.
  examples = [Example('the <eos><bos>', ' boat', ' goat')]
  data, _ = batches.encode_examples(
      examples, tokenizer, prompt_len=64, response_len=16
  )
  ids = tokenizer_lib.encode(tokenizer, 'the <eos><bos>')
  assert data.prompt[0].tolist() == [BOS, *ids]
  assert BOS not in ids and EOS not in ids
  boat = tokenizer_lib.encode(tokenizer, ' boat')
  assert data.chosen[0].tolist() == [*boat, EOS]


def test_limits_by_hand(tokenizer: object) -> None:
  # Characters outside the texts are one byte token each.
  examples = [
      Example('xyz', 'XY', 'Z'),  # 4 prompt tokens: fits exactly; 3 and 2
      Example('wxyz', 'X', 'Y'),  # 5: too long
      Example('x', 'XYZ', 'XY'),  # 3 + EOS: cut at 3, no EOS
      Example('y', 'XYZV', 'XYZW'),  # equal once cut
      Example('', '', 'VWXYZ'),  # an empty response is its EOS
  ]
  data, counts = batches.encode_examples(
      examples, tokenizer, prompt_len=4, response_len=3
  )
  byte = lambda text: [4 + ord(char) for char in text]
  assert [data.prompt[i].tolist() for i in range(3)] == [
      [BOS, *byte('xyz')],
      [BOS, *byte('x')],
      [BOS],
  ]
  assert data.chosen[0].tolist() == [*byte('XY'), EOS]
  assert data.rejected[0].tolist() == [*byte('Z'), EOS]
  assert data.chosen[1].tolist() == byte('XYZ')
  assert data.chosen[2].tolist() == [EOS]
  assert data.rejected[2].tolist() == byte('VWX')
  assert data.chosen_truncated.tolist() == [False, True, False]
  assert data.rejected_truncated.tolist() == [False, False, True]
  assert counts == {
      'rows': 5,
      'prompt too long': 1,
      'equal once cut': 1,
      'kept': 3,
      'chosen cut': 1,
      'rejected cut': 1,
  }


def test_a_cache_hit_gives_the_same_arrays(
    tokenizer: object,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  examples = [Example('the', ' boat', ' goat'), Example('x' * 9, 'a', 'b')]
  lengths = {'prompt_len': 5, 'response_len': 4}
  make = lambda: batches.load_or_encode(
      examples, tokenizer, tmp_path, **lengths
  )
  first, counts = make()
  _same(first, batches.encode_examples(examples, tokenizer, **lengths)[0])
  monkeypatch.delattr(batches, 'encode_examples')
  second, again = make()
  _same(first, second)
  assert counts == again and counts['prompt too long'] == 1


def test_a_half_written_cache_is_made_again(
    tokenizer: object, tmp_path: pathlib.Path
) -> None:
  examples = [Example('the', ' boat', ' goat')]
  lengths = {'prompt_len': 5, 'response_len': 8}
  first, _ = batches.load_or_encode(examples, tokenizer, tmp_path, **lengths)
  (stored,) = tmp_path.glob('*.npz')
  (tmp_path / f'{stored.name}.done').unlink()
  stored.write_bytes(stored.read_bytes()[:50])
  _same(
      first,
      batches.load_or_encode(examples, tokenizer, tmp_path, **lengths)[0],
  )


def test_the_cache_key_covers_texts_and_lengths(
    tokenizer: object, tmp_path: pathlib.Path
) -> None:
  a, b = Example('the', ' boat', ' goat'), Example('th', 'e boat', ' goat')
  for examples, lengths in [
      ([a], (5, 8)),
      ([b], (5, 8)),
      ([a, a], (5, 8)),
      ([a], (6, 8)),
      ([a], (5, 9)),
  ]:
    batches.load_or_encode(
        examples,
        tokenizer,
        tmp_path,
        prompt_len=lengths[0],
        response_len=lengths[1],
    )
  assert len(list(tmp_path.glob('*.npz'))) == 5


def _config(**fields: object) -> ConfigDict:
  config = config_lib.base()
  config.data.synthetic_rows, config.data.eval_rows = 100, 10
  for name in batches.STAGES:
    config[name].batch_size = 8
  config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope='module')
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple:
  workdir = tmp_path_factory.mktemp('run')
  data, tokenizer = batches.prepare(_config(), None, workdir)
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
      batches.tasks, 'load_examples', lambda _: (train, held_out, counts)
  )
  data, _ = batches.prepare(_config(), tokenizer, tmp_path)
  kept = np.delete(np.arange(20), 3)
  _same(data.sft, prepared[0].sft.take(kept))
  _same(data.reward_model, prepared[0].reward_model)
  _same(data.ppo, prepared[0].ppo)


def test_the_trained_tokenizer_is_kept(prepared: tuple) -> None:
  data, tokenizer, workdir = prepared
  before = (workdir / 'tokenizer' / 'tokenizer.json').stat().st_mtime_ns
  again, same = batches.prepare(_config(), None, workdir)
  assert (workdir / 'tokenizer' / 'tokenizer.json').stat().st_mtime_ns == before
  assert tokenizer_lib.fingerprint(same) == tokenizer_lib.fingerprint(tokenizer)
  _same(data.ppo, again.ppo)
  path = str(workdir / 'tokenizer')
  _, named = batches.prepare(
      _config(**{'tokenizer.path': path}), None, workdir / 'other'
  )
  assert tokenizer_lib.fingerprint(named) == tokenizer_lib.fingerprint(same)
  assert not (workdir / 'other' / 'tokenizer').exists()


def test_synthetic_rows_fit_the_default_lengths(tmp_path: pathlib.Path) -> None:
  config = _config(**{'data.synthetic_rows': 1000})
  data, tokenizer = batches.prepare(config, None, tmp_path)
  assert len(tokenizer) <= 512
  for part in (data.sft, data.reward_model, data.ppo):
    assert part.prompt.lengths().max() <= 48
    assert part.chosen.lengths().max() <= 24
    assert not part.chosen_truncated.any()
    assert not part.rejected_truncated.any()
  assert data.counts['ppo']['kept'] == 400


def test_cut_chosen_rows_leave_sft_only(
    prepared: tuple, tmp_path: pathlib.Path
) -> None:
  _, tokenizer, _ = prepared
  fields = {'data.max_response_len': 11, 'sft.batch_size': 2}
  config = _config(**fields, **{'data.drop_truncated': False})
  whole, _ = batches.prepare(config, tokenizer, tmp_path)
  data, _ = batches.prepare(_config(**fields), tokenizer, tmp_path)
  cut = whole.sft.chosen_truncated
  assert 0 < cut.sum() < len(cut)
  _same(data.sft, whole.sft.take(np.flatnonzero(~cut)))
  assert data.counts['sft']['dropped for a cut chosen'] == cut.sum()
  assert data.counts['sft']['kept'] == len(data.sft)
  _same(data.reward_model, whole.reward_model)
  assert data.reward_model.chosen_truncated.any()


def test_shuffled_labels_swap_half_of_the_pairs(
    prepared: tuple, tmp_path: pathlib.Path
) -> None:
  data, tokenizer, _ = prepared
  config = _config(**{'data.shuffle_labels': True})
  shuffled, _ = batches.prepare(config, tokenizer, tmp_path)
  _same(shuffled.sft, data.sft)
  _same(shuffled.eval, data.eval)
  a, b = data.reward_model, shuffled.reward_model
  _same(a.prompt, b.prompt)
  swapped = 0
  for row in range(len(a)):
    before = a.chosen[row].tolist(), a.rejected[row].tolist()
    after = b.chosen[row].tolist(), b.rejected[row].tolist()
    assert after in (before, before[::-1])
    swapped += after != before
  assert 10 < swapped < 30  # of 40
  _same(batches.shuffle_labels(a, 0), b)


def test_a_swap_takes_its_flag_along() -> None:
  seed = next(
      s for s in range(99) if np.random.default_rng(s).random(3)[1] < 0.5
  )
  shuffled = batches.shuffle_labels(DATA, seed)
  assert shuffled.chosen[1].tolist() == [11, 12, 13]
  assert shuffled.rejected[1].tolist() == [EOS]
  assert (shuffled.chosen_truncated[1], shuffled.rejected_truncated[1]) == (
      True,
      False,
  )


def test_a_part_smaller_than_its_batch_is_named(
    prepared: tuple, tmp_path: pathlib.Path
) -> None:
  _, tokenizer, _ = prepared
  config = _config(**{'sft.batch_size': 21, 'ppo.batch_size': 64})
  with pytest.raises(ValueError, match='sft part has 20 rows') as caught:
    batches.prepare(config, tokenizer, tmp_path)
  assert 'ppo part has 40 rows, fewer than ppo.batch_size=64' in str(
      caught.value
  )
  config.stages = ('reward_model',)
  batches.prepare(config, tokenizer, tmp_path)


def test_counts_are_told_in_a_line_a_part() -> None:
  text = batches.describe_counts(
      {
          'data': {'training rows': 9, 'prompts differ': 1},
          'sft': {'rows': 4, 'prompt too long': 4, 'kept': 0},
      }
  )
  assert text == (
      '        data: 9 training rows, 1 prompts differ\n'
      '         sft: 4 rows, 4 prompt too long, 0 kept'
  )


def test_prompt_batch_by_hand() -> None:
  batch = batches.prompt_batch(
      DATA, [2, 0], prompt_len=4, pad_id=99, sample_ids=[3, 5]
  )
  assert batch.tokens_BP.tolist() == [[99, 2, 3, 4], [99, 99, 2, 7]]
  assert batch.mask_BP.tolist() == [
      [False, True, True, True],
      [False, False, True, True],
  ]
  assert batch.prompt_ids_B.tolist() == [2, 0]
  assert batch.sample_ids_B.tolist() == [3, 5]
  for array in (batch.tokens_BP, batch.prompt_ids_B, batch.sample_ids_B):
    assert array.dtype == np.int32
  plain = batches.prompt_batch(DATA, [2], prompt_len=3, pad_id=0)
  assert plain.sample_ids_B.tolist() == [0]


def test_sft_batch_by_hand() -> None:
  batch = batches.sft_batch(
      DATA, [0, 1], prompt_len=3, response_len=4, pad_id=PAD
  )
  assert batch.tokens_BL.tolist() == [
      [0, 2, 7, 8, 1, 0, 0],
      [0, 0, 2, 1, 0, 0, 0],
  ]
  assert batch.mask_BL.astype(int).tolist() == [
      [0, 1, 1, 1, 1, 0, 0],
      [0, 0, 1, 1, 0, 0, 0],
  ]
  assert batch.response_mask_BT.astype(int).tolist() == [
      [1, 1, 0, 0],
      [1, 0, 0, 0],
  ]
  assert batch.tokens_BL.dtype == np.int32
  assert batch.mask_BL.dtype == batch.response_mask_BT.dtype == bool


def test_pair_batch_by_hand() -> None:
  shape = {'prompt_len': 3, 'response_len': 3, 'pad_id': PAD}
  batch = batches.pair_batch(DATA, [2, 1], **shape)
  _same(batch.chosen, batches.sft_batch(DATA, [2, 1], **shape))
  assert batch.rejected.tokens_BL.tolist() == [
      [2, 3, 4, 14, 1, 0],
      [0, 0, 2, 11, 12, 13],
  ]
  assert batch.rejected.response_mask_BT.astype(int).tolist() == [
      [1, 1, 0],
      [1, 1, 1],
  ]


@pytest.mark.parametrize('prompt_len, response_len', [(2, 4), (3, 2)])
def test_rows_that_do_not_fit_are_refused(
    prompt_len: int, response_len: int
) -> None:
  with pytest.raises(ValueError, match=r'row 2 has 3 tokens; 2 are allowed'):
    batches.sft_batch(
        DATA,
        [2],
        prompt_len=prompt_len,
        response_len=response_len,
        pad_id=PAD,
    )


@pytest.mark.parametrize('size, batch_size', [(12, 4), (10, 4), (3, 7), (1, 2)])
def test_every_row_comes_once_an_epoch(size: int, batch_size: int) -> None:
  stream = np.concatenate(
      [
          batches.rows_of_step(5, step, size=size, batch_size=batch_size)
          for step in range(6 * size)
      ]
  )
  assert len(stream) == 6 * size * batch_size
  for epoch in range(6 * batch_size):
    rows = stream[epoch * size : (epoch + 1) * size]
    assert sorted(rows.tolist()) == list(range(size))


def test_the_order_follows_seed_and_epoch() -> None:
  step = lambda seed, i: batches.rows_of_step(
      seed, i, size=50, batch_size=50
  ).tolist()
  assert step(1, 0) == step(1, 0)
  assert step(1, 0) != step(2, 0)
  assert step(1, 0) != step(1, 1)
