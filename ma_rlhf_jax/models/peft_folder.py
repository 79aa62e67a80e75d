"""Adapter folders of `peft`, out and in.

What the adapters of a model have learned, without the model: a few megabytes
that `PeftModel.from_pretrained` puts on top of the folder or hub id that they
were trained from. Always float32. Neither `peft` nor PyTorch is needed.
"""

from collections.abc import Iterator
import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from ma_rlhf_jax import manifest
from ma_rlhf_jax.config_fields import KERNELS
from ma_rlhf_jax.models import folders, lora
from ma_rlhf_jax.models.gemma import LORA_A, LORA_B
from ma_rlhf_jax.models.heads import abstract_params
from ma_rlhf_jax.models.presets import GemmaConfig, Lora
from ma_rlhf_jax.models.tensor_names import WEIGHTS, to_ours, to_theirs
from ma_rlhf_jax.parallel import processes
from ma_rlhf_jax.parallel.mesh import gathered
from ma_rlhf_jax.structs import Array, Params

# The file that peft looks for first; it marks a folder as whole.
CONFIG = 'adapter_config.json'
TENSORS = 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
_TASKS = {'policy': 'CAUSAL_LM', 'scalar': 'SEQ_CLS'}


class _Factor(NamedTuple):
  """One tensor of theirs.

  Attributes:
    name: in the file.
    path: of our parameter, its parts joined by '/'.
    layer: index on our first axis, or None.
    inputs: how many of our axes (without the layer) are summed over.
  """

  name: str
  path: str
  layer: int | None
  inputs: int


def _factors(kind: str, config: GemmaConfig) -> Iterator[_Factor]:
  """A and B of every target in every layer, and the head of a scalar model."""
  root = 'backbone/' if kind == 'scalar' else ''
  for path, (name, inputs) in WEIGHTS[config.family].items():
    if path.rpartition('/')[2] not in config.lora.targets:
      continue
    module = _PREFIX + 'model.' + name.removesuffix('.weight')
    for layer in range(config.num_layers):
      for ours, theirs, axes in (
          (LORA_A, 'lora_A', inputs),
          (LORA_B, 'lora_B', 1),
      ):
        tensor = f'{module.format(layer)}.{theirs}.weight'
        yield _Factor(tensor, root + path + ours, layer, axes)
  if kind == 'scalar':
    yield _Factor(_PREFIX + 'score.weight', 'head', None, 1)


def _theirs(config: GemmaConfig, kernel: str) -> str:
  """Their name of a kernel: 'query' -> 'q_proj'."""
  names = {
      path.rpartition('/')[2]: weight.name.split('.')[-2]
      for path, weight in WEIGHTS[config.family].items()
  }
  return names[kernel]


def save(
    folder: str | os.PathLike[str],
    params: Params,
    config: GemmaConfig,
    kind: str,
    *,
    base: str,
    card: str,
    overwrite: bool = False,
) -> None:
  """Writes the adapters of a model, whole or not at all.

  Every process must call this; the first one writes.

  Args:
    folder: where, also gs://.
    params: of the model, adapters included, on any shardings.
    config: its shape, with `lora`.
    kind: 'policy' or 'scalar'; the head of a scalar model is written whole.
    base: the folder or hub id that the adapters were trained on.
    card: text of README.md.
    overwrite: replace a folder that is there.

  Raises:
    FileExistsError: if there is such a folder, not empty, and no `overwrite`.
    NoSpaceError: if the disk is full; nothing is left then.
  """
  leaves = lora.flatten(params)
  with folders.whole(folder, marker=CONFIG, overwrite=overwrite) as draft:
    host = {f.name: _to_host(leaves, f) for f in _factors(kind, config)}
    with processes.together():
      if processes.is_first():
        save_file(host, draft / TENSORS, metadata={'format': 'pt'})
        (draft / 'README.md').write_text(card)
        _write_config(draft / CONFIG, config, kind, base)
        manifest.write(draft, manifest.entries(draft, [CONFIG, TENSORS]))


def _to_host(leaves: dict[str, Array], factor: _Factor) -> np.ndarray:
  ours = leaves[factor.path]
  ours = ours if factor.layer is None else ours[factor.layer]
  theirs = to_theirs(gathered(ours), factor.inputs)
  return np.ascontiguousarray(theirs, np.float32)


def _write_config(
    path: pathlib.Path, config: GemmaConfig, kind: str, base: str
) -> None:
  alpha = config.lora.alpha
  content = {
      'base_model_name_or_path': base,
      'bias': 'none',
      'fan_in_fan_out': False,
      'inference_mode': True,
      'init_lora_weights': True,
      'lora_alpha': int(alpha) if alpha == int(alpha) else alpha,
      'lora_dropout': 0.0,
      'modules_to_save': ['score'] if kind == 'scalar' else None,
      'peft_type': 'LORA',
      'r': config.lora.rank,
      'target_modules': sorted(
          _theirs(config, kernel) for kernel in config.lora.targets
      ),
      'task_type': _TASKS[kind],
      'use_dora': False,
      'use_rslora': False,
  }
  path.write_text(json.dumps(content, indent=2) + '\n')


def read_base(folder: str | os.PathLike[str]) -> str:
  """The folder or hub id that the adapters of a folder belong to."""
  return _read_config(folder)['base_model_name_or_path']


def rename_base(folder: pathlib.Path, base: str) -> None:
  """Writes another folder or hub id as that which the adapters belong to."""
  content = _read_config(folder) | {'base_model_name_or_path': base}
  (folder / CONFIG).write_text(json.dumps(content, indent=2) + '\n')


def _read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
  return json.loads((pathlib.Path(folder) / CONFIG).read_text())


def load(
    folder: str | os.PathLike[str],
    config: GemmaConfig,
    kind: str,
    params: Params,
) -> tuple[GemmaConfig, Params]:
  """A model with the adapters of a folder that `save` wrote.

  Args:
    folder: local.
    config: the shape of the base, without `lora`.
    kind: 'policy' or 'scalar'.
    params: of the base; those of a scalar model may lack the head.

  Returns:
    The shape with `lora`, and the parameters; those of the base are shared.

  Raises:
    DamagedError: if a file does not fit the manifest of the folder.
  """
  manifest.verify(folder)
  theirs = _read_config(folder)
  targets = [
      k for k in KERNELS if _theirs(config, k) in theirs['target_modules']
  ]
  adapters = Lora(theirs['r'], theirs['lora_alpha'], tuple(targets))
  config = dataclasses.replace(config, lora=adapters)
  shapes = lora.flatten(abstract_params(kind, config))
  tensors = load_file(pathlib.Path(folder) / TENSORS)
  host: dict[str, np.ndarray] = {}
  for factor in _factors(kind, config):
    like = shapes[factor.path]
    out = host.setdefault(factor.path, np.empty(like.shape, np.float32))
    where = ... if factor.layer is None else factor.layer
    x = tensors[factor.name]
    out[where] = to_ours(x, factor.inputs, out[where].shape)
  read = {path: jnp.asarray(x) for path, x in host.items()}
  return config, lora.join(params, lora.unflatten(read))
