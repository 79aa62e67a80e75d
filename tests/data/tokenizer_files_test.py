"""Each broken file of a tokenizer gives one message that names it."""

import json
import pathlib
import shutil

import pytest

from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from tests.data.files_test import LFS, PAGE


@pytest.fixture(scope='module')
def good(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('tokenizer')
  tokenizer_lib.train_tokenizer(['the boat ' * 9], 300, str(folder))
  return folder


_CUT = b'{"version": "1.0", "model": {"ty'


@pytest.mark.parametrize(
    ('name', 'content', 'words'),
    [
        ('tokenizer.json', b'{}', 'the type of its model is None; it must be'),
        ('tokenizer.json', b'[1]', 'holds a list; it must hold a JSON object'),
        (
            'tokenizer.json',
            b'{"model": {"type": "Foo"}}',
            "the type of its model is 'Foo'; it must be one of BPE",
        ),
        (
            'tokenizer.json',
            b'{"model": {"type": "BPE"}}',
            'holds no vocabulary or no added_tokens',
        ),
        ('tokenizer.json', PAGE, 'is a web page'),
        ('tokenizer.json', LFS, 'is a pointer of git lfs'),
        ('tokenizer.json', b'', 'is no JSON'),
        ('tokenizer.json', _CUT, 'is no JSON'),
        ('tokenizer_config.json', b'[1]', 'holds a list'),
        ('tokenizer_config.json', PAGE, 'is a web page'),
        (
            'tokenizer_config.json',
            b'{"tokenizer_class": 5}',
            'tokenizer_class is 5; it must be text',
        ),
        (
            'tokenizer_config.json',
            b'{"eos_token": 5, "tokenizer_class": "PreTrainedTokenizerFast"}',
            'eos_token is 5; it must be text',
        ),
        ('special_tokens_map.json', b'[1]', 'holds a list'),
    ],
)
def test_a_broken_file_is_named_with_what_it_holds(
    good: pathlib.Path,
    tmp_path: pathlib.Path,
    name: str,
    content: bytes,
    words: str,
) -> None:
  folder = tmp_path / 'broken'
  shutil.copytree(good, folder)
  (folder / name).write_bytes(content)
  with pytest.raises(ValueError) as caught:
    tokenizer_lib.load_tokenizer(str(folder))
  message = str(caught.value)
  assert message.startswith(str(folder / name)) and words in message
  assert '\n' not in message and 'again' in message


def test_pieces_that_cannot_be_read_are_named(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'tokenizer.model').write_bytes(b'garbage' * 9)
  settings = json.dumps({'tokenizer_class': 'GemmaTokenizer'})
  (tmp_path / 'tokenizer_config.json').write_text(settings)
  with pytest.raises(ValueError) as caught:
    tokenizer_lib.load_tokenizer(str(tmp_path))
  message = str(caught.value)
  assert message.startswith(f'{tmp_path / "tokenizer.model"} cannot be read')
  assert 'copy the tokenizer.json of the model beside it' in message
