"""Where the models and the tokenizer of a run come from.

A stage reads what another one made, a Hugging Face folder, as it would read any
other folder.
"""

import pathlib

from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.objective.targets import BASELINES
from ma_rlhf_jax.scorers import functions
from ma_rlhf_jax.training import products
from ma_rlhf_jax.training.products import Source, product

# Use -> the fields that may name its model, the first that is set, and the role
# in which it serves there.
_POLICY = (('ppo.policy_init', 'policy'), ('ppo.from', 'policy'))
_REWARD_MODEL = (
    ('ppo.reward_model', 'reward model'),
    ('ppo.from', 'reward model'),
)
_FIELDS: dict[str, tuple[tuple[str, str], ...]] = {
    'sft': (('sft.init', 'policy'),),
    'reward_model': (('reward_model.init', 'policy'), *_POLICY),
    'ppo': _POLICY,
    'score': _REWARD_MODEL,
    'critic': (('ppo.critic_init', 'critic'), *_REWARD_MODEL),
    'tokenizer': (
        ('tokenizer.path', 'tokenizer'),
        ('sft.init', 'policy'),
        *_POLICY,
        *_REWARD_MODEL,
        ('reward_model.init', 'policy'),
        ('ppo.critic_init', 'critic'),
    ),
}
# Every field that may name a model, as the config spells it.
MODEL_FIELDS = tuple(
    dict.fromkeys(
        field.replace('ppo.from', 'ppo.from_run')
        for named in _FIELDS.values()
        for field, role in named
        if role != 'tokenizer'
    )
)
# Use -> the stage of this run whose product serves where no field is set.
OWN = {
    'reward_model': 'sft',
    'ppo': 'sft',
    'score': 'reward_model',
    'critic': 'reward_model',
}
# Stage -> the use that a given model makes it unnecessary for.
_TRAINED_FOR = {'sft': 'ppo', 'reward_model': 'score'}
# What `ppo.from` takes over of another run, in each role.
_TAKEN_OVER = {'policy': 'sft', 'reward model': 'reward_model'}


def _value(config: ConfigDict, field: str) -> str:
  block, name = field.replace('ppo.from', 'ppo.from_run').split('.')
  return config[block][name]


def _named(config: ConfigDict, field: str, role: str) -> Source | None:
  """The model that a field names; None where it is empty."""
  value = _value(config, field)
  stage = _TAKEN_OVER[role] if field == 'ppo.from' else ''
  return products.locate(field, value, role, stage) if value else None


def named_source(config: ConfigDict, use: str) -> Source | None:
  """The model that a field names for a use; None where none does.

  Args:
    config: of the run.
    use: what it is for: the stage that starts from it ('sft', 'reward_model',
      'ppo', 'critic'), 'score' or 'tokenizer'.

  Raises:
    SourceError: where the first field that is set names nothing.
  """
  found = (_named(config, *entry) for entry in _FIELDS[use])
  return next(filter(None, found), None)


def source(
    config: ConfigDict, workdir: epath.PathLike, use: str
) -> Source | None:
  """The model for a use: what a field names, or the product of this run.

  The critic starts from the SFT policy, with a new head, where `config.reward`
  has no reward model. SFT starts from None, random weights, by default.
  """
  if use == 'critic' and starts_from_policy(config):
    use = 'ppo'
  named = named_source(config, use)
  own = OWN.get(use)
  return Source('', product(workdir, own)) if own and not named else named


def starts_from_policy(config: ConfigDict) -> bool:
  """Whether the critic starts from a policy, so that it needs a head."""
  return not functions.has_model(config) and not config.ppo.critic_init


def base(config: ConfigDict, workdir: epath.PathLike, stage: str) -> str:
  """What the model of a stage starts from; '' = random weights.

  Args:
    config: of the run.
    workdir: of the run.
    stage: 'sft', 'reward_model', 'ppo' or 'critic'.

  Returns:
    A hub id, a gs:// path or the absolute path of a folder.
  """
  if not (found := source(config, workdir, stage)):
    return ''
  folder = pathlib.Path(found.path)
  return str(folder.resolve()) if folder.is_dir() else found.path


def of_stage(
    config: ConfigDict, workdir: epath.PathLike, stage: str
) -> dict[str, Source]:
  """Role -> source, of the models that 'sft', 'reward_model' or 'ppo' loads."""
  uses = {'policy': stage}
  if stage == 'ppo':
    uses = {'reference policy': 'ppo'}
    if functions.has_model(config):
      uses['reward model'] = 'score'
    if BASELINES[config.ppo.baseline].has_critic:
      uses['critic'] = 'critic'
  found = {role: source(config, workdir, use) for role, use in uses.items()}
  return {role: model for role, model in found.items() if model}


def given_stages(config: ConfigDict, workdir: epath.PathLike) -> dict[str, str]:
  """Stages that need not run because their product is given: name -> why."""
  given = {}
  if not functions.has_model(config):
    given['reward_model'] = f'reward={config.reward} asks none'
  for stage, use in _TRAINED_FOR.items():
    found = source(config, workdir, use)
    if found.field and stage not in given:
      given[stage] = f'{found.field} gives {found.path}'
  return given


def named_stages(config: ConfigDict) -> list[str]:
  """Stages whose product a field names or `config.reward` does not ask for."""
  named = [
      stage
      for stage, use in _TRAINED_FOR.items()
      if any(_value(config, field) for field, _ in _FIELDS[use])
  ]
  return named if functions.has_model(config) else [*named, 'reward_model']


def stages_to_train(config: ConfigDict, workdir: epath.PathLike) -> list[str]:
  """The stages of the config that are neither given nor done."""
  given = given_stages(config, workdir)
  return [
      stage
      for stage in config.stages
      if stage not in given and workdir_lib.read_done(workdir, stage) is None
  ]


def named_models(config: ConfigDict) -> list[tuple[Source, str]]:
  """The models that the config names, and the kind each is used as."""
  uses = {'sft': 'policy', 'reward_model': 'policy', 'ppo': 'policy'}
  if functions.has_model(config):
    uses['score'] = 'scalar'
  has_critic = BASELINES[config.ppo.baseline].has_critic
  if has_critic and not starts_from_policy(config):
    uses['critic'] = 'scalar'
  found = [(named_source(config, use), kind) for use, kind in uses.items()]
  return list(dict.fromkeys((s, kind) for s, kind in found if s))


def describe(config: ConfigDict) -> list[str]:
  """One line for each model and tokenizer that the config names."""
  found = [model for model, _ in named_models(config)]
  if config.tokenizer.path:
    found.append(named_source(config, 'tokenizer'))
  return [model.describe() for model in found]
