"""From a config and a workdir to a run: tokenizer, data, devices."""

import pathlib

from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.data import held_out, parts, tasks
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import huggingface
from ma_rlhf_jax.parallel.mesh import decode_mesh, make_mesh
from ma_rlhf_jax.training import automatic, choice, sources
from ma_rlhf_jax.training.run import Run


def _check_warmup(config: ConfigDict, num_steps: int) -> None:
  warmup = config.ppo.critic_warmup_updates
  if warmup >= num_steps:
    raise ValueError(
        f'ppo.critic_warmup_updates={warmup} leaves the policy none of the '
        f'{num_steps} steps of PPO; make it smaller, or ppo.steps or '
        'ppo.epochs larger'
    )


def _found(path: str) -> pathlib.Path:
  """The folder of a tokenizer; says how to name another where there is none."""
  try:
    return huggingface.resolve(path)
  except FileNotFoundError as error:
    raise FileNotFoundError(
        f'{error}; a model that lies here is named by '
        '--config.sft.init=FOLDER, its tokenizer alone by '
        '--config.tokenizer.path=FOLDER'
    ) from error


def load_run(config: ConfigDict, workdir: epath.Path) -> Run:
  """Data, tokenizer and devices of a run; raises what a user can mend."""
  tasks.check_task(config.data.task)  # before a model is looked for
  path = sources.tokenizer_path(config)
  tokenizer = None
  if path:
    tokenizer = tokenizer_lib.load_tokenizer(str(_found(path)))
  to_train = sources.stages_to_train(config, workdir)
  data, tokenizer = parts.prepare(config, tokenizer, workdir, to_train)
  if 'ppo' in to_train:
    _check_warmup(config, config_lib.num_steps(config.ppo, len(data.ppo)))
  prompt_len, response_len = parts.widths(config, data)
  if choice.is_made(config, workdir):
    data = held_out.divided(data, config.data.split_seed)
  mesh = make_mesh(config.mesh)
  config = automatic.resolve(
      config,
      sources.first_shape(config, workdir, len(tokenizer)),
      prompt_len=prompt_len,
      response_len=response_len,
      platform=mesh.devices.flat[0].platform,
  )
  if config.rollout.tensor:  # an error of it ends the run before it begins
    decode_mesh(mesh, config.rollout.tensor)
  return Run(
      config=config,
      workdir=workdir,
      mesh=mesh,
      data=data,
      tokenizer=tokenizer,
      prompt_len=prompt_len,
      response_len=response_len,
      gold=tasks.GOLD.get(config.data.task),
  )
