"""Fused attention equals the plain one, on every real token."""

from collections.abc import Callable
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.masking import causal_mask
from ma_rlhf_jax.models import attention, kernels
from ma_rlhf_jax.models.presets import PRESETS, GemmaConfig
from ma_rlhf_jax.parallel.partition import Machine
from ma_rlhf_jax.structs import Array
from tests import tiny, tolerance

_BFLOAT = {'dtype': 'bfloat16'}
_7B = dataclasses.replace(PRESETS['gemma-7b'], **_BFLOAT)
_27B = dataclasses.replace(PRESETS['gemma-2-27b'], **_BFLOAT)
_SMALL = dataclasses.replace(_7B, head_dim=64)
_ODD = dataclasses.replace(_7B, head_dim=36)
_MIDDLE = dataclasses.replace(_7B, head_dim=128)
_WIDE = dataclasses.replace(_7B, dtype='float32')
_TPU, _CPU, _HOPPER = Machine('tpu'), Machine('cpu'), Machine('gpu', (9, 0))
_T4, _BLACKWELL = Machine('gpu', (7, 5)), Machine('gpu', (10, 0))
_BEFORE_HOPPER = [Machine('gpu', (8, minor)) for minor in (0, 6, 9)]

# No multiple of a block, which is made 128; the second row is padded on the
# left into its second block, the third on both sides.
LENGTH = 150
_SPANS = ((0, 150), (131, 150), (20, 140))
REAL = np.array([[a <= i < b for i in range(LENGTH)] for a, b in _SPANS])


@pytest.mark.parametrize(
    ('config', 'machine', 'want'),
    [
        (_7B, _TPU, 'splash'),
        (_27B, _TPU, 'splash'),
        (_WIDE, _TPU, 'splash'),
        (_SMALL, _TPU, 'xla'),
        (_7B, _HOPPER, 'cudnn'),
        (_SMALL, _HOPPER, 'cudnn'),
        (_27B, _HOPPER, 'xla'),
        (_WIDE, _HOPPER, 'xla'),
        (_ODD, _HOPPER, 'xla'),
        *((_7B, machine, 'xla') for machine in _BEFORE_HOPPER),
        *((_MIDDLE, machine, 'cudnn') for machine in _BEFORE_HOPPER),
        (_SMALL, _T4, 'xla'),
        (_7B, _BLACKWELL, 'xla'),
        (_MIDDLE, _BLACKWELL, 'cudnn'),
        (_SMALL, Machine('gpu'), 'xla'),
        (_7B, _CPU, 'xla'),
    ],
)
def test_auto_takes_what_can_serve(
    config: GemmaConfig, machine: Machine, want: str
) -> None:
  assert kernels.chosen(config, machine) == want


@pytest.mark.parametrize(
    ('kernel', 'config', 'machine', 'reason'),
    [
        ('splash', _7B, _CPU, 'on TPUs, not on this cpu'),
        ('splash', _SMALL, _TPU, 'multiple of 128 numbers, not 64'),
        ('cudnn', _7B, _TPU, 'NVIDIA GPUs, not on this tpu'),
        ('cudnn', _7B, Machine('gpu'), 'NVIDIA GPUs'),
        ('cudnn', _SMALL, _T4, r'8\.0.*7\.5'),
        ('cudnn', _27B, _HOPPER, 'no bound of attention scores.* of 50'),
        ('cudnn', _WIDE, _HOPPER, 'not in float32'),
        ('cudnn', _ODD, _HOPPER, 'of 8 and at most 256 numbers, not 36'),
        *(
            ('cudnn', _7B, m, r'at most 128 numbers, not 256.*8\.[069]')
            for m in _BEFORE_HOPPER
        ),
        ('cudnn', _7B, _BLACKWELL, r'at most 128 numbers, not 256.*10\.0'),
    ],
)
def test_what_cannot_serve_is_refused_with_the_reason(
    kernel: str, config: GemmaConfig, machine: Machine, reason: str
) -> None:
  asked = dataclasses.replace(config, attention=kernel)
  asked_for = f"model.attention='{kernel}'.*{reason}.*'auto'"
  with pytest.raises(ValueError, match=asked_for):
    kernels.chosen(asked, machine)


@pytest.mark.parametrize(
    ('capability', 'ndim'),
    # [B, L, L] of plain attention, or the [B, L] that kernels take.
    [('7.5', 3), ('8.0', 3), ('8.6', 3), ('8.9', 3), ('9.0', 2), ('10.0', 3)],
)
def test_a_model_asks_the_device_for_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: str, ndim: int
) -> None:
  # What every command computes with, also those that have no flag for it.
  gpu = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cuda')
  monkeypatch.setattr(jax, 'devices', lambda backend: [gpu])
  masks = attention.Masks.of(_7B, jnp.asarray(REAL), 0)
  assert masks.full.ndim == ndim


def test_plain_attention_serves_everything() -> None:
  for config in (_7B, _27B, _ODD, _WIDE):
    plain = dataclasses.replace(config, attention='xla')
    for machine in (_CPU, _HOPPER, _TPU):
      assert kernels.chosen(plain, machine) == 'xla'


def _inputs(
    heads: int, kv_heads: int, size: int, dtype: str = 'float32'
) -> list[Array]:
  random = np.random.default_rng(0)
  shapes = [(len(REAL), LENGTH, n, size) for n in (heads, kv_heads, kv_heads)]
  return [jnp.asarray(random.standard_normal(s), dtype) for s in shapes]


def _plain(
    *projected: Array, scale: float, softcap: float, window: int
) -> Array:
  mask = causal_mask(jnp.asarray(REAL))
  if window:
    mask &= ~np.tril(np.ones((LENGTH, LENGTH), bool), -window)[None]
  return attention.attend(*projected, mask, scale=scale, softcap=softcap)


def _fused(kernel: Callable[..., Array], *projected: Array, **how) -> Array:
  return kernels.attend_rows(kernel, *projected, jnp.asarray(REAL), **how)


def _program(function: Callable[..., Array], **how) -> Callable[..., Array]:
  """What real queries get, and gradients of a sum over it."""

  def cost(*projected: Array) -> tuple[Array, Array]:
    mixed = function(*projected, **how)
    real = jnp.asarray(REAL)[..., None, None]
    mixed = jnp.where(real, mixed.astype(jnp.float32), 0)
    return jnp.sum(jnp.sin(3 * mixed)), mixed

  run = jax.jit(jax.value_and_grad(cost, argnums=(0, 1, 2), has_aux=True))

  def outputs_and_gradients(*inputs: Array) -> list[np.ndarray]:
    (_, mixed), grads = run(*inputs)
    return [np.asarray(x, np.float32) for x in (mixed, *grads)]

  return outputs_and_gradients


def _assert_equal_but_for_rounding(
    got: list[np.ndarray], plain: Callable[..., Array], inputs: list[Array]
) -> None:
  queries, keys, _ = inputs
  # Over the numbers of a head, or the queries that a key serves.
  length = max(queries.shape[3], LENGTH * queries.shape[2] // keys.shape[2])
  bounds = tolerance.of_sums(plain, inputs, length)
  for x, want, bound in zip(got, plain(*inputs), bounds, strict=True):
    assert np.isfinite(x).all()
    assert np.abs(want).max() > max(0.1, 1000 * bound)
    np.testing.assert_allclose(x, want, rtol=0, atol=bound)
    assert not x[~REAL].any()


@pytest.fixture
def splash(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Array]:
  monkeypatch.setattr(kernels, '_BLOCKS', (128,))
  return functools.partial(kernels.splash, interpret=True)


# Heads of 256 numbers and one key head as Gemma 2B has it; groups of two with a
# bound and a window as Gemma 2 has them; a head each.
@pytest.mark.parametrize(
    ('heads', 'kv_heads', 'size', 'softcap', 'window'),
    [
        (2, 1, 256, 0.0, 0),
        (4, 2, 128, 1.5, 40),
        pytest.param(2, 2, 128, 0.0, 0, marks=pytest.mark.slow),
    ],
)
def test_splash_equals_plain_attention(
    splash: Callable[..., Array],
    heads: int,
    kv_heads: int,
    size: int,
    softcap: float,
    window: int,
) -> None:
  inputs = _inputs(heads, kv_heads, size)
  how = {'scale': 0.2, 'softcap': softcap, 'window': window}
  got = _program(functools.partial(_fused, splash), **how)(*inputs)
  _assert_equal_but_for_rounding(got, _program(_plain, **how), inputs)


def _rows(
    kernel: Callable[..., Array], repeats: int, *projected: Array, **how
) -> Array:
  """`attend_rows` of rows that are repeated to divide by the devices."""
  real = jnp.tile(jnp.asarray(REAL), (repeats, 1))
  rows = [jnp.tile(x, (repeats, 1, 1, 1)) for x in projected]
  return kernels.attend_rows(kernel, *rows, real, **how)[: len(REAL)]


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_heads_and_rows_are_shared_by_the_mesh(kv_heads: int) -> None:
  # The plain function as the kernel: each device has rows and heads of its own.
  def kernel(q: Array, k: Array, v: Array, real: Array, **how) -> Array:
    assert q.shape[:3] == (3, LENGTH, 2) and k.shape[2] == 1
    del how['window']
    return attention.attend(q, k, v, causal_mask(real), **how)

  inputs = _inputs(8, kv_heads, 8)
  how = {'scale': 0.2, 'softcap': 0.0, 'window': 0}
  with jax.set_mesh(tiny.mesh(1, 2, 4)):
    got = _program(functools.partial(_rows, kernel, 2), **how)(*inputs)
  _assert_equal_but_for_rounding(got, _program(_plain, **how), inputs)


def test_key_heads_that_devices_cannot_share_are_refused() -> None:
  with jax.set_mesh(tiny.mesh(1, 1, 8)):
    with pytest.raises(ValueError, match='3 key heads and 6 query heads.*=8'):
      _fused(kernels.splash, *_inputs(6, 3, 8), scale=1, softcap=0, window=0)


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU')
@pytest.mark.parametrize('window', [0, 40])
@pytest.mark.parametrize(
    ('heads', 'kv_heads', 'size'), [(4, 1, 256), (4, 2, 128), (2, 2, 64)]
)
def test_cudnn_equals_plain_attention(
    heads: int, kv_heads: int, size: int, window: int
) -> None:
  inputs = _inputs(heads, kv_heads, size, 'bfloat16')
  how = {'scale': size**-0.5, 'softcap': 0.0, 'window': window}
  with jax.default_matmul_precision('float32'):
    wide = [x.astype(jnp.float32) for x in inputs]
    exact = _program(_plain, **how)(*wide)
  plain = _program(_plain, **how)(*inputs)
  kernel = functools.partial(_fused, kernels.cudnn)
  fused = _program(kernel, **how)(*inputs)
  # As near to float32 as plain attention is in bfloat16.
  for want, like, got in zip(exact, plain, fused, strict=True):
    assert np.isfinite(got).all() and not got[~REAL].any()
    error, most = (np.sqrt(np.mean((x - want) ** 2)) for x in (got, like))
    assert 0 < error < 1.5 * most
