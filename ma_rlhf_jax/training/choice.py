"""Whether held-out rows have chosen the models of a run."""

from collections.abc import Mapping
import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import workdir as workdir_lib

# What may name the workdir of another run, or a model in one.
_SOURCES = (
    'sft.init',
    'reward_model.init',
    'ppo.policy_init',
    'ppo.reward_model',
    'ppo.critic_init',
    'ppo.from_run',
)


def is_made(config: ConfigDict, workdir: epath.PathLike) -> bool:
  """Whether a checkpoint that is exported may be the best on held-out rows.

  `export.which` may change from start to start, so every start of the run
  counts, and every start of the runs whose models it begins with: what was
  chosen once is not compared on the same prompts later.

  Args:
    config: of this start.
    workdir: of the run; need not exist.
  """
  return _chooses(config_lib.flatten(config)) or _chose(epath.Path(workdir))


def _chooses(
    flat: Mapping[str, Any], seen: frozenset[str] = frozenset()
) -> bool:
  """Whether this start chooses, or began with what another run has chosen."""
  if flat.get('export.which') == 'best':
    return True
  names = filter(None, (flat.get(field) for field in _SOURCES))
  return any(_chose(run, seen) for name in names for run in _workdirs(name))


def _workdirs(name: str) -> list[epath.Path]:
  """The workdir that `name` is, or whose <stage>/hf or ppo/critic it is."""
  path = epath.Path(name).expanduser()
  if not path.exists() and ':' in path.name:  # WORKDIR:STAGE
    path = epath.Path(str(path).rpartition(':')[0])
  if not path.is_dir():
    return []  # an id of the hub
  return [p for p in (path, path.parent.parent) if workdir_lib.is_workdir(p)]


def _chose(workdir: epath.Path, seen: frozenset[str] = frozenset()) -> bool:
  """Whether a start of the run in `workdir` chooses."""
  if str(workdir) in seen or not workdir_lib.is_workdir(workdir):
    return False
  seen |= {str(workdir)}
  return any(_chooses(start, seen) for start in _starts(workdir))


def _starts(workdir: epath.Path) -> list[dict[str, Any]]:
  """The configs of all starts; one killed while it was written did nothing."""
  found = []
  for path in workdir.glob('run-[0-9]*.json'):
    try:
      found.append(json.loads(path.read_text())['config'])
    except ValueError:
      continue
  return found
