"""Uploads, with a hub that is not there."""

import pathlib
from typing import Any

import huggingface_hub
from huggingface_hub import errors
import pytest

from ma_rlhf_jax.models import hub
from ma_rlhf_jax.models.hub import HubError

_SECRET = 'hf_verysecret'


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
  monkeypatch.setenv('HF_TOKEN', _SECRET)


class _Api:
  """Notes what it is asked for; fails where `error` says so."""

  calls: list[tuple[str, dict[str, Any]]] = []
  error: BaseException | None = None

  def create_repo(self, repo: str, **more: Any) -> str:
    self.calls.append(('create_repo', {'repo': repo, **more}))
    return f'https://huggingface.co/{repo}'

  def upload_folder(self, **more: Any) -> None:
    self.calls.append(('upload_folder', more))
    if self.error is not None:
      raise self.error


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[_Api]:
  monkeypatch.setattr(_Api, 'calls', [])
  monkeypatch.setattr(_Api, 'error', None)
  monkeypatch.setattr(huggingface_hub, 'HfApi', _Api)
  return _Api


def test_a_private_repository_gets_the_folder_in_one_commit(
    api: type[_Api], tmp_path: pathlib.Path
) -> None:
  url = hub.upload(tmp_path, 'user/name')
  assert url == 'https://huggingface.co/user/name'
  (_, made), (_, sent) = api.calls
  assert made == {'repo': 'user/name', 'private': True, 'exist_ok': True}
  assert sent['repo_id'] == 'user/name'
  assert sent['folder_path'] == str(tmp_path)
  # A model.safetensors of before would be read in place of new shards.
  assert '*.safetensors' in sent['delete_patterns']
  assert _SECRET not in str(api.calls)


@pytest.mark.parametrize('name', ['name', 'a/b/c', 'user/na me', '/x', 'a/..'])
def test_a_name_that_is_none_is_refused(name: str) -> None:
  with pytest.raises(HubError, match='named user/name'):
    hub.check(name)
  hub.check('user/name-1.0_b')


def test_without_a_token_nothing_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(huggingface_hub, 'get_token', lambda: None)
  with pytest.raises(HubError, match='set HF_TOKEN, or run `hf auth login`'):
    hub.check('user/name')


def _answer(status: int) -> BaseException:
  class Response:
    status_code = status
    headers: dict[str, str] = {}
    request = None

  error = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
  error.response = Response()
  error.args = (f'refused {_SECRET}\nRequest ID: 7',)
  return error


@pytest.mark.parametrize(
    'error, words',
    [
        (_answer(401), 'does not accept the token'),
        (_answer(403), 'may not write there'),
        (_answer(500), 'the hub answered 500'),
        (errors.OfflineModeIsEnabled('offline'), 'cannot be reached'),
        (errors.HTTPError('[Errno -2] no name'), 'check the connection'),
        (RuntimeError('storage'), 'cannot be reached'),
    ],
)
def test_what_goes_wrong_is_one_line_without_the_token(
    api: type[_Api],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    words: str,
) -> None:
  monkeypatch.setattr(_Api, 'error', error)
  with pytest.raises(HubError) as caught:
    hub.upload(tmp_path, 'user/name')
  message = str(caught.value)
  assert words in message and '\n' not in message
  assert message.startswith('--push_to_hub=user/name: ')
  assert f'hf upload user/name {tmp_path}' in message
  assert _SECRET not in message
