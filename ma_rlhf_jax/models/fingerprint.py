"""Which weights a folder holds, told without reading all of them."""

import contextlib
import hashlib
import json
import os
import pathlib
import struct

from ma_rlhf_jax.models import weight_files

# Windows of each tensor that are read: a small one is read whole, and of one
# that was trained on no window stays as it was.
_WINDOWS = 16
_BYTES = 4096


def of_folder(folder: str | os.PathLike[str]) -> str:
  """SHA-256 (hex) of what tells the model of a folder from another.

  Those are config.json, and of each safetensors file its name, size, header and
  16 windows of 4096 bytes of each tensor: 33 MB for the 27B. Neither the place
  of the folder nor times count.

  Args:
    folder: local.

  Raises:
    OSError, ValueError: as `weight_files.open_folder`.
  """
  total = hashlib.sha256()
  path = pathlib.Path(folder)
  with contextlib.ExitStack() as stack:
    weight_files.open_folder(path, stack)  # headers are what they should be
  total.update((path / 'config.json').read_bytes())
  for file in sorted(path.glob('*.safetensors')):
    total.update(f'{file.name} {file.stat().st_size} '.encode())
    _add_file(total, file)
  return total.hexdigest()


def _add_file(total: 'hashlib._Hash', path: pathlib.Path) -> None:
  with path.open('rb') as file:
    header = file.read(*struct.unpack('<Q', file.read(8)))
    total.update(header)
    tensors = json.loads(header)
    tensors.pop('__metadata__', None)
    start = 8 + len(header)
    for name in sorted(tensors):
      begin, end = tensors[name]['data_offsets']
      for at in _starts(end - begin):
        file.seek(start + begin + at)
        total.update(file.read(min(_BYTES, end - begin - at)))


def _starts(size: int) -> range | list[int]:
  """Where the windows of a tensor of so many bytes start."""
  if size <= _WINDOWS * _BYTES:
    return range(0, size, _BYTES)
  last = size - _BYTES  # the ends are among them
  return [last * i // (_WINDOWS - 1) for i in range(_WINDOWS)]
