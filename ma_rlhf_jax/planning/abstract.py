"""The programs of a run without rows, tokenizer, weights or devices."""

import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.models import heads, lora, presets
from ma_rlhf_jax.objective.targets import BASELINES
from ma_rlhf_jax.parallel.mesh import AXES, mesh_shape
from ma_rlhf_jax.ppo import programs as ppo
from ma_rlhf_jax.scorers import functions
from ma_rlhf_jax.structs import Models, Params
from ma_rlhf_jax.training import automatic, model_configs, reward_model, sft
from ma_rlhf_jax.training.spec import Program, Spec

# As `data.parts` shares the rows.
_STAGES = ('sft', 'reward_model', 'ppo')
# Rows to train on of the published data sets, as their recipes tell them.
ROWS = {'tldr': 92_858, 'hh': 112_052, 'webgpt': 18_599, 'apps': 5000}


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


def _learning(
    kind: str, config: presets.GemmaConfig, frozen: Params | None, mesh: Mesh
) -> tuple[presets.GemmaConfig, Params]:
  """A model that learns; its adapters share the weights of `frozen`."""
  params = heads.abstract_params(kind, config, mesh)
  if config.lora is not None and frozen is not None:
    _, adapters = lora.split(config, params)
    params = lora.join(frozen, adapters)
  return config, params


def _ppo(
    spec: Spec,
    learns: presets.GemmaConfig,
    frozen: presets.GemmaConfig,
    num_steps: int,
) -> ppo.Programs:
  c = spec.config
  ref_policy, scorer = (
      (frozen, heads.abstract_params(kind, frozen, spec.mesh))
      for kind in ('policy', 'scalar')
  )
  critic = (None, None)
  if not functions.has_model(c):
    scorer = (None, None)
  if BASELINES[c.ppo.baseline].has_critic:
    apart = c.ppo.critic_init or not functions.has_model(c)
    shared = None if apart else scorer[1]
    critic = _learning('scalar', learns, shared, spec.mesh)
  models = Models(
      policy=_learning('policy', learns, ref_policy[1], spec.mesh),
      ref_policy=ref_policy,
      critic=critic,
      reward_model=scorer,
  )
  configs, params = zip(*models, strict=True)
  return ppo.Programs(spec, Models(*configs), Models(*params), num_steps)


class Planned(NamedTuple):
  """A stage without rows and weights.

  Attributes:
    programs: of `sft`, `reward_model` or `ppo.programs`.
    num_steps: updates in all.
  """

  programs: Any
  num_steps: int


def programs_of(
    spec: Spec, vocab_size: int, num_rows: dict[str, int]
) -> dict[str, Planned]:
  """The programs of each stage of a config, of abstract parameters.

  All models have the shape of `config.model`.

  Args:
    spec: of the run; its devices need not be here.
    vocab_size: entries of the tokenizer.
    num_rows: to train on, by stage.
  """
  config = spec.config
  shape = presets.from_config(config.model, vocab_size)
  learns = model_configs.trained(shape, config)
  frozen = model_configs.frozen(shape, config.model)
  start = (
      learns
      if config.sft.init
      else model_configs.trained_whole(shape, config.model)
  )
  params = functools.partial(heads.abstract_params, mesh=spec.mesh)
  makers = {
      'sft': lambda n: sft.Programs(spec, start, params('policy', start), n),
      'reward_model': lambda n: reward_model.Programs(
          spec, learns, params('scalar', learns), n
      ),
      'ppo': lambda n: _ppo(spec, learns, frozen, n),
  }
  planned = {}
  for name, make in makers.items():
    if name in config.stages:
      steps = config_lib.num_steps(config[name], num_rows[name])
      planned[name] = Planned(make(steps), steps)
  return planned


def stages(
    config: ConfigDict, mesh: Mesh, rows: int | None
) -> dict[str, Planned]:
  """The stages of a run on that mesh; its devices need not be here.

  Args:
    config: of the run, see `with_preset`.
    mesh: of any devices.
    rows: to train on; None = unknown, counted as one million.
  """
  shares = config.data.parts
  prompt_len, response_len = config_lib.lengths(config)
  # Lengths are not known here: every row counts as the longest.
  config = automatic.fixed(config)
  config.ppo.length_buckets = 1
  # No program depends on the ids.
  spec = Spec(config, mesh, prompt_len, response_len, pad_id=0, eos_id=1)
  num_rows = {
      name: max(1, (rows or 10**6) * share // sum(shares))
      for name, share in zip(_STAGES, shares, strict=True)
  }
  return programs_of(spec, config.tokenizer.vocab_size, num_rows)


def traced(program: Program) -> Any:
  """`jax.stages.Traced` of a program; call it under `jax.set_mesh`."""
  function, args, kwargs = program.function, program.args, {}
  while isinstance(function, functools.partial):
    kwargs = {**function.keywords, **kwargs}
    args = (*function.args, *args)
    function = function.func
  return function.trace(*args, **kwargs)
