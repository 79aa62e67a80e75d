"""Set-ups of a config: other layouts, other passes."""

from collections.abc import Iterator
import copy
import functools
import itertools
import operator
from typing import Any

from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.config_fields import FIELDS
from ma_rlhf_jax.parallel.mesh import mesh_shape
from ma_rlhf_jax.planning import estimate
from ma_rlhf_jax.planning.planner import Planner, problems, whole

# What may change without changing what is learned; of options that the config
# does not have nothing is tried. () = all choices that the field has.
LAYOUTS: dict[str, tuple[Any, ...]] = {
    'mesh.tensor': (1, 2, 4, 8),
    'model.remat': ('full', 'dots', 'none'),
}
# Field that decides on the passes of a program.
KNOBS = {
    'sft': 'sft.micro_batch_size',
    'reward_model': 'reward_model.micro_batch_size',
    'ppo': 'ppo.micro_batch_size',
}


def changed(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
  """A copy with other values, by field."""
  made = copy.deepcopy(config)
  _set(made, values)
  return made


def _set(config: ConfigDict, values: dict[str, Any]) -> None:
  for name, value in values.items():
    *blocks, field = name.split('.')
    functools.reduce(operator.getitem, blocks, config)[field] = value


def choices(flat: dict[str, Any], space: dict[str, Any]) -> list[list[tuple]]:
  """(field, value) pairs of every field that the config has."""
  options = []
  for field, values in space.items():
    if field in flat:
      values = values or FIELDS[field].choices
      values = [v for v in values if v != 'auto']
      options.append(
          [(field, v) for v in dict.fromkeys([flat[field], *values])]
      )
  return options


def layouts(
    config: ConfigDict, planner: Planner, space: dict[str, Any]
) -> Iterator[ConfigDict]:
  """Configs that differ in layout; all are valid with small passes."""
  flat = config_lib.flatten(config)
  for values in itertools.product(*choices(flat, space)):
    made = dict(values)
    if 'mesh.tensor' in made and planner.topology.num_devices > 1:
      # All others share weights and rows.
      made |= {'mesh.data': 1, 'mesh.fsdp': -1}
    made = changed(config, made)
    try:
      shape = mesh_shape(made.mesh, planner.topology.num_devices)
    except ValueError:
      continue
    if not problems(with_rows(made, shape[0] * shape[1], 1), planner.topology):
      yield made


def knob(program: str) -> str:
  """The field that decides on a program's passes; '' = it has none."""
  if program == 'ppo/reshard':
    return ''
  if estimate.is_decode(program):
    return 'rollout.batch_size'
  return KNOBS[program.partition('/')[0]]


def with_rows(config: ConfigDict, devices: int, rows: int) -> ConfigDict:
  """`config` with passes of so many rows a device, where there are as many."""
  values = {}
  for field in (*KNOBS.values(), 'rollout.batch_size'):
    size = min(whole(config, field), devices * rows)
    values[field] = size
  return changed(config, values)


def halve(config: ConfigDict, field: str, devices: int) -> bool:
  """Halves the rows of a pass in place, if that can be; whether it could."""
  if not field:
    return False
  block, name = field.split('.')
  size = (config[block][name] or whole(config, field)) // 2
  if size < devices or size % devices or whole(config, field) % size:
    return False
  config[block][name] = size
  return True
