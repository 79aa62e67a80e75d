"""What Weights & Biases needs of a run: a login, a folder and an id.

Its runs belong to stages. Their files lie in `<workdir>/<stage>/wandb`.
"""

from collections.abc import Sequence
import inspect
import os
import re
import uuid

from etils import epath

from ma_rlhf_jax import atomic_file

_OFFLINE = ('offline', 'disabled', 'dryrun')
_ID_FILE = 'wandb_id.txt'


def check(sinks: Sequence[str]) -> None:
  """Raises where W&B would not take this run; nothing is asked of the user.

  Call it before anything that takes time. The server is asked whether it knows
  the key.

  Args:
    sinks: `log.sinks`; without 'wandb' there is nothing to check.

  Raises:
    ValueError: in one line, with what to do.
  """
  if 'wandb' not in sinks:
    return
  import wandb

  if wandb.setup().settings.mode in _OFFLINE:
    return
  # Older versions lack `prompt`, and ask where there is a terminal.
  known = inspect.signature(wandb.login).parameters
  options = {'prompt': False, 'verify': True}
  options = {name: value for name, value in options.items() if name in known}
  try:
    found = wandb.login(**options)
    reason = '' if found else 'no API key is configured'
  except (wandb.errors.Error, ValueError, OSError) as error:
    reason = ' '.join(str(error).split())[:200].rstrip('.')
  if reason:
    raise ValueError(
        f"log.sinks has 'wandb', but {reason}; set WANDB_API_KEY or run `wandb "
        'login`, or set WANDB_MODE=offline (`wandb sync` uploads later), or '
        "take 'wandb' out of log.sinks"
    )


def local_folder(folder: epath.Path) -> str | None:
  """Where the files of W&B go; None leaves it to W&B.

  That is so where WANDB_DIR says it, and where the workdir is in a bucket.
  """
  if 'WANDB_DIR' in os.environ or '://' in str(folder):
    return None
  folder.mkdir(parents=True, exist_ok=True)
  return str(folder)


def run_id(folder: epath.Path) -> str:
  """The id of the run of a stage's folder, the same at each start."""
  path = folder / _ID_FILE
  if path.exists() and re.fullmatch('[0-9a-f]{16}', stored := path.read_text()):
    return stored
  folder.mkdir(parents=True, exist_ok=True)
  made = uuid.uuid4().hex[:16]
  atomic_file.write_text(path, made)
  return made
