"""The module `toy`, from which tests take parsers."""

import pathlib
import sys

import pytest

from ma_rlhf_jax.macro import parser_process, parsers
from tests.macro.toys import TOY


@pytest.fixture
def toy(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
  """The module `toy`, and limits that a test can wait for."""
  path = tmp_path / 'toy.py'
  path.write_text(TOY)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, 'toy', raising=False)
  monkeypatch.setattr(parser_process, 'ANSWER_SECONDS', 1.0)
  monkeypatch.setattr(parser_process, 'START_SECONDS', 20.0)
  monkeypatch.setattr(parsers, 'BATCH_SECONDS', 0.5)
  return path
