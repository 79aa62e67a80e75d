"""Whether held-out rows have chosen the models of a run."""

from collections.abc import Mapping
import logging
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import manifest
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.training import products, sources

_log = logging.getLogger(__name__)


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
  names = filter(None, (flat.get(field) for field in sources.MODEL_FIELDS))
  return any(_chose(run, seen) for name in names for run in _workdirs(name))


def _workdirs(name: str) -> list[epath.Path]:
  """The workdir that `name` is, or whose <stage>/hf or ppo/critic it is."""
  path = epath.Path(products.split(str(epath.Path(name).expanduser()))[0])
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
  """The configs of all starts whose files are whole."""
  found = []
  for path in workdir.glob('run-[0-9]*.json'):
    try:
      found.append(manifest.read_sealed(path).get('config', {}))
    except manifest.DamagedError as error:
      _log.warning('%s; what it chose is not known', error)
  return found
