"""The login, the folder and the id that Weights & Biases gets."""

import pathlib
import sys
import types
from typing import Any

from etils import epath
import pytest

from ma_rlhf_jax.training import wandb_login


class _Error(Exception):
  """What wandb raises."""


def _fake(mode: str, login: Any) -> types.SimpleNamespace:
  settings = types.SimpleNamespace(mode=mode)
  return types.SimpleNamespace(
      setup=lambda: types.SimpleNamespace(settings=settings),
      login=login,
      errors=types.SimpleNamespace(Error=_Error),
  )


def _check(monkeypatch: pytest.MonkeyPatch, mode: str, login: Any) -> None:
  monkeypatch.setitem(sys.modules, 'wandb', _fake(mode, login))
  wandb_login.check(('jsonl', 'wandb'))


def test_without_the_sink_nothing_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setitem(sys.modules, 'wandb', None)  # as if not installed
  wandb_login.check(('jsonl', 'tensorboard'))


@pytest.mark.parametrize('mode', ['offline', 'disabled', 'dryrun'])
def test_offline_needs_no_key(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
  _check(monkeypatch, mode, lambda: pytest.fail('asked for a key'))


def test_a_key_that_the_server_knows_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  asked = []

  def login(*, prompt: bool = True, verify: bool = False) -> bool:
    asked.append((prompt, verify))
    return True

  _check(monkeypatch, 'online', login)
  assert asked == [(False, True)]  # never a question to the user
  _check(monkeypatch, 'online', lambda verify=False: True)  # older versions


def _no_key(**options: Any) -> bool:
  raise _Error('API key invalid.\nsecond line')


@pytest.mark.parametrize(
    ('login', 'reason'),
    [(lambda: False, 'no API key'), (_no_key, 'API key invalid')],
)
def test_a_missing_or_wrong_key_is_one_line_with_the_fixes(
    monkeypatch: pytest.MonkeyPatch, login: Any, reason: str
) -> None:
  with pytest.raises(ValueError, match=reason) as caught:
    _check(monkeypatch, 'online', login)
  message = str(caught.value)
  assert '\n' not in message
  for fix in (
      'WANDB_API_KEY',
      'wandb login',
      'WANDB_MODE=offline',
      'log.sinks',
  ):
    assert fix in message


def test_files_lie_in_the_workdir_unless_the_user_says_where(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.delenv('WANDB_DIR', raising=False)
  folder = epath.Path(tmp_path / 'run' / 'sft')
  assert wandb_login.local_folder(folder) == str(folder) and folder.is_dir()
  assert wandb_login.local_folder(epath.Path('gs://b/run/sft')) is None
  monkeypatch.setenv('WANDB_DIR', '/elsewhere')
  assert wandb_login.local_folder(folder) is None


def test_an_id_belongs_to_the_folder_and_moves_with_it(
    tmp_path: pathlib.Path,
) -> None:
  first = wandb_login.run_id(epath.Path(tmp_path / 'a'))
  assert wandb_login.run_id(epath.Path(tmp_path / 'a')) == first
  (tmp_path / 'a').rename(tmp_path / 'b')
  assert wandb_login.run_id(epath.Path(tmp_path / 'b')) == first
  assert wandb_login.run_id(epath.Path(tmp_path / 'a')) != first
  (tmp_path / 'b' / 'wandb_id.txt').write_text(first[:3])  # cut by a kill
  assert len(wandb_login.run_id(epath.Path(tmp_path / 'b'))) == 16
