"""The digests of a checkpoint, written while it is saved.

Each process hashes the files that it has written, in the thread that saves;
then the first one hashes what is left and writes the manifest into the folder
of the step, before Orbax renames that into place. So a step that is there has
its manifest, and a kill leaves either both or neither:

  process p   write arrays -- hash own files --+
  process 0   write arrays -- hash own files --+-- the rest, manifest -- commit
"""

from collections.abc import Callable, Sequence
import dataclasses
import logging
import re
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from ma_rlhf_jax import atomic_file, manifest

_log = logging.getLogger(__name__)

_PART = 'digests.process_{}.json'
_PARTS = re.compile(r'digests\.process_\d+\.json')
# Orbax changes it after the last moment at which digests can be taken; it holds
# nothing of the state.
_ORBAX_OWN = ('_CHECKPOINT_METADATA', 'commit_success.txt')


class _Then(ocp.future.Future):
  """Other futures, and then a function, in the thread that waits for them."""

  def __init__(self, before: Sequence[Any], do: Callable[[], None]) -> None:
    self._before, self._do = before, do

  def result(self, timeout: int | None = None) -> None:
    for future in self._before:
      future.result(timeout)
    self._do()


class StateHandler(ocp.StandardCheckpointHandler):
  """Orbax's handler of arrays, which also takes the digests of their files."""

  def __init__(self) -> None:
    super().__init__()
    self._step: epath.Path | None = None

  async def async_save(
      self, directory: epath.Path, *args: Any, **kwargs: Any
  ) -> list[ocp.future.Future]:
    """Starts saving; the futures end once the files are hashed too."""
    futures = await super().async_save(directory, *args, **kwargs)
    self._step = directory.parent
    return [_Then(futures or [], lambda: _hash_own(directory))]

  def write_manifest(self) -> None:
    """Writes the manifest of the step being saved, before it is committed.

    Orbax calls this on the first process, when all have written and hashed.
    """
    step, found = epath.Path(self._step), {}
    state = step / 'state'
    for path in sorted(state.iterdir()):
      if _PARTS.fullmatch(path.name):
        part = manifest.read_sealed(path)
        found |= {f'{state.name}/{name}': x for name, x in part.items()}
        path.unlink()
    left = [
        name
        for name in manifest.files_under(step)
        if name not in found and not name.endswith(_ORBAX_OWN)
    ]
    manifest.write(step, found | manifest.entries(step, left))


@ocp.args.register_with_handler(StateHandler, for_save=True)
@dataclasses.dataclass
class StateSave(ocp.args.StandardSave):
  """What `StateHandler` saves."""


@ocp.args.register_with_handler(StateHandler, for_restore=True)
@dataclasses.dataclass
class StateRestore(ocp.args.StandardRestore):
  """What `StateHandler` restores onto."""


def _hash_own(folder: epath.Path) -> None:
  """Writes the digests of the files that this process alone has written."""
  mine = f'process_{jax.process_index()}'
  own = [
      name
      for name in manifest.files_under(folder)
      if mine in (part.removeprefix('ocdbt.') for part in name.split('/'))
  ]
  text = manifest.sealed(manifest.entries(folder, own))
  atomic_file.write_text(folder / _PART.format(jax.process_index()), text)


def verify(step: epath.Path) -> None:
  """Compares the files of a step with its manifest, shared by all processes.

  Each process looks at every n-th file, so all must call this together. A step
  that an earlier version of this package has saved has no digests, nor have
  those beside it: a line says so, and it is taken as it is.

  Raises:
    DamagedError: names the file.
  """
  count, index = jax.process_count(), jax.process_index()
  names = sorted(manifest.read(step) or ())
  mine = set(names[index::count])
  if not manifest.verify(step, mine.__contains__, remedy='it is not used'):
    if any((path / manifest.NAME).exists() for path in step.parent.iterdir()):
      raise manifest.DamagedError(
          f'{step} is damaged: it holds no {manifest.NAME}, and a step beside '
          'it does; it is not used'
      )
    _log.warning(
        '%s holds no %s, so damage of it cannot be seen; it is used as it is',
        step,
        manifest.NAME,
    )


def verify_meta(step: epath.Path) -> None:
  """`verify` of the few bytes beside the arrays, by each process."""
  manifest.verify(
      step, lambda name: name.startswith('meta/'), remedy='it is not used'
  )
