"""A finished folder to the Hugging Face hub.

The token is that of HF_TOKEN or of `hf auth login`; it is never a flag and
never printed.
"""

import os
import re

# Left from an earlier upload, these would be read in place of the new ones.
_STALE = (
    '*.safetensors',
    '*.safetensors.index.json',
    'adapter_config.json',
    'config.json',
    'generation_config.json',
)


class HubError(ValueError):
  """The hub cannot be written to; the message says why."""


def check(repo: str) -> None:
  """Raises HubError where an upload to `repo` cannot work, before any work."""
  import huggingface_hub
  from huggingface_hub import errors
  from huggingface_hub.utils import validate_repo_id

  try:
    validate_repo_id(repo)
    valid = repo.count('/') == 1
  except errors.HFValidationError:
    valid = False
  if not valid:
    raise HubError(
        f'--push_to_hub={repo}: a repository is named user/name, by letters, '
        'digits and ._-'
    )
  if not huggingface_hub.get_token():
    raise HubError(
        f'--push_to_hub={repo} needs a token that may write: set HF_TOKEN, or '
        'run `hf auth login`'
    )


def upload(folder: str | os.PathLike[str], repo: str) -> str:
  """Uploads a whole local folder to `user/name`, one commit; its address.

  A repository that does not exist is made, private. Weights and configs of an
  earlier upload go; other files stay.

  Raises:
    HubError: in one line; the folder is untouched.
  """
  import huggingface_hub
  from huggingface_hub import errors

  api = huggingface_hub.HfApi()
  try:
    url = api.create_repo(repo, private=True, exist_ok=True)
    api.upload_folder(
        repo_id=repo,
        folder_path=os.fspath(folder),
        commit_message='Export of ma_rlhf_jax',
        delete_patterns=list(_STALE),
    )
  # RuntimeError is what its storage backend raises.
  except (OSError, ValueError, RuntimeError, errors.HTTPError) as error:
    raise HubError(
        f'--push_to_hub={repo}: {_reason(error)}. {folder} is whole; to try '
        f'again: hf upload {repo} {folder}'
    ) from error
  return str(url)


def _reason(error: BaseException) -> str:
  """One line of what went wrong, and what helps."""
  status = getattr(getattr(error, 'response', None), 'status_code', None)
  said = ' '.join(str(error).split())[:300].rstrip('.')
  # Nothing that looks like a token is repeated.
  said = re.sub(r'hf_\w+', 'hf_...', said)
  if status == 401:
    return f'the hub does not accept the token (401); make a new one: {said}'
  if status == 403:
    return (
        'the token may not write there (403); use one with the role write, '
        f'and a name of yours or of your organisation: {said}'
    )
  if status is not None:
    return f'the hub answered {status}: {said}'
  return f'the hub cannot be reached; check the connection: {said}'
