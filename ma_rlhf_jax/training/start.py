"""From a config and a workdir to a run: tokenizer, data, devices."""

from typing import TYPE_CHECKING

from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.data import batch_sizes, held_out, parts, tasks
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import huggingface
from ma_rlhf_jax.parallel.mesh import decode_mesh, make_mesh
from ma_rlhf_jax.training import automatic, choice, loading, sources
from ma_rlhf_jax.training.products import Source, SourceError
from ma_rlhf_jax.training.run import Run, Setup

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


def _check_warmup(config: ConfigDict, num_steps: int) -> None:
  warmup = config.ppo.critic_warmup_updates
  if warmup >= num_steps:
    raise ValueError(
        f'ppo.critic_warmup_updates={warmup} leaves the policy none of the '
        f'{num_steps} steps of PPO; make it smaller, or ppo.steps or '
        'ppo.epochs larger'
    )


def _load_tokenizer(source: Source) -> 'PreTrainedTokenizerBase':
  """The tokenizer of what a field names; raises with the field and the fix."""
  try:
    folder = huggingface.resolve(source.path)
    if source.field != 'tokenizer.path':
      huggingface.refuse_adapter(folder)
    return tokenizer_lib.load_tokenizer(str(folder))
  except FileNotFoundError as error:
    raise SourceError(
        f'{source.field}={source.path}: {error}; or name the folder of a '
        'tokenizer by --config.tokenizer.path=FOLDER'
    ) from error
  except (ValueError, OSError) as error:
    raise SourceError(f'{source.field}={source.path}: {error}') from error


def load_run(
    config: ConfigDict, workdir: epath.Path, *, check_models: bool = False
) -> Run:
  """Data, tokenizer and devices of a run; raises what a user can mend.

  Args:
    config: as the workdir has it. That of the run has smaller batches where
      the rows do not fill those, see `data.batch_sizes`.
    workdir: of the run.
    check_models: whether all models that the config names are checked, before
      a row is read.
  """
  if check_models:
    loading.check_shapes(config)
  mesh = make_mesh(config.mesh)
  if config.rollout.tensor:  # an error of it ends the run before it begins
    decode_mesh(mesh, config.rollout.tensor)
  source, tokenizer = sources.named_source(config, 'tokenizer'), None
  if source:
    tokenizer = _load_tokenizer(source)
    if check_models:
      # What auto becomes follows from sizes, and decides no name or shape.
      setup = Setup(automatic.fixed(config), workdir, mesh, tokenizer)
      loading.check(setup)
  to_train = sources.stages_to_train(config, workdir)
  data, tokenizer = parts.prepare(config, tokenizer, workdir, to_train)
  config = batch_sizes.fitted(config, data.num_rows)
  if 'ppo' in to_train:
    _check_warmup(config, config_lib.num_steps(config.ppo, len(data.ppo)))
  prompt_len, response_len = parts.widths(config, data)
  config = automatic.resolve(
      config,
      loading.first_shape(config, len(tokenizer)),
      prompt_len=prompt_len,
      response_len=response_len,
      platform=mesh.devices.flat[0].platform,
  )
  if choice.is_made(config, workdir):
    data = held_out.divided(data, config.data.split_seed)
  run = Run(
      config=config,
      workdir=workdir,
      mesh=mesh,
      data=data,
      tokenizer=tokenizer,
      prompt_len=prompt_len,
      response_len=response_len,
      gold=tasks.GOLD.get(config.data.task),
  )
  if check_models and not source:
    loading.check(run)
  return run
