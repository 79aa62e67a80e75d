"""Round trip, BOS exactly never, special strings stay text."""

from collections.abc import Callable
import json
import pathlib
import random
import shutil

import pytest
import tokenizers

from ma_rlhf_jax import manifest
from ma_rlhf_jax.data import tokenizer as lib

TEXTS = [
    'the boat and the goat are in the water\nTL;DR: the boat <eos> sank',
    'a goat, a boat; naïve café — two  blanks and a tab\t.',
] * 20
HARD = [
    '',
    ' ',
    '   ',
    ' leading',
    'trailing ',
    'two  three   four    blanks',
    '\n',
    '\n\n a\n',
    'line\r\nend\r',
    'tab\tand\x00nul\x7f',
    '\u2581under\u2581 \u2581',
    'Ġbyte Ċ level',
    'thumb 👍🏽 family 👨‍👩‍👧',
    'e\u0301 \u0301alone',
    '\ufeffbom \ufffd replaced \u200b zero',
    '<eos>',
    'a<bos>b <pad> <unk> <eos><eos>',
    '<0x41> <0x0A> <<0x00>>',
    '<start_of_turn>user\n<end_of_turn>',
    "don't , stop . now ! it 's n't",
    'x' * 300,
    '𝔘𝔫𝔦 \U0010ffff',
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('trained')
  lib.train_tokenizer(TEXTS, 330, str(path))
  return path


def _variant(
    folder: pathlib.Path, name: str, template: str = '$A', **settings: object
) -> str:
  """A copy of the tokenizer that adds what `template` says."""
  copy = folder.parent / name
  copy.mkdir(exist_ok=True)
  backend = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=template, special_tokens=[('<bos>', 2), ('<eos>', 1)]
  )
  backend.save(str(copy / 'tokenizer.json'))
  stored = json.loads((folder / 'tokenizer_config.json').read_text())
  (copy / 'tokenizer_config.json').write_text(json.dumps(stored | settings))
  return str(copy)


TEMPLATES = {
    'bos': '<bos> $A',
    'nothing': '$A',
    'bos and eos': '<bos> $A <eos>',
}


@pytest.fixture(scope='module', params=TEMPLATES)
def tokenizer(request: pytest.FixtureRequest, folder: pathlib.Path) -> object:
  """The same vocabulary, told to add BOS, nothing, or BOS and EOS."""
  template = TEMPLATES[request.param]
  return lib.load_tokenizer(_variant(folder, request.param, template))


def test_the_kinds_of_tokenizer_differ(folder: pathlib.Path) -> None:
  ids = {
      name: lib.load_tokenizer(_variant(folder, name, template))('a').input_ids
      for name, template in TEMPLATES.items()
  }
  assert ids['bos'] == [2, *ids['nothing']]
  assert ids['bos and eos'] == [2, *ids['nothing'], 1]
  own = lib.load_tokenizer(str(folder))
  assert own('a').input_ids == ids['bos']  # as Gemma's does
  assert lib.encode(own, 'a') == ids['nothing']


@pytest.mark.parametrize('text', HARD, ids=range(len(HARD)))
def test_hard_texts_come_back(tokenizer: object, text: str) -> None:
  ids = lib.encode(tokenizer, text)
  assert lib.decode(tokenizer, ids) == text
  assert not {0, 1, 2, 3} & set(ids)


def test_random_texts_come_back(tokenizer: object) -> None:
  rng = random.Random(0)
  ranges = [
      (0, 127),
      (0, 0x2FF),
      (0x2500, 0x2600),
      (0, 0xD7FF),
      (0xE000, 0x10FFFF),
  ]
  texts = [
      ''.join(
          rng.choice([chr(rng.randint(*rng.choice(ranges))), *' <>\n', 'boat'])
          for _ in range(rng.randint(0, 30))
      )
      for _ in range(300)
  ]
  for text, ids in zip(texts, lib.encode_batch(tokenizer, texts), strict=True):
    assert lib.decode(tokenizer, ids) == text
    assert not {0, 1, 2, 3} & set(ids)


def test_special_ids_and_bytes_are_where_gemma_has_them(
    folder: pathlib.Path,
) -> None:
  tokenizer = lib.load_tokenizer(str(folder))
  names = ['<pad>', '<eos>', '<bos>', '<unk>', '<0x00>', '<0xFF>']
  assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4, 259]
  assert tokenizer.eos_token_id == 1
  assert lib.decode(tokenizer, [2, 4 + 0x41, 1]) == '<bos>A<eos>'
  assert len(tokenizer) == 330
  assert lib.encode(tokenizer, 'é') != [4 + 0xC3, 4 + 0xA9]  # learned
  assert lib.encode(tokenizer, 'Ω') == [4 + 0xCE, 4 + 0xA9]  # in bytes


def test_frequent_words_become_one_piece(folder: pathlib.Path) -> None:
  tokenizer = lib.load_tokenizer(str(folder))
  assert len(lib.encode(tokenizer, ' the boat')) == 2


def test_the_exported_folder_loads_beside_a_gemma_config(
    folder: pathlib.Path,
) -> None:
  copy = pathlib.Path(_variant(folder, 'gemma', '<bos> $A'))
  (copy / 'config.json').write_text(json.dumps({'model_type': 'gemma'}))
  tokenizer = lib.load_tokenizer(str(copy))
  text = 'two  blanks , and <eos>'
  assert lib.decode(tokenizer, lib.encode(tokenizer, text)) == text
  assert tokenizer('a')['input_ids'][0] == 2


def test_training_is_deterministic(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  assert not lib.is_whole(str(tmp_path))
  lib.train_tokenizer(iter(TEXTS), 330, str(tmp_path))
  assert lib.is_whole(str(tmp_path))
  for file in ('tokenizer.json', 'tokenizer_config.json'):
    assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


_SETTINGS, _TABLE = 'tokenizer_config.json', 'tokenizer.json'


def _is_whole(folder: pathlib.Path) -> bool:
  """Also False where damage is told."""
  try:
    return lib.is_whole(str(folder))
  except manifest.DamagedError as error:
    assert 'damaged' in str(error) and 'made again' in str(error)
    return False


@pytest.mark.parametrize('old', [False, True], ids=['', 'of an old version'])
@pytest.mark.parametrize('name', [_SETTINGS, _TABLE])
@pytest.mark.parametrize('damage', [lambda b: b[: len(b) // 2], None])
def test_a_damaged_folder_is_not_whole(
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    damage: Callable[[bytes], bytes] | None,
    name: str,
    old: bool,
) -> None:
  shutil.copytree(folder, tmp_path / 'copy')
  copy = tmp_path / 'copy'
  if old:  # it had no digests, so only what is no JSON is seen
    (copy / manifest.NAME).unlink()
  assert _is_whole(copy)
  if damage is None:
    (copy / name).unlink()
  else:
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
  assert not _is_whole(copy)


@pytest.mark.parametrize('name', [_SETTINGS, _TABLE, manifest.NAME])
def test_a_flipped_bit_is_seen(
    folder: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
  shutil.copytree(folder, tmp_path / 'copy')
  content = bytearray((folder / name).read_bytes())
  content[content.index(b'e')] ^= 1  # in a name, so that it is still JSON
  (tmp_path / 'copy' / name).write_bytes(content)
  assert not _is_whole(tmp_path / 'copy')


def test_special_strings_are_never_learned(tmp_path: pathlib.Path) -> None:
  lib.train_tokenizer(['<eos> <0x41> <bos>'] * 50, 400, str(tmp_path))
  tokenizer = lib.load_tokenizer(str(tmp_path))
  for text in ('<eos>', ' <0x41>', 'a <bos> <eos><0x41>'):
    ids = lib.encode(tokenizer, text)
    assert not {1, 2, 4 + 0x41} & set(ids)
    assert lib.decode(tokenizer, ids) == text


def test_few_texts_give_a_smaller_vocabulary(tmp_path: pathlib.Path) -> None:
  lib.train_tokenizer(['ab ab'], 400, str(tmp_path))
  tokenizer = lib.load_tokenizer(str(tmp_path))
  # 260, then '<', ' ', 'a', 'b', and at most 'ab', ' a', ' ab'.
  assert 264 < len(tokenizer) <= 267
  assert lib.decode(tokenizer, lib.encode(tokenizer, 'abc <x')) == 'abc <x'


def test_a_vocabulary_without_room_is_refused(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match='tokenizer.vocab_size=280.*288'):
    lib.train_tokenizer(TEXTS, 280, str(tmp_path))


def test_fingerprint_follows_content_not_calls(folder: pathlib.Path) -> None:
  tokenizer = lib.load_tokenizer(str(folder))
  before = lib.fingerprint(tokenizer)
  tokenizer(['a', 'b c'], padding=True, truncation=True, max_length=2)
  assert lib.fingerprint(tokenizer) == before
  other = lib.load_tokenizer(_variant(folder, 'nothing'))
  assert lib.fingerprint(other) != before


@pytest.mark.parametrize(
    'change', [{'pad_token': None}, {'pad_token': '<eos>'}]
)
def test_missing_or_shared_special_tokens_are_named(
    folder: pathlib.Path, change: dict[str, str | None]
) -> None:
  path = _variant(folder, 'bad', **change)
  with pytest.raises(
      ValueError, match="'pad': .*'eos': 1, 'bos': 2.*different"
  ):
    lib.load_tokenizer(path)


def test_a_tokenizer_that_cannot_spell_a_special_string_is_refused(
    folder: pathlib.Path,
) -> None:
  path = pathlib.Path(_variant(folder, 'words'))
  backend = json.loads((path / 'tokenizer.json').read_text())
  vocab = {'<pad>': 0, '<eos>': 1, '<bos>': 2, '<unk>': 3, 'a': 4}
  backend |= {
      'model': {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '<unk>'},
      'pre_tokenizer': {'type': 'WhitespaceSplit'},
      'decoder': None,
  }
  (path / 'tokenizer.json').write_text(json.dumps(backend))
  tokenizer = lib.load_tokenizer(str(path))
  assert lib.encode(tokenizer, 'a a') == [4, 4]
  with pytest.raises(ValueError, match="'a <eos>'"):
    lib.encode(tokenizer, 'a <eos>')


def test_no_texts_give_no_ids(tokenizer: object) -> None:
  assert lib.encode_batch(tokenizer, []) == []


def test_a_folder_without_a_vocabulary_is_no_tokenizer(
    tmp_path: pathlib.Path,
) -> None:
  config = {'tokenizer_class': 'GemmaTokenizer', 'model_type': 'gemma'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  with pytest.raises(FileNotFoundError, match='holds no tokenizer.json or'):
    lib.load_tokenizer(str(tmp_path))
