"""Where the models of a stage come from, and where they go.

Every product is a Hugging Face folder: what a stage trained lies in
`<workdir>/<stage>/hf` (the critic of PPO in `<workdir>/ppo/critic`), and the
next stage reads it from there as it would read any other folder.
"""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import TypeVar

from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import heads, huggingface, presets
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


def _named(field: str, value: str, stage: str) -> Source:
  """The source that `value` (folder, hub id or workdir) stands for."""
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


def check(config: ConfigDict, workdir: epath.PathLike) -> None:
  """Raises where a named source is no model folder; fetches those of the hub.

  Raises:
    SourceError: with the field, the value and the reason.
  """
  named = [
      _named(field, value, 'sft')
      for field, value in (
          ('sft.init', config.sft.init),
          ('reward_model.init', config.reward_model.init),
      )
      if value
  ]
  sources = (policy_source, reward_model_source, critic_source)
  named += [source(config, workdir) for source in sources]
  for source in named:
    if source.field:
      _read(source, huggingface.read_shape)


def _read(source: Source, read: Callable[[pathlib.Path], T]) -> T:
  """`read(folder)` of a source; what goes wrong names the field."""
  try:
    return read(huggingface.resolve(source.path))
  except (ValueError, OSError) as error:
    raise SourceError(
        f'{source.field or "a model of this run"}={source.path}: {error}'
    ) from error


def load(
    run: Run, source: Source, kind: str
) -> tuple[presets.GemmaConfig, Params]:
  """Shape and parameters of a source, checked against the run's tokenizer.

  Args:
    run: what the stages share.
    source: where the model is.
    kind: 'policy' or 'scalar'.
  """
  _check_tokenizer(run, source, epath.Path(huggingface.resolve(source.path)))
  shape = presets.with_runtime(
      _read(source, huggingface.read_shape), run.config.model
  )
  if shape.vocab_size < len(run.tokenizer):
    raise SourceError(
        f'{source.field or "this run"}: the embedding in {source.path} has '
        f'{shape.vocab_size} rows, fewer than the {len(run.tokenizer)} entries '
        'of the tokenizer; use the tokenizer that belongs to the model'
    )
  _check_shape(run, source, shape)
  params = _read(
      source, lambda folder: huggingface.load_params(folder, shape, kind)
  )
  return shape, params


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
  """Where SFT starts: `sft.init`, or random weights."""
  value = run.config.sft.init
  if value:
    return load(run, _named('sft.init', value, 'sft'), 'policy')
  shape = presets.from_fields(run.config.model, len(run.tokenizer))
  return shape, heads.init_params('policy', shape, run.key('init_sft'))


def initial_reward_model(run: Run) -> tuple[presets.GemmaConfig, Params]:
  """Where the reward model starts: a policy with a new scalar head."""
  value = run.config.reward_model.init
  source = (
      _named('reward_model.init', value, 'sft')
      if value
      else policy_source(run.config, run.workdir)
  )
  shape, backbone = load(run, source, 'policy')
  head = heads.init_head(shape, run.key('init_reward_model'))
  return shape, {'backbone': backbone, 'head': head}
