"""Which model a folder holds: one digest of its config and all its weights."""

import contextlib
import os
import pathlib

from ma_rlhf_jax import manifest
from ma_rlhf_jax.models import weight_files


def of_folder(folder: str | os.PathLike[str]) -> str:
  """SHA-256 (hex) of the names and contents of config.json and safetensors.

  Every byte is read, several files at a time; a process reads a file once (see
  `manifest.sha256`). Neither the place of the folder, which is local, nor times
  count.

  Raises:
    OSError, ValueError: as `weight_files.open_folder`.
    DamagedError: if the folder has a manifest that a file does not fit.
  """
  path = pathlib.Path(folder)
  with manifest.verifying(path), contextlib.ExitStack() as stack:
    weight_files.open_folder(path, stack)  # headers are what they should be
  names = [file.name for file in path.glob('*.safetensors')]
  return manifest.digest(manifest.entries(path, ['config.json', *names]))
