"""The config of a run: its defaults, its recipe arguments, its flat form.

A recipe is a file with

    from ma_rlhf_jax.config import apply_arguments, base

    def get_config(arguments: str = ''):
      config = base()
      config.ppo.kl_coef = 0.1
      return apply_arguments(config, arguments)

`config_fields` lists every field, and `--config.help` prints them. What may
stand in them is checked by `validation`.
"""

import hashlib
import json
import pathlib
from typing import Any

import ml_collections
from ml_collections import ConfigDict

from ma_rlhf_jax import switches
from ma_rlhf_jax.arguments import ArgumentError
from ma_rlhf_jax.config_fields import FIELDS

# Field -> its value that reads hidden states of padding. Kernels differ there,
# so that these losses are always computed with plain attention.
LOSSES_ON_PADDING = {
    'sft.loss_on': 'everything',
    'reward_model.loss': 'authors',
}


def base() -> ConfigDict:
  """A config of all `config_fields`; recipes change what differs."""
  made = {}
  for name, field in FIELDS.items():
    *blocks, own = name.split('.')
    block = made
    for inner in blocks:
      block = block.setdefault(inner, {})
    block[own] = field.default
  return ConfigDict(made).lock()


def published(init: str, preset: str) -> ConfigDict:
  """What the runs behind the published checkpoints have in common.

  Args:
    init: hub id of the model that SFT starts from.
    preset: its shape, a key of `models.presets.PRESETS`.

  Returns:
    `base()` in bfloat16 with 512 + 512 tokens, the paper's sampling, all
    weights sharded over all chips, and the authors' schedules in updates.
  """
  c = base()
  c.sft.init, c.model.preset = init, preset
  c.model.dtype = 'bfloat16'
  c.data.max_prompt_len = c.data.max_response_len = 512
  c.mesh.data, c.mesh.fsdp = 1, -1
  c.rollout.temperature, c.rollout.top_k = 0.8, 50
  c.ppo.one_pass = 'policy'  # one gradient tree at a time
  c.evaluate.prompts, c.evaluate.temperature = 2000, 0.8
  for optim in (c.ppo.optim, c.critic.optim):
    optim.schedule = 'linear'  # each recipe has a warm-up of its own
  return c


# What follows the colon in --config=recipe.py:word,name=value. Words are the
# variants, controls and set-ups of `switches`.
ARGUMENTS = {
    'ngram': ('macro.ngram', int),
    'seed': ('seed', int),
    'termination': ('macro.termination', str),
}


def _field_and_value(item: str) -> tuple[str, Any]:
  """What `name=value` sets, and to what."""
  name, _, text = item.partition('=')
  if name not in ARGUMENTS:
    raise ArgumentError(
        f'recipe argument {name!r} is unknown; known are '
        f'{", ".join(sorted(ARGUMENTS))}, as in --config=recipe.py:ngram=5, '
        f'and the words {", ".join(switches.WORDS)}'
    )
  field, parse = ARGUMENTS[name]
  try:
    return field, parse(text)
  except ValueError:
    raise ArgumentError(
        f'recipe argument {item!r}: {text!r} is not of type '
        f'{parse.__name__}; write for example {name}=5'
    ) from None


def apply_arguments(config: ConfigDict, arguments: str | None) -> ConfigDict:
  """`config` after the recipe arguments `word,name=value`.

  Variants and values are set in their order, then controls and set-ups, which
  are worked out from them.

  Args:
    config: what `base()` and the recipe made.
    arguments: the text after the colon of --config; may be empty.

  Raises:
    ArgumentError: on an unknown name, a value of the wrong type, or where two
      of them contradict each other.
  """
  controls, given, variant = [], {}, ''
  for item in filter(None, (arguments or '').split(',')):
    if item in switches.VARIANTS:
      if variant not in ('', item):
        raise ArgumentError(
            f'{variant} and {item} are two variants, each with values for the '
            'same fields; leave one of them out'
        )
      switches.select_variant(config, item)
      variant = item
      continue
    if item in switches.WORDS:
      controls.append(item)
      continue
    field, value = _field_and_value(item)
    if given.setdefault(field, (item, value))[1] != value:
      raise ArgumentError(
          f'{given[field][0]} and {item} contradict each other; leave one of '
          'them out'
      )
    config.update_from_flattened_dict({field: value})
  switches.select_controls(config, controls, given)
  return config


def default_recipe() -> str:
  """configs/tiny.py of the checkout, or its copy in an installed package."""
  package = pathlib.Path(__file__).parent
  for folder in (package.parent / 'configs', package / 'configs'):
    if (folder / 'tiny.py').is_file():
      return str(folder / 'tiny.py')
  return 'configs/tiny.py'


def flatten(config: ConfigDict) -> dict[str, Any]:
  """`{'ppo.kl_coef': 0.05, ...}` in a fixed order, tuples as lists."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      flat.update({f'{name}.{k}': v for k, v in flatten(value).items()})
    else:
      flat[name] = list(value) if isinstance(value, (tuple, list)) else value
  return dict(sorted(flat.items()))


def restore(flat: dict[str, Any]) -> ConfigDict:
  """The config of which `flat` is the `flatten`."""
  config = base()
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()}
  config.update_from_flattened_dict(values)
  return config


def fingerprint(config: ConfigDict) -> str:
  """SHA-256 (hex) of the resolved config."""
  return hashlib.sha256(json.dumps(flatten(config)).encode()).hexdigest()


def differences(stored: dict[str, Any], config: ConfigDict) -> list[str]:
  """Fields, not marked resumable, in which `config` differs from `stored`.

  Args:
    stored: `flatten` of the config that a workdir was started with.
    config: the config of this start.

  Returns:
    One line a field: its name, the stored value and the new one.
  """
  now = flatten(config)
  # A field that is newer than the run has had its default all along.
  stored = flatten(base()) | stored
  return [
      f'{name}: stored {stored.get(name)!r}, now {now.get(name)!r}'
      for name in sorted(stored.keys() | now.keys())
      if stored.get(name) != now.get(name)
      and not (name in FIELDS and FIELDS[name].resumable)
  ]


def num_steps(stage: ConfigDict, num_rows: int) -> int:
  """Updates of a stage: `steps`, or as many as `epochs` gives; at least 1."""
  if stage.steps:
    return stage.steps
  return max(1, int(stage.epochs * num_rows) // stage.batch_size)


# Prompt and response limits (tokens) of each task where the config gives 0:
# enough for most rows under a small tokenizer. The paper's are 512 and 512.
TASK_LENGTHS = {
    'synthetic': (24, 16),
    'hh': (320, 160),
    'columns': (320, 160),
    'tldr': (512, 512),
    'webgpt': (512, 512),
    'apps': (600, 512),
}


def lengths(config: ConfigDict) -> tuple[int, int]:
  """(prompt columns P, response columns T) in tokens."""
  prompt, response = TASK_LENGTHS[config.data.task]
  return (
      config.data.max_prompt_len or prompt,
      config.data.max_response_len or response,
  )
