"""Where the weights and the rows of a run come from, as others know them."""

import pathlib
import re

from ml_collections import ConfigDict

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.models.presets import PRESETS, SHAPE_FIELDS, GemmaConfig
from ma_rlhf_jax.training import sources

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
  if source := sources.named_source(config, stage):
    if not source.workdir:
      return source.path
    there = workdir_lib.read_config(source.workdir)[1]
    return base_model(there, source.stage)
  return base_model(config, sources.OWN[stage]) if stage != 'sft' else ''


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
