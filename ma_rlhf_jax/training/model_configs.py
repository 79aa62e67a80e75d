"""The `GemmaConfig` of a model in a run: its dtypes, memory and speed."""

import dataclasses

from ml_collections import ConfigDict

from ma_rlhf_jax.config_fields import KERNELS
from ma_rlhf_jax.models.presets import GemmaConfig, Lora


def trained_whole(shape: GemmaConfig, model: ConfigDict) -> GemmaConfig:
  """`shape` as a model all of which learns, with the dtypes of this run."""
  return dataclasses.replace(
      shape,
      dtype=model.dtype,
      param_dtype=model.param_dtype,
      kernel_dtype='',
      remat=model.remat,
      unroll=model.unroll,
      logprob_chunk=model.logprob_chunk,
      attention=model.attention,
      lora=None,
  )


def frozen(shape: GemmaConfig, model: ConfigDict) -> GemmaConfig:
  """`shape` as a model that does not learn: matrices as they are computed."""
  return dataclasses.replace(
      trained_whole(shape, model), kernel_dtype=model.dtype
  )


def trained(shape: GemmaConfig, config: ConfigDict) -> GemmaConfig:
  """`shape` as a model that learns: whole, or by the adapters of `lora`."""
  c = config.lora
  if not c.rank:
    return trained_whole(shape, config.model)
  targets = tuple(kernel for kernel in KERNELS if kernel in c.targets)
  adapters = Lora(c.rank, c.alpha, targets)
  return dataclasses.replace(frozen(shape, config.model), lora=adapters)
