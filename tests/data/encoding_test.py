"""Token ids, truncation and the cache."""

import pathlib

import pytest

from ma_rlhf_jax.data import encoding
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.data.tasks import Example
from tests.data.rows import BOS, EOS, assert_same


def test_bos_and_eos_come_once(tokenizer: object) -> None:
  # The text '<eos>' and the tokenizer's own BOS add none.
  examples = [Example('the <eos><bos>', ' boat', ' goat')]
  data, _ = encoding.encode_examples(
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
  data, counts = encoding.encode_examples(
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
  make = lambda: encoding.load_or_encode(
      examples, tokenizer, tmp_path, **lengths
  )
  first, counts = make()
  assert_same(
      first, encoding.encode_examples(examples, tokenizer, **lengths)[0]
  )
  monkeypatch.delattr(encoding, 'encode_examples')
  second, again = make()
  assert_same(first, second)
  assert counts == again and counts['prompt too long'] == 1


def test_a_half_written_cache_is_made_again(
    tokenizer: object, tmp_path: pathlib.Path
) -> None:
  examples = [Example('the', ' boat', ' goat')]
  lengths = {'prompt_len': 5, 'response_len': 8}
  first, _ = encoding.load_or_encode(examples, tokenizer, tmp_path, **lengths)
  (stored,) = tmp_path.glob('*.npz')
  (tmp_path / f'{stored.name}.done').unlink()
  stored.write_bytes(stored.read_bytes()[:50])
  assert_same(
      first,
      encoding.load_or_encode(examples, tokenizer, tmp_path, **lengths)[0],
  )


def test_a_damaged_cache_is_made_again(
    tokenizer: object, tmp_path: pathlib.Path
) -> None:
  examples = [Example('the', ' boat', ' goat')]
  load = lambda: encoding.load_or_encode(
      examples, tokenizer, tmp_path, prompt_len=5, response_len=8
  )
  first, _ = load()
  (stored,) = tmp_path.glob('*.npz')
  for damage in (b'', stored.read_bytes()[:50], b'no archive'):
    stored.write_bytes(damage)
    assert_same(first, load()[0])


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
    encoding.load_or_encode(
        examples,
        tokenizer,
        tmp_path,
        prompt_len=lengths[0],
        response_len=lengths[1],
    )
  assert len(list(tmp_path.glob('*.npz'))) == 5
