"""Where the models of a stage come from, how they are checked and loaded.

A stage reads what another one made, a Hugging Face folder, as it would read any
other folder.
"""

from collections.abc import Callable
import functools
import pathlib
from typing import TypeVar

from etils import epath
import jax
from ml_collections import ConfigDict

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import heads, huggingface, kernels, lora, presets
from ma_rlhf_jax.objective.targets import BASELINES
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.scorers import functions
from ma_rlhf_jax.structs import Params
from ma_rlhf_jax.training import model_configs, products
from ma_rlhf_jax.training.products import (
    Source,
    SourceError,
    product,
)
from ma_rlhf_jax.training.run import Run, Setup

T = TypeVar('T')


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
# What `ppo.from` takes over of another run, in each role.
_TAKEN_OVER = {'policy': 'sft', 'reward model': 'reward_model'}


def _named(config: ConfigDict, field: str, role: str) -> Source | None:
  """The model that a field names; None where it is empty."""
  if field == 'ppo.from':
    value = config.ppo.from_run
    stage = _TAKEN_OVER[role]
  else:
    block, name = field.split('.')
    value, stage = config[block][name], ''
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
  return next((source for source in found if source), None)


def _source(config: ConfigDict, workdir: epath.PathLike, use: str) -> Source:
  own = Source('', product(workdir, OWN[use]))
  return named_source(config, use) or own


def policy_source(config: ConfigDict, workdir: epath.PathLike) -> Source:
  """The SFT policy: where PPO and the reward model start."""
  return _source(config, workdir, 'ppo')


def reward_model_source(config: ConfigDict, workdir: epath.PathLike) -> Source:
  """The reward model of PPO."""
  return _source(config, workdir, 'score')


def critic_source(config: ConfigDict, workdir: epath.PathLike) -> Source:
  """Where the critic starts: what is named, the reward model, or the policy.

  The SFT policy, with a new head, where `config.reward` has no reward model.
  """
  if starts_from_policy(config):
    return policy_source(config, workdir)
  return _source(config, workdir, 'critic')


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
  if stage == 'critic':
    path = critic_source(config, workdir).path
  elif stage != 'sft':
    path = _source(config, workdir, stage).path
  elif source := named_source(config, 'sft'):
    path = source.path
  else:
    return ''
  folder = pathlib.Path(path)
  return str(folder.resolve()) if folder.is_dir() else path


def of_stage(
    config: ConfigDict, workdir: epath.PathLike, stage: str
) -> dict[str, Source]:
  """Role -> source, of the models that 'sft', 'reward_model' or 'ppo' loads."""
  if stage == 'ppo':
    found = {'reference policy': policy_source(config, workdir)}
    if functions.has_model(config):
      found['reward model'] = reward_model_source(config, workdir)
    if BASELINES[config.ppo.baseline].has_critic:
      found['critic'] = critic_source(config, workdir)
    return found
  if stage == 'sft':
    source = named_source(config, 'sft')
    return {'policy': source} if source else {}
  return {'policy': _source(config, workdir, stage)}


def given_stages(config: ConfigDict, workdir: epath.PathLike) -> dict[str, str]:
  """Stages that need not run because their product is given: name -> why."""
  given = {}
  if not functions.has_model(config):
    given['reward_model'] = f'reward={config.reward} asks none'
  for stage, source in (
      ('sft', policy_source(config, workdir)),
      ('reward_model', reward_model_source(config, workdir)),
  ):
    if source.field and stage not in given:
      given[stage] = f'{source.field} gives {source.path}'
  return given


def stages_to_train(config: ConfigDict, workdir: epath.PathLike) -> list[str]:
  """The stages of the config that are neither given nor done."""
  given = given_stages(config, workdir)
  return [
      stage
      for stage in config.stages
      if stage not in given and workdir_lib.read_done(workdir, stage) is None
  ]


def tokenizer_source(config: ConfigDict) -> Source | None:
  """The folder or id whose tokenizer the run uses; None = train one."""
  return named_source(config, 'tokenizer')


def _check_tokenizer(run: Setup, source: Source, folder: epath.Path) -> None:
  """The folder's tokenizer, where it has one, must be the run's."""
  if not (folder / 'tokenizer_config.json').exists():
    return
  theirs = tokenizer_lib.load_tokenizer(str(folder))
  same = tokenizer_lib.fingerprint(theirs) == tokenizer_lib.fingerprint(
      run.tokenizer
  )
  if not same:
    raise SourceError(
        f'{source.field or "this run"}: the tokenizer in {folder} differs from '
        f'the one of this run ({run.tokenizer.name_or_path}); set '
        'tokenizer.path to the tokenizer that all models share'
    )


def _named_models(config: ConfigDict) -> list[tuple[Source, str]]:
  """The models that the config names, and the kind each is used as."""
  uses = [
      ('sft', 'policy'),
      ('reward_model', 'policy'),
      ('ppo', 'policy'),
  ]
  if functions.has_model(config):
    uses.append(('score', 'scalar'))
  if BASELINES[config.ppo.baseline].has_critic and not starts_from_policy(
      config
  ):
    uses.append(('critic', 'scalar'))
  found = [(named_source(config, use), kind) for use, kind in uses]
  return list(dict.fromkeys((s, kind) for s, kind in found if s))


def describe(config: ConfigDict) -> list[str]:
  """One line for each model and tokenizer that the config names."""
  found = [source for source, _ in _named_models(config)]
  if config.tokenizer.path:
    found.append(tokenizer_source(config))
  return [source.describe() for source in found]


def check_shapes(config: ConfigDict) -> None:
  """Raises where the config.json of a named model cannot be used.

  It needs no tokenizer, no rows and no devices; fetches models of the hub.

  Raises:
    SourceError: with the field, the value and the reason.
  """
  for source, _ in _named_models(config):
    read(source, huggingface.read_shape)


def check(run: Setup) -> None:
  """Raises where a model does not fit the run; fetches those of the hub.

  Names, shapes and dtypes of all tensors are compared, no weight is read.

  Raises:
    SourceError: with the field, the value and the reason.
  """
  for source, kind in _named_models(run.config):
    shape = inspect(run, source, kind)
    check_tensors = functools.partial(
        huggingface.check_params, config=shape, kind=kind
    )
    read(source, check_tensors)
  if not run.config.sft.init:
    shape = presets.from_config(run.config.model, len(run.tokenizer))
    _check_fit(run, Source('config.model', ''), shape, 'scalar')


@functools.cache
def _note(text: str) -> None:
  """Prints `text` once, however often a model is inspected."""
  if jax.process_index() == 0:
    print(text, flush=True)


def _check_fit(
    run: Setup, source: Source, shape: presets.GemmaConfig, kind: str
) -> None:
  """The embedding must hold the tokenizer, the mesh must split the weights."""
  where = ' '.join(filter(None, [source.field or 'this run', source.path]))
  if shape.vocab_size < len(run.tokenizer):
    raise SourceError(
        f'{where}: the embedding has {shape.vocab_size} rows, fewer than the '
        f'{len(run.tokenizer)} entries of the tokenizer; use the tokenizer '
        'that belongs to the model, or set model.vocab_size to 0 for a new one'
    )
  if source.field and shape.vocab_size > len(run.tokenizer):
    _note(
        f'note: {where}: the embedding has {shape.vocab_size} rows for the '
        f'{len(run.tokenizer)} entries of the tokenizer; the rows beyond are '
        'loaded and exported with the others'
    )
  with jax.set_mesh(run.mesh):
    uneven = partition.indivisible(heads.abstract_params(kind, shape))
    reason = kernels.refusal(shape.attention, shape, partition.machine())
  if reason:
    raise SourceError(
        f"{where}: model.attention={shape.attention!r}: {reason}; use 'auto'"
    )
  if uneven:
    raise SourceError(
        f'{where}: the mesh {dict(run.mesh.shape)} does not split evenly '
        f'{"; ".join(uneven)}; set config.mesh.fsdp and .tensor to divisors, '
        'or model.vocab_size to a multiple'
    )


def read(source: Source, use: Callable[[pathlib.Path], T]) -> T:
  """`use(folder)` of a source; what goes wrong names the field."""
  try:
    return use(huggingface.resolve(source.path))
  except (ValueError, OSError) as error:
    raise SourceError(
        f'{source.field or "a model of this run"}={source.path}: {error}'
    ) from error


def inspect(run: Setup, source: Source, kind: str) -> presets.GemmaConfig:
  """The shape of a source, once tokenizer, embedding and mesh fit the run.

  It is that of a model that does not learn.
  """
  folder = read(source, lambda folder: folder)
  _check_tokenizer(run, source, epath.Path(folder))
  shape = model_configs.frozen(
      read(source, huggingface.read_shape), run.config.model
  )
  _check_fit(run, source, shape, kind)
  _check_shape(run, source, shape)
  return shape


Loaded = tuple[presets.GemmaConfig, Params]


def _load_params(
    source: Source, shape: presets.GemmaConfig, kind: str
) -> Params:
  return read(source, lambda f: huggingface.load_params(f, shape, kind))


def load(run: Run, source: Source, kind: str) -> Loaded:
  """Shape and parameters of a model that does not learn, checked.

  Args:
    run: what the stages share.
    source: where the model is.
    kind: 'policy' or 'scalar'.
  """
  shape = inspect(run, source, kind)
  return shape, _load_params(source, shape, kind)


def load_to_train(
    run: Run,
    source: Source,
    kind: str,
    role: str,
    frozen: Loaded | None = None,
) -> Loaded:
  """Shape and parameters of a model that learns, with adapters if it has any.

  Args:
    run: what the stages share.
    source: where the model is.
    kind: 'policy' or 'scalar'.
    role: 'sft', 'reward_model', 'policy' or 'critic'; seeds its adapters.
    frozen: the same source loaded by `load`, which adapters share.
  """
  if not run.config.lora.rank:
    shape = model_configs.trained(inspect(run, source, kind), run.config)
    return shape, _load_params(source, shape, kind)
  shape, params = frozen or load(run, source, kind)
  shape = model_configs.trained(shape, run.config)
  key = run.spec.key(f'adapters_{role}')
  return shape, lora.add_adapters(kind, shape, params, key)


def _check_shape(
    run: Setup, source: Source, shape: presets.GemmaConfig
) -> None:
  """A run that is reused must have the shape that this config asks for."""
  if source.field != 'ppo.from' or run.config.sft.init:
    return
  wanted = presets.from_config(run.config.model, len(run.tokenizer))
  wrong = [
      f'{name}: {getattr(shape, name)} there, {getattr(wanted, name)} here'
      for name in presets.SHAPE_FIELDS
      if getattr(shape, name) != getattr(wanted, name)
  ]
  if wrong:
    raise SourceError(
        f'ppo.from={run.config.ppo.from_run} has a model of another shape: '
        f'{"; ".join(wrong)}; make config.model.* agree'
    )


def first_shape(
    config: ConfigDict, vocab_size: int
) -> presets.GemmaConfig | None:
  """The shape of the run's models: of the first one that a field names.

  Args:
    config: of the run.
    vocab_size: entries of the tokenizer.

  Returns:
    The shape; None where the folder holds a tokenizer alone.
  """
  for source, _ in _named_models(config):
    folder = read(source, lambda folder: folder)
    has_shape = (epath.Path(folder) / 'config.json').exists()
    return read(source, huggingface.read_shape) if has_shape else None
  return presets.from_config(config.model, vocab_size)


def initial_policy(run: Run) -> tuple[presets.GemmaConfig, Params]:
  """Where SFT starts: `sft.init`, or random weights, which all learn."""
  if source := named_source(run.config, 'sft'):
    return load_to_train(run, source, 'policy', 'sft')
  shape = presets.from_config(run.config.model, len(run.tokenizer))
  shape = model_configs.trained_whole(shape, run.config.model)
  return shape, heads.init_params('policy', shape, run.spec.key('init_sft'))


def initial_critic(
    run: Run, ref_policy: Loaded, reward_model: Loaded | None
) -> Loaded:
  """Where the critic starts, see `critic_source`; adapters share weights.

  Args:
    run: what the stages share.
    ref_policy: of PPO, as it was loaded.
    reward_model: the same; None without one.
  """
  config, workdir = run.config, run.workdir
  start = critic_source(config, workdir)
  if starts_from_policy(config):
    shape, backbone = load_to_train(run, start, 'policy', 'critic', ref_policy)
    head = heads.init_head(shape, run.spec.key('init_critic'))
    return shape, {'backbone': backbone, 'head': head}
  named = reward_model_source(config, workdir)
  same = reward_model if reward_model and start == named else None
  return load_to_train(run, start, 'scalar', 'critic', same)


def initial_reward_model(run: Run) -> tuple[presets.GemmaConfig, Params]:
  """Where the reward model starts: a policy with a new scalar head."""
  source = _source(run.config, run.workdir, 'reward_model')
  shape, backbone = load_to_train(run, source, 'policy', 'reward_model')
  head = heads.init_head(shape, run.spec.key('init_reward_model'))
  return shape, {'backbone': backbone, 'head': head}
