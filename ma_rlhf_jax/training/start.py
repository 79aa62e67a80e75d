"""From a config and a workdir to a run: tokenizer, data, devices."""

from etils import epath
from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.data import parts, tasks
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.models import huggingface
from ma_rlhf_jax.parallel.mesh import make_mesh
from ma_rlhf_jax.training import sources
from ma_rlhf_jax.training.run import Run


def load_run(config: ConfigDict, workdir: epath.Path) -> Run:
  """Data, tokenizer and devices of a run; raises what a user can mend."""
  path = sources.tokenizer_path(config)
  tokenizer = None
  if path:
    tokenizer = tokenizer_lib.load_tokenizer(str(huggingface.resolve(path)))
  data, tokenizer = parts.prepare(config, tokenizer, workdir)
  prompt_len, response_len = config_lib.lengths(config)
  return Run(
      config=config,
      workdir=workdir,
      mesh=make_mesh(config.mesh),
      data=data,
      tokenizer=tokenizer,
      prompt_len=prompt_len,
      response_len=response_len,
      gold=tasks.GOLD.get(config.data.task),
  )
