"""The models that several test files start from."""

import pytest

from tests.training.stores import Store, make_store


@pytest.fixture(scope='session')
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
  return make_store(tmp_path_factory.mktemp('store'))
