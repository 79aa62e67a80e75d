"""One hash of a tree of parameters, to compare models with."""

import hashlib
import json
from typing import Any

import jax
import numpy as np

from ma_rlhf_jax.parallel.mesh import gathered


def params_sha256(params: Any) -> str:
  """SHA-256 (hex) of a tree of arrays: paths, dtypes, shapes and bytes.

  The order and the type of containers do not count, nor do shardings.
  """
  leaves = {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  total = hashlib.sha256()
  for path in sorted(leaves):
    array = np.ascontiguousarray(gathered(leaves[path]))
    header = [path, array.dtype.name, list(np.shape(leaves[path]))]
    total.update(json.dumps(header).encode())
    total.update(array.reshape(-1).view(np.uint8))
  return total.hexdigest()
