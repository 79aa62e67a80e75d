"""A run without rows, tokenizer, weights or devices, for its programs."""

import dataclasses
import functools
from typing import Any
from unittest import mock

from etils import epath
import jax
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.data.parts import Datasets
from ma_rlhf_jax.macro import host
from ma_rlhf_jax.models import presets
from ma_rlhf_jax.parallel.mesh import AXES, mesh_shape
from ma_rlhf_jax.training import automatic
from ma_rlhf_jax.training.abstract import abstract_stages
from ma_rlhf_jax.training.loop import Program, Stage
from ma_rlhf_jax.training.run import Run

# Rows to train on of the published data sets, as their recipes tell them.
ROWS = {'tldr': 92_858, 'hh': 112_052, 'webgpt': 18_599, 'apps': 5000}


@dataclasses.dataclass(frozen=True)
class _Rows:
  """So many rows of which nothing is known."""

  count: int

  def __len__(self) -> int:
    return self.count


@dataclasses.dataclass(frozen=True)
class _Tokenizer:
  """Ids that no program depends on, and a number of entries."""

  size: int
  pad_token_id: int = 0
  eos_token_id: int = 1
  bos_token_id: int = 2

  def __len__(self) -> int:
    return self.size


class _PlannedRun(Run):
  """A run whose rules of the host are not loaded."""

  def host_termination(self) -> Any:
    return object() if self.config.macro.termination in host.NAMES else None


def num_rows(config: ConfigDict) -> int | None:
  """Rows to train on, where they are known without reading them."""
  d = config.data
  known = d.synthetic_rows if d.task == 'synthetic' else ROWS.get(d.task)
  return min(known, d.max_rows) if known and d.max_rows else known


def with_preset(config: ConfigDict) -> ConfigDict:
  """`config` with the shape that its model's name stands for.

  Raises:
    ValueError: if neither `model.preset` nor the name tells the shape.
  """
  name = config.sft.init.rstrip('/').rpartition('/')[2]
  if config.model.preset or not config.sft.init:
    return config
  name = name.removesuffix('-it') if name not in presets.PRESETS else name
  if name not in presets.PRESETS:
    raise ValueError(
        f'sft.init={config.sft.init!r} is not opened; name its shape by '
        f'--config.model.preset, one of {", ".join(presets.PRESETS)}'
    )
  made = config_lib.restore(config_lib.flatten(config))
  made.model.preset = name
  return made


def mesh_over(config: ConfigDict, devices: list[Any]) -> Mesh:
  """The mesh of the config over these devices."""
  shape = mesh_shape(config.mesh, len(devices))
  types = (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(shape, AXES, devices=devices, axis_types=types)


def stages(
    config: ConfigDict, mesh: Mesh, rows: int | None
) -> dict[str, Stage]:
  """The stages of a run on that mesh; its devices need not be here.

  Args:
    config: of the run, see `with_preset`.
    mesh: of any devices.
    rows: to train on; None = unknown, counted as one million.
  """
  shares = config.data.parts
  part = lambda i: _Rows(max(1, (rows or 10**6) * shares[i] // sum(shares)))
  prompt_len, response_len = config_lib.lengths(config)
  # Lengths are not known here: every row counts as the longest.
  config = automatic.fixed(config)
  config.ppo.length_buckets = 1
  run = _PlannedRun(
      config=config,
      workdir=epath.Path('unused'),
      mesh=mesh,
      data=Datasets(part(0), part(1), part(2), _Rows(1), counts={}),
      tokenizer=_Tokenizer(config.tokenizer.vocab_size),
      prompt_len=prompt_len,
      response_len=response_len,
      gold=None,
  )
  # Under `jax.set_mesh` the scalars that optimizers start from would be
  # computed on the devices of the mesh, which are not here.
  with mock.patch.object(jax.sharding, 'get_mesh', lambda: mesh):
    return abstract_stages(run)


def traced(program: Program) -> Any:
  """`jax.stages.Traced` of a program; call it under `jax.set_mesh`."""
  function, args, kwargs = program.function, program.args, {}
  while isinstance(function, functools.partial):
    kwargs = {**function.keywords, **kwargs}
    args = (*function.args, *args)
    function = function.func
  return function.trace(*args, **kwargs)
