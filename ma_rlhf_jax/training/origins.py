"""What a stage started from, so that it does not go on from something else.

<workdir>/<stage>/origins.json holds, for each model that a stage loads, its
folder or id and the fingerprint of its weights. Checkpoints hold only what
learns: frozen weights, a reference policy and a reward model are read again at
each start, and must be those of the start before.
"""

import logging

from etils import epath
import jax

from ma_rlhf_jax import manifest
from ma_rlhf_jax.models import fingerprint
from ma_rlhf_jax.training import loading, sources
from ma_rlhf_jax.training.products import Source, SourceError
from ma_rlhf_jax.training.run import Run

_log = logging.getLogger(__name__)

_FILE = 'origins.json'
_DIGEST = 'sha256_of_files'


def check(run: Run, stage: str) -> None:
  """Records what a stage starts from; raises where it goes on from another.

  A stage without a checkpoint starts anew, so anything is right for it. One of
  an earlier version of this package, which recorded no such digest, is taken as
  it is.

  Args:
    run: what the stages share.
    stage: 'sft', 'reward_model' or 'ppo', about to be run.

  Raises:
    SourceError: names the stage, and each folder whose weights have changed.
  """
  folder = run.workdir / stage
  found = {
      role: {'path': source.path, _DIGEST: _fingerprint(source)}
      for role, source in sources.of_stage(
          run.config, run.workdir, stage
      ).items()
  }
  stored = _read(folder / _FILE)
  if stored and (step := newest(folder)):
    changed = [
        f'{role} ({entry["path"]})'
        for role, entry in found.items()
        if stored.get(role, {}).get(_DIGEST, entry[_DIGEST]) != entry[_DIGEST]
    ]
    if changed:
      raise SourceError(
          f'stage {stage!r} cannot go on after step {step}: these are not the '
          f'weights that it started with: {"; ".join(changed)}; restore what '
          f'was there, or start in a new --workdir, or remove {folder} to '
          'start this stage again'
      )
  if jax.process_index() == 0 and found != stored:
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write_sealed(folder / _FILE, found)


def newest(folder: epath.Path) -> int:
  """Step of the newest checkpoint of a stage's folder; 0 if there is none."""
  steps = [
      int(path.name)
      for path in (folder / 'checkpoints').glob('*')
      if path.name.isdigit()
  ]
  return max(steps, default=0)


def _fingerprint(source: Source) -> str:
  return loading.read(source, fingerprint.of_folder)


def _read(path: epath.Path) -> dict[str, dict[str, str]] | None:
  """What an earlier start recorded; None if nothing, or if it is damaged."""
  try:
    return manifest.read_sealed(path)
  except FileNotFoundError:
    return None
  except manifest.DamagedError as error:
    _log.warning('%s; the models are taken as they are now', error)
    return None
