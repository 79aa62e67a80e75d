"""The run directory: what a run was started with, and what its stages made.

<workdir>/config.json       the resolved config, flat, of the first start
<workdir>/run-0001.json     each start: command, versions, git, devices
<workdir>/<stage>/done.json what the stage made; written last, so that a
                            stage is done when this file is there and whole

Each of these files holds the SHA-256 of its own content, and is not used where
it does not fit.
"""

from collections.abc import Mapping
import datetime
import functools
import importlib.metadata
import logging
import pathlib
import platform
import re
import subprocess
import sys
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import manifest
from ma_rlhf_jax.parallel import processes

_log = logging.getLogger(__name__)

_PACKAGES = (
    'ma_rlhf_jax',
    'jax',
    'jaxlib',
    'libtpu',
    'flax',
    'optax',
    'orbax-checkpoint',
    'transformers',
    'tokenizers',
    'datasets',
    'safetensors',
    'numpy',
)


class WorkdirError(ValueError):
  """The given folder cannot be the workdir of this run."""


def default_workdir(recipe: str, config: ConfigDict) -> str:
  """`runs/<recipe and arguments>-<first 8 of the config's fingerprint>`.

  Args:
    recipe: what --config was given, 'configs/tiny.py:ngram=1'.
    config: the resolved config, `--config.field=value` included.

  Returns:
    A relative path of letters, digits and `._=,-`: 'runs/tiny-ngram=1-1a2b3c4d'
  """
  path, _, arguments = recipe.partition(':')
  name = '-'.join(filter(None, [pathlib.PurePath(path).stem, arguments]))
  slug = re.sub(r'[^A-Za-z0-9._=,]+', '-', name)[:80].strip('.-') or 'run'
  return f'runs/{slug}-{config_lib.fingerprint(config)[:8]}'


def _absolute(path: epath.PathLike) -> epath.Path:
  workdir = epath.Path(path).expanduser()
  if workdir.is_absolute():
    return workdir
  return epath.Path(pathlib.Path.cwd()) / workdir


def place(path: epath.PathLike) -> epath.Path:
  """The absolute path of a workdir that is there, or may be made.

  Raises:
    WorkdirError: if the path is a file or a folder of something else.
  """
  workdir = _absolute(path)
  _stored_config(workdir)
  return workdir


def _make_folder(workdir: epath.Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise WorkdirError(
        f'--workdir={workdir} cannot be made a folder ({error.strerror}); '
        'give one that may be written to'
    ) from error


def open_workdir(path: epath.PathLike, config: ConfigDict) -> epath.Path:
  """Creates a workdir or takes up the one there, and records this start.

  The first process of several checks and writes; the others call this later
  and must find what it wrote.

  Args:
    path: of the workdir; relative to the current folder, `~` or gs://.
    config: the resolved config.

  Returns:
    The absolute path.

  Raises:
    WorkdirError: if the path is a file, a folder of something else, or the
      workdir of a config that differs in fields that are not resumable.
  """
  workdir = _absolute(path)
  if not processes.is_first():
    _check_shared(workdir)
    return workdir
  stored = _stored_config(workdir)
  if stored is None:
    _make_folder(workdir)
    manifest.write_sealed(workdir / 'config.json', config_lib.flatten(config))
  elif fields := config_lib.differences(stored, config):
    raise WorkdirError(
        f'{workdir} was started with another config:\n  '
        + '\n  '.join(fields)
        + '\nRun with another --workdir, or restore these values, or delete'
        ' the folder'
    )
  elif not _is_whole(workdir / 'config.json'):
    manifest.write_sealed(workdir / 'config.json', stored)
  starts = [int(p.stem[4:]) for p in workdir.glob('run-[0-9]*.json')]
  start = 1 + max(starts, default=0)
  manifest.write_sealed(
      workdir / f'run-{start:04d}.json', _describe_start(config)
  )
  return workdir


def _check_shared(workdir: epath.Path) -> None:
  """Raises where another process has another disk."""
  if not (workdir / 'config.json').exists():
    raise WorkdirError(
        f'--workdir={workdir} holds no config.json on this host, while process '
        '0 has written one; give a folder that all hosts share: gs://, NFS or '
        'the like, with an absolute path'
    )


def abandon(path: epath.PathLike) -> None:
  """Removes what a first start wrote before it found that it cannot run.

  The mended command may then use the folder. Files of others stay.
  """
  workdir = _absolute(path)
  if not workdir.is_dir():
    return
  for path in workdir.glob('run-[0-9]*.json'):
    path.unlink()
  (workdir / 'config.json').unlink(missing_ok=True)
  for folder in (workdir / 'tokenizer', workdir / 'data'):
    if folder.exists():
      folder.rmtree()
  if not any(workdir.iterdir()):
    workdir.rmdir()


def read_config(path: epath.PathLike) -> tuple[epath.Path, ConfigDict]:
  """The absolute path of a workdir, and the config it was started with.

  Raises:
    WorkdirError: if it is no workdir.
  """
  workdir = _absolute(path)
  stored = _stored_config(workdir)
  if stored is None:
    raise WorkdirError(
        f'--workdir={workdir} is no workdir: it holds no config.json; give the '
        'folder that `train` printed'
    )
  return workdir, config_lib.restore(stored)


def mark_done(
    workdir: epath.PathLike, stage: str, product: Mapping[str, Any]
) -> None:
  """Writes `<workdir>/<stage>/done.json`, after all that it speaks of.

  Every process must call this; the first one writes.

  Args:
    workdir: the run directory.
    stage: name of the stage.
    product: JSON values; paths relative to the workdir, so that it may move.
  """
  folder = epath.Path(workdir) / stage
  with processes.together():
    if processes.is_first():
      folder.mkdir(parents=True, exist_ok=True)
      manifest.write_sealed(folder / 'done.json', dict(product))


def read_done(workdir: epath.PathLike, stage: str) -> dict[str, Any] | None:
  """What `mark_done` wrote; None while the stage is not done.

  A damaged marker counts as none: the stage goes on after its last checkpoint,
  and makes its product again.
  """
  path = epath.Path(workdir) / stage / 'done.json'
  try:
    return manifest.read_sealed(path)
  except FileNotFoundError:
    return None
  except manifest.DamagedError as error:
    _warn_once(f'{error}; {stage} counts as not done')
    return None


def mark_undone(workdir: epath.PathLike, stage: str) -> None:
  """Removes the marker of a stage, whose product is then made again."""
  (epath.Path(workdir) / stage / 'done.json').unlink(missing_ok=True)


def as_trained(workdir: epath.PathLike, config: ConfigDict) -> ConfigDict:
  """The config with the batch sizes that the stages that are done used.

  They are smaller than those of the config where a stage's part of the rows
  does not fill these.
  """
  config = config_lib.restore(config_lib.flatten(config))
  for stage in ('sft', 'reward_model', 'ppo'):
    done = read_done(workdir, stage) or {}
    if 'batch_size' in done:
      config[stage].batch_size = done['batch_size']
  return config


def _stored_config(workdir: epath.Path) -> dict[str, Any] | None:
  """The config the workdir was started with; None where it is to be made."""
  if not workdir.exists():
    return None
  if not workdir.is_dir():
    raise WorkdirError(
        f'--workdir={workdir} is a file; give a folder or a new path'
    )
  names = {path.name for path in workdir.iterdir()}
  names = {name for name in names if not name.startswith('.')}
  if 'config.json' not in names:
    if names:
      raise WorkdirError(
          f'--workdir={workdir} is not empty and holds no config.json, so it is'
          f' no workdir (found {", ".join(sorted(names)[:5])}); give a new path'
      )
    return None
  try:
    return manifest.read_sealed(workdir / 'config.json')
  except manifest.DamagedError as error:
    if names == {'config.json'}:  # killed while it was written
      return None
    return _config_of_a_start(workdir, str(error))


def _config_of_a_start(workdir: epath.Path, why: str) -> dict[str, Any]:
  """The config that the first undamaged run-*.json of a workdir holds.

  It is that of the first start but for fields that a later one may change.
  """
  for path in sorted(workdir.glob('run-[0-9]*.json')):
    try:
      stored = manifest.read_sealed(path)['config']
    except (manifest.DamagedError, KeyError):
      continue
    _warn_once(f'{why}; the config is taken from {path.name}')
    return stored
  raise WorkdirError(
      f'{why}, and no run-*.json beside it is whole; restore the file, or '
      'start in a new --workdir'
  )


def _is_whole(path: epath.Path) -> bool:
  try:
    manifest.read_sealed(path)
  except manifest.DamagedError:
    return False
  return True


@functools.cache
def _warn_once(text: str) -> None:
  """Warns of a damaged file once, however often it is read."""
  _log.warning('%s', text)


def _describe_start(config: ConfigDict) -> dict[str, Any]:
  devices = jax.devices()
  return {
      'started': datetime.datetime.now(datetime.UTC).isoformat(),
      'command': sys.argv,
      'python': platform.python_version(),
      'packages': _versions(),
      'git': _git(pathlib.Path(__file__)),
      'devices': {
          'kind': devices[0].device_kind,
          'platform': devices[0].platform,
          'count': len(devices),
          'processes': jax.process_count(),
      },
      'config': config_lib.flatten(config),
  }


def _versions() -> dict[str, str | None]:
  """Versions of the packages that matter; None where one is absent."""
  versions = {}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return versions


def _git(file: pathlib.Path) -> dict[str, Any] | None:
  """Revision of the checkout that tracks `file`; None where none does."""

  def git(*arguments: str) -> str:
    return subprocess.run(
        ['git', *arguments],
        cwd=file.parent,
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    ).stdout.strip()

  try:
    git('ls-files', '--error-unmatch', file.name)
    return {
        'revision': git('rev-parse', 'HEAD'),
        'dirty': bool(git('status', '--porcelain', '--untracked-files=no')),
    }
  except (OSError, subprocess.SubprocessError):
    return None  # no git, or installed outside of a checkout


def is_workdir(path: epath.PathLike) -> bool:
  """Whether `path` is a folder that `open_workdir` has started a run in."""
  folder = epath.Path(path).expanduser()
  return folder.is_dir() and any(folder.glob('run-[0-9]*.json'))


def is_started(path: epath.PathLike) -> bool:
  """Whether `path` holds what a start has written, of which nothing may go.

  Unlike `is_workdir` it counts a workdir whose run-*.json are missing.
  """
  folder = epath.Path(path).expanduser()
  return is_workdir(path) or (folder / 'config.json').exists()
