"""Files as they arrive: JSON within bounds, and what stands in for a file.

A download that went wrong leaves a pointer of git lfs or a web page under the
name of the file; both are told apart, and pickles are never opened.
"""

import json
import pathlib
from typing import Any

# No config.json and no index is near it; a page or a bomb may be far above.
_MAX_JSON_BYTES = 16 * 2**20
# First bytes -> what the file is instead, and what to do.
_FOREIGN = (
    (
        b'version https://git-lfs',
        'is a pointer of git lfs, not the file itself; run `git lfs pull` in '
        'its folder, or download it again',
    ),
    (
        b'<',
        'is a web page (perhaps that of an error), not the file itself; '
        'download it again',
    ),
    (
        b'PK\x03\x04',
        'is a zip archive, as PyTorch writes pickles; a pickle runs the code '
        'in it when it is read, so save the model with safetensors',
    ),
    (
        b'\x80',
        'is a pickle, which runs the code in it when it is read; save the '
        'model with safetensors',
    ),
)


def foreign(path: pathlib.Path) -> str:
  """What a file is in place of JSON or safetensors; '' if nothing known."""
  with path.open('rb') as file:
    start = file.read(64)
  if start[8:9] == b'{':  # safetensors: the eight bytes before are a length
    return ''
  for known, what in _FOREIGN:
    if start.lstrip().startswith(known):
      return what
  return ''


def read_json(
    path: pathlib.Path, max_bytes: int = _MAX_JSON_BYTES
) -> dict[str, Any]:
  """The JSON object in a file.

  Raises:
    ValueError: if there is none in it; says what there is.
  """
  if what := foreign(path):
    raise ValueError(f'{path} {what}')
  if (size := path.stat().st_size) > max_bytes:
    raise ValueError(
        f'{path} has {size} bytes; such a file has at most {max_bytes}, '
        'so download it again'
    )
  try:
    found = json.loads(path.read_text())
  except (ValueError, RecursionError) as error:
    raise ValueError(
        f'{path} is no JSON ({error}); download it again'
    ) from error
  if not isinstance(found, dict):
    raise ValueError(
        f'{path} holds a {type(found).__name__}; it must hold a JSON object, '
        'so download it again'
    )
  return found
