"""Models of a stage, checked and loaded from where `sources` finds them."""

from collections.abc import Callable
import functools
import pathlib
from typing import TypeVar

from etils import epath
import jax
from ml_collections import ConfigDict

from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import heads, huggingface, kernels, lora, presets
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.structs import Params
from ma_rlhf_jax.training import model_configs, sources
from ma_rlhf_jax.training.products import Source, SourceError
from ma_rlhf_jax.training.run import Run, Setup

T = TypeVar('T')


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


def check_shapes(config: ConfigDict) -> None:
  """Raises where the config.json of a named model cannot be used.

  It needs no tokenizer, no rows and no devices; fetches models of the hub.

  Raises:
    SourceError: with the field, the value and the reason.
  """
  for source, _ in sources.named_models(config):
    read(source, huggingface.read_shape)


def check(run: Setup) -> None:
  """Raises where a model does not fit the run; fetches those of the hub.

  Names, shapes and dtypes of all tensors are compared, no weight is read.

  Raises:
    SourceError: with the field, the value and the reason.
  """
  for source, kind in sources.named_models(run.config):
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
  """Shape and parameters of a model that does not learn, checked."""
  shape = inspect(run, source, kind)
  return shape, _load_params(source, shape, kind)


def load_to_train(
    run: Run, source: Source, kind: str, role: str, frozen: Loaded | None = None
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

  Or None, where the folder that is named holds a tokenizer alone.
  """
  for source, _ in sources.named_models(config):
    folder = read(source, lambda folder: folder)
    has_shape = (epath.Path(folder) / 'config.json').exists()
    return read(source, huggingface.read_shape) if has_shape else None
  return presets.from_config(config.model, vocab_size)


def initial_policy(run: Run) -> Loaded:
  """Where SFT starts: `sft.init`, or random weights, which all learn."""
  if source := sources.named_source(run.config, 'sft'):
    return load_to_train(run, source, 'policy', 'sft')
  shape = presets.from_config(run.config.model, len(run.tokenizer))
  shape = model_configs.trained_whole(shape, run.config.model)
  return shape, heads.init_params('policy', shape, run.spec.key('init_sft'))


def _with_new_head(
    run: Run, source: Source, role: str, frozen: Loaded | None = None
) -> Loaded:
  shape, backbone = load_to_train(run, source, 'policy', role, frozen)
  head = heads.init_head(shape, run.spec.key(f'init_{role}'))
  return shape, {'backbone': backbone, 'head': head}


def initial_critic(
    run: Run, ref_policy: Loaded, reward_model: Loaded | None
) -> Loaded:
  """Where the critic starts, see `sources.source`.

  Adapters share the weights of the other two, as they were loaded.
  """
  config, workdir = run.config, run.workdir
  start = sources.source(config, workdir, 'critic')
  if sources.starts_from_policy(config):
    return _with_new_head(run, start, 'critic', ref_policy)
  named = sources.source(config, workdir, 'score')
  same = reward_model if reward_model and start == named else None
  return load_to_train(run, start, 'scalar', 'critic', same)


def initial_reward_model(run: Run) -> Loaded:
  """Where the reward model starts: a policy with a new scalar head."""
  found = sources.of_stage(run.config, run.workdir, 'reward_model')
  return _with_new_head(run, found['policy'], 'reward_model')
