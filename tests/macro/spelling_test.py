"""Tokens as characters of the text."""

from collections.abc import Sequence
import random
from typing import Any

import numpy as np
import pytest

from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.macro import spelling as lib
from ma_rlhf_jax.macro.spelling import Spelling
from tests import tiny

TEXTS = [
    'the boat and the goat are in the water\n\nthey sank, did they',
    "don't cut café — two  blanks.",
] * 20


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
  """A trained tokenizer; emoji are four byte tokens."""
  path = str(tmp_path_factory.mktemp('trained'))
  tokenizer_lib.train_tokenizer(TEXTS, 330, path)
  return tokenizer_lib.load_tokenizer(path)


def spelt(*pieces: str) -> Spelling:
  """The pieces as tokens."""
  ends = np.cumsum([len(piece) for piece in pieces], dtype=int)
  sizes = np.array([len(piece) for piece in pieces], int)
  return Spelling(''.join(pieces), ends - sizes, ends)


def _bytes(tokenizer: Any, data: bytes) -> list[int]:
  return [tokenizer.convert_tokens_to_ids(f'<0x{b:02X}>') for b in data]


def _tokens(tokenizer: Any, spelling: Spelling) -> list[tuple[int, int]]:
  return list(
      zip(spelling.begins.tolist(), spelling.ends.tolist(), strict=True)
  )


def test_offsets_are_those_of_the_tokens(tokenizer: Any) -> None:
  ids = tokenizer_lib.encode(tokenizer, 'the boat\n\nsank')
  spelling = lib.Speller(tokenizer)(ids)
  assert spelling.text == 'the boat\n\nsank'
  pieces = [tokenizer.decode([i]) for i in ids]
  places = zip(spelling.begins, spelling.ends, strict=True)
  assert [spelling.text[a:b] for a, b in places] == pieces


def test_bytes_of_one_character_share_it(tokenizer: Any) -> None:
  # é is C3 A9, 👍 is F0 9F 91 8D.
  ids = [*_bytes(tokenizer, 'aé👍'.encode()), tokenizer.eos_token_id]
  spelling = lib.Speller(tokenizer)(ids)
  assert spelling.text == 'aé👍'
  assert _tokens(tokenizer, spelling) == [
      (0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (2, 3), (3, 3)
  ]  # fmt: skip


def test_broken_utf8_has_offsets_all_the_same(tokenizer: Any) -> None:
  # A cut-off 👍, b, a lone continuation: three characters.
  ids = _bytes(tokenizer, b'\xf0\x9f\x91' + b'b' + b'\x80')
  spelling = lib.Speller(tokenizer)(ids)
  assert spelling.text == '\ufffdb\ufffd'
  assert _tokens(tokenizer, spelling) == [
      (0, 1), (0, 1), (0, 1), (1, 2), (2, 3)
  ]  # fmt: skip


def test_random_bytes_are_read_as_python_reads_them() -> None:
  draw = random.Random(3)
  for _ in range(500):
    data = bytes(
        draw.choice(b'a\x80\xbf\xc3\xe2\xf0\x9f\xff\xed') for _ in 'x' * 9
    )
    text, character = lib.character_of_byte(data)
    assert text == data.decode(errors='replace')
    # Each character begins at one byte, and none is left out.
    assert np.unique(character).tolist() == list(range(len(text)))
    assert (np.diff(character) >= 0).all()


def test_special_tokens_have_no_characters(tokenizer: Any) -> None:
  eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
  speller = lib.Speller(tokenizer)
  inside = _bytes(tokenizer, b'\xc3') + [pad] + _bytes(tokenizer, b'\xa9')
  assert speller([eos]).text == ''
  assert speller([]).begins.tolist() == []
  assert _tokens(tokenizer, speller(inside)) == [(0, 1), (1, 1), (0, 1)]


def test_letters_of_the_test_tokenizer() -> None:
  spelling = lib.Speller(tiny.Tokenizer())([3, 5, tiny.EOS])
  assert spelling.text == 'ac'
  assert spelling.begins.tolist() == [0, 1, 2]


class _Stripping(tiny.Tokenizer):
  """Leaves out the blank before the first token, as Llama's does."""

  def decode(self, ids: Sequence[int], **unused: Any) -> str:
    return ''.join(f' {i}' for i in ids)[1:]


class _Halves(tiny.Tokenizer):
  """Has tokens of half a character that are no byte tokens."""

  def decode(self, ids: Sequence[int], **unused: Any) -> str:
    return '\ufffd' * len(ids)

  def convert_ids_to_tokens(self, token_id: int) -> str:
    return 'âĢ'


@pytest.mark.parametrize('kind', [_Stripping, _Halves])
def test_a_tokenizer_that_cannot_be_spelt_is_refused(kind: type) -> None:
  with pytest.raises(ValueError, match="tokenizer 'letters'"):
    lib.Speller(kind())


def test_first_character_skips_blanks() -> None:
  spelling = spelt('a', ' \n', '  b', '', 'c ', ' ')
  assert lib.first_characters(spelling).tolist() == [0, -1, 5, -1, 6, -1]


def test_tokens_open_at_boundaries_only() -> None:
  # 0 D   2 n't within the token   6 .   7 blank   9 G   12 !
  spelling = spelt("Don't", '.', ' \n', ' Go', 'od', '!')
  first = lib.first_characters(spelling).tolist()
  assert first == [0, 5, -1, 9, 11, 13]
  starts = lib.starts(spelling, [13, 2, 6, 9])
  assert starts.tolist() == [True, False, False, True, False, True]


def test_the_first_word_after_blanks_opens_nothing_new() -> None:
  starts = lib.starts(spelt('\n', ' ', 'a', 'b'), [2, 3])
  assert starts.tolist() == [True, False, False, True]


def test_only_the_first_token_of_a_character_opens() -> None:
  spelling = Spelling('a👍', np.array([0, 1, 1, 1]), np.array([1, 2, 2, 2]))
  assert lib.starts(spelling, [1]).tolist() == [True, True, False, False]


def test_without_tokens_there_are_no_starts() -> None:
  assert lib.starts(spelt(), [0]).tolist() == []
  assert lib.starts(spelt(''), []).tolist() == [True]
