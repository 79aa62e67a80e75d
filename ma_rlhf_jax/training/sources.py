"""Where the models of a stage come from, and where they go.

Every product is a Hugging Face folder: what a stage trained lies in
`<workdir>/<stage>/hf` (the critic of PPO in `<workdir>/ppo/critic`), and the
next stage reads it from there as it would read any other folder.
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import TypeVar

from etils import epath
import jax
from ml_collections import ConfigDict

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import heads, huggingface, kernels, lora, presets
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.structs import Params
from ma_rlhf_jax.training.run import Run

T = TypeVar('T')


class SourceError(ValueError):
  """A model that a field names cannot be used in this run."""


@dataclasses.dataclass(frozen=True)
class Source:
  """A model that already exists, or will once its stage is done.

  Attributes:
    field: the config field that names it; '' = made by this run.
    path: its Hugging Face folder or hub id.
  """

  field: str
  path: str


def product(workdir: epath.PathLike, stage: str) -> str:
  """The folder of a stage's model in a workdir."""
  folder = 'ppo/critic' if stage == 'critic' else f'{stage}/hf'
  return str(epath.Path(workdir) / folder)


def adapter(workdir: epath.PathLike, stage: str) -> str:
  """The folder of a stage's adapters in a workdir, beside its model."""
  folder = 'ppo/critic_adapter' if stage == 'critic' else f'{stage}/adapter'
  return str(epath.Path(workdir) / folder)


def _named(field: str, value: str, stage: str) -> Source:
  """The source that `value` (folder, hub id or workdir) stands for."""
  if value.startswith('~'):
    value = str(epath.Path(value).expanduser())
  if not workdir_lib.is_workdir(value):
    return Source(field, value)
  done = workdir_lib.read_done(
      epath.Path(value), 'ppo' if stage == 'critic' else stage
  )
  if done is None:
    raise SourceError(
        f'{field}={value} is a workdir whose stage {stage!r} is not done; '
        'finish it (run its command again) or name a Hugging Face folder'
    )
  return Source(field, product(value, stage))


def policy_source(config: ConfigDict, workdir: epath.PathLike) -> Source:
  """The SFT policy: where PPO and the reward model start."""
  if config.ppo.policy_init:
    return _named('ppo.policy_init', config.ppo.policy_init, 'sft')
  if config.ppo.from_run:
    return _named('ppo.from', config.ppo.from_run, 'sft')
  return Source('', product(workdir, 'sft'))


def reward_model_source(config: ConfigDict, workdir: epath.PathLike) -> Source:
  """The reward model of PPO."""
  if config.ppo.reward_model:
    return _named('ppo.reward_model', config.ppo.reward_model, 'reward_model')
  if config.ppo.from_run:
    return _named('ppo.from', config.ppo.from_run, 'reward_model')
  return Source('', product(workdir, 'reward_model'))


def critic_source(config: ConfigDict, workdir: epath.PathLike) -> Source:
  """Where the critic starts: the reward model unless another is named."""
  if config.ppo.critic_init:
    stage = 'critic'
    return _named('ppo.critic_init', config.ppo.critic_init, stage)
  return reward_model_source(config, workdir)


def base(config: ConfigDict, workdir: epath.PathLike, stage: str) -> str:
  """What the model of a stage starts from; '' = random weights.

  Args:
    config: of the run.
    workdir: of the run.
    stage: 'sft', 'reward_model', 'ppo' or 'critic'.

  Returns:
    A hub id, a gs:// path or the absolute path of a folder.
  """
  init = {'sft': config.sft.init, 'reward_model': config.reward_model.init}
  if init.get(stage):
    path = _named(f'{stage}.init', init[stage], 'sft').path
  elif stage == 'sft':
    return ''
  elif stage == 'critic':
    path = critic_source(config, workdir).path
  else:
    path = policy_source(config, workdir).path
  folder = pathlib.Path(path)
  return str(folder.resolve()) if folder.is_dir() else path


def of_stage(
    config: ConfigDict, workdir: epath.PathLike, stage: str
) -> dict[str, Source]:
  """Role -> source, of the models that 'sft', 'reward_model' or 'ppo' loads."""
  if stage == 'ppo':
    found = {
        'reference policy': policy_source(config, workdir),
        'reward model': reward_model_source(config, workdir),
    }
    if config.ppo.baseline == 'critic':
      found['critic'] = critic_source(config, workdir)
    return found
  if config[stage].init:
    return {'policy': _named(f'{stage}.init', config[stage].init, 'sft')}
  return {} if stage == 'sft' else {'policy': policy_source(config, workdir)}


def given_stages(config: ConfigDict, workdir: epath.PathLike) -> dict[str, str]:
  """Stages that need not run because their product is given: name -> why."""
  given = {}
  for stage, source in (
      ('sft', policy_source(config, workdir)),
      ('reward_model', reward_model_source(config, workdir)),
  ):
    if source.field:
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


def tokenizer_path(config: ConfigDict) -> str:
  """The folder or id whose tokenizer the run uses; '' = train one."""
  if config.tokenizer.path:
    return config.tokenizer.path
  for field, value, stage in (
      ('sft.init', config.sft.init, 'sft'),
      ('ppo.policy_init', config.ppo.policy_init, 'sft'),
      ('ppo.from', config.ppo.from_run, 'sft'),
      ('ppo.reward_model', config.ppo.reward_model, 'reward_model'),
      ('reward_model.init', config.reward_model.init, 'sft'),
  ):
    if value:
      return _named(field, value, stage).path
  return ''


def _check_tokenizer(run: Run, source: Source, folder: epath.Path) -> None:
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


def _named_sources(
    config: ConfigDict, workdir: epath.PathLike
) -> list[tuple[Source, str]]:
  """The models that the config names, and the kind each is used as."""
  starts = (
      ('sft.init', config.sft.init),
      ('reward_model.init', config.reward_model.init),
  )
  named = [(_named(f, v, 'sft'), 'policy') for f, v in starts if v]
  named.append((policy_source(config, workdir), 'policy'))
  named.append((reward_model_source(config, workdir), 'scalar'))
  if config.ppo.baseline == 'critic':
    named.append((critic_source(config, workdir), 'scalar'))
  return [(source, kind) for source, kind in named if source.field]


def check(run: Run) -> None:
  """Raises where a model does not fit the run; fetches those of the hub.

  Names, shapes and dtypes of all tensors are compared, no weight is read.

  Raises:
    SourceError: with the field, the value and the reason.
  """
  for source, kind in _named_sources(run.config, run.workdir):
    shape = inspect(run, source, kind)
    check_tensors = functools.partial(
        huggingface.check_params, config=shape, kind=kind
    )
    read(source, check_tensors)
  if not run.config.sft.init:
    shape = presets.from_fields(run.config.model, len(run.tokenizer))
    _check_fit(run, Source('config.model', ''), shape, 'scalar')


@functools.cache
def _note(text: str) -> None:
  """Prints `text` once, however often a model is inspected."""
  if jax.process_index() == 0:
    print(text, flush=True)


def _check_fit(
    run: Run, source: Source, shape: presets.GemmaConfig, kind: str
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


def inspect(run: Run, source: Source, kind: str) -> presets.GemmaConfig:
  """The shape of a source, once tokenizer, embedding and mesh fit the run.

  It is that of a model that does not learn.
  """
  folder = read(source, lambda folder: folder)
  _check_tokenizer(run, source, epath.Path(folder))
  shape = presets.frozen(read(source, huggingface.read_shape), run.config.model)
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
    shape = presets.trained(inspect(run, source, kind), run.config)
    return shape, _load_params(source, shape, kind)
  shape, params = frozen or load(run, source, kind)
  shape = presets.trained(shape, run.config)
  key = run.key(f'adapters_{role}')
  return shape, lora.add_adapters(kind, shape, params, key)


def _check_shape(run: Run, source: Source, shape: presets.GemmaConfig) -> None:
  """A run that is reused must have the shape that this config asks for."""
  if source.field != 'ppo.from' or run.config.sft.init:
    return
  wanted = presets.from_fields(run.config.model, len(run.tokenizer))
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


def initial_policy(run: Run) -> tuple[presets.GemmaConfig, Params]:
  """Where SFT starts: `sft.init`, or random weights, which all learn."""
  value = run.config.sft.init
  if value:
    source = _named('sft.init', value, 'sft')
    return load_to_train(run, source, 'policy', 'sft')
  shape = presets.from_fields(run.config.model, len(run.tokenizer))
  shape = presets.trained_whole(shape, run.config.model)
  return shape, heads.init_params('policy', shape, run.key('init_sft'))


def initial_reward_model(run: Run) -> tuple[presets.GemmaConfig, Params]:
  """Where the reward model starts: a policy with a new scalar head."""
  value = run.config.reward_model.init
  source = (
      _named('reward_model.init', value, 'sft')
      if value
      else policy_source(run.config, run.workdir)
  )
  shape, backbone = load_to_train(run, source, 'policy', 'reward_model')
  head = heads.init_head(shape, run.key('init_reward_model'))
  return shape, {'backbone': backbone, 'head': head}
