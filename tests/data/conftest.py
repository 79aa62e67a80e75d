"""A small tokenizer for the tests of the data room."""

import pytest

from ma_rlhf_jax.data import tokenizer as tokenizer_lib

TEXTS = ['the boat and the goat'] * 4


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
  path = tmp_path_factory.mktemp('tokenizer')
  tokenizer_lib.train_tokenizer(TEXTS, 300, str(path))
  return tokenizer_lib.load_tokenizer(str(path))
