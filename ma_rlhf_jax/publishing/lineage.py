"""Where the weights and the rows of a run come from, as others know them."""

import pathlib
import re

from ml_collections import ConfigDict

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.models.presets import PRESETS, SHAPE_FIELDS, GemmaConfig

_HUB_ID = re.compile(r'[\w.-]+/[\w.-]+')
_SNAPSHOT = re.compile(r'/models--([\w.-]+?)--([\w.-]+)/snapshots/\w+/?$')
# What stands for a base that has no public name.
NO_NAME = 'PATH_OF_THE_BASE'
_FILES = ('.json', '.jsonl', '.gz', '.parquet')
# Rows of the embedding do not tell models apart: tokens may have been added.
_FIELDS = [name for name in SHAPE_FIELDS if name != 'vocab_size']


def is_hub_id(value: str) -> bool:
  """Whether a model or data set is named by its place on the hub."""
  local = value.startswith(('.', '~')) or value.endswith(_FILES)
  if local or not _HUB_ID.fullmatch(value):
    return False
  return not pathlib.Path(value).exists()


def public_name(base: str) -> str:
  """The hub id of what adapters go on top of; '' = a folder of this machine.

  Args:
    base: a hub id, or a folder, which may be a snapshot in the hub's cache.
  """
  if is_hub_id(base):
    return base
  snapshot = _SNAPSHOT.search(base)
  return f'{snapshot[1]}/{snapshot[2]}' if snapshot else ''


def base_model(config: ConfigDict, stage: str) -> str:
  """What the weights of a stage's model go back to, across workdirs.

  Args:
    config: of the run.
    stage: 'sft', 'reward_model', 'ppo' or 'critic'.

  Returns:
    A hub id or a folder; '' = random weights.

  Raises:
    WorkdirError: if a workdir on the way has gone.
  """
  p = config.ppo
  # The field that names a start, its stage there, and the stage that is the
  # start where it is empty.
  named, there, here = {
      'sft': (config.sft.init, 'sft', ''),
      'reward_model': (config.reward_model.init, 'sft', 'ppo'),
      'ppo': (p.policy_init or p.from_run, 'sft', 'sft'),
      'critic': (
          p.critic_init or p.reward_model or p.from_run,
          'critic' if p.critic_init else 'reward_model',
          'reward_model',
      ),
  }[stage]
  if not named:
    return base_model(config, here) if here else ''
  if not workdir_lib.is_workdir(named):
    return named
  return base_model(workdir_lib.read_config(named)[1], there)


def is_gemma(base: str, shape: GemmaConfig) -> bool:
  """Whether weights derive from a published Gemma, so that its terms hold.

  Args:
    base: of `base_model`.
    shape: of the model.
  """
  if not base:
    return False
  same = lambda other: all(
      getattr(shape, name) == getattr(other, name) for name in _FIELDS
  )
  return base.startswith('google/') or any(map(same, PRESETS.values()))
