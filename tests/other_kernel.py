"""A kernel of attention that says something else at padding, for tests."""

import jax.numpy as jnp
import pytest

from ma_rlhf_jax.masking import causal_mask
from ma_rlhf_jax.models import attention, kernels
from ma_rlhf_jax.structs import Array


def _kernel(
    q: Array, k: Array, v: Array, real_BL: Array, *, window: int, **how
) -> Array:
  del window
  mixed_BLNH = attention.attend(q, k, v, causal_mask(real_BL), **how)
  return jnp.where(real_BL[..., None, None], mixed_BLNH, 7.0)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
  """`model.attention='auto'` then takes it, as on a GPU it takes cuDNN."""
  chosen = lambda config, machine: {'auto': 'other'}.get(
      config.attention, config.attention
  )
  monkeypatch.setitem(kernels.KERNELS, 'other', _kernel)
  monkeypatch.setattr(kernels, 'chosen', chosen)
