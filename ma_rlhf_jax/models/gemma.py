"""Gemma 1 in linen: embedding, scanned layers, final norm, tied head.

Source: the Gemma report (arXiv 2403.08295); numerics follow the
`transformers` implementation, against which they are tested.
"""

from typing import Any

import chex
from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.models.attention import attend, rotate
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel.partition import constrain
from ma_rlhf_jax.structs import Array, Params


@struct.dataclass
class Cache:
  """Keys and values of all layers; slot s belongs to token column s.

  Attributes:
    keys_XBSKH: rotated keys, in the compute dtype.
    values_XBSKH: values.
  """

  keys_XBSKH: Array
  values_XBSKH: Array

  @classmethod
  def empty(cls, config: GemmaConfig, batch: int, slots: int) -> 'Cache':
    """A cache of zeros."""
    shape = (config.num_layers, batch, slots)
    shape += (config.num_kv_heads, config.head_dim)
    axes = ('layers', 'batch', None, None, None)
    zeros = constrain(jnp.zeros(shape, config.compute_dtype), axes)
    return cls(keys_XBSKH=zeros, values_XBSKH=zeros)

  def write(
      self, layer: Array, slot: Array | int, keys: Array, values: Array
  ) -> 'Cache':
    """The cache with [B, L, K, H] keys and values from `slot` on."""
    # Of one type, also where plain integers would be 64 bits wide.
    at = tuple(jnp.int32(i) for i in (layer, 0, slot, 0, 0))
    put = jax.lax.dynamic_update_slice
    return Cache(
        keys_XBSKH=put(self.keys_XBSKH, keys[None], at),
        values_XBSKH=put(self.values_XBSKH, values[None], at),
    )

  def layer(self, layer: Array) -> tuple[Array, Array]:
    """Keys and values [B, S, K, H] of one layer."""
    take = jax.lax.dynamic_index_in_dim
    keys = take(self.keys_XBSKH, layer, keepdims=False)
    return keys, take(self.values_XBSKH, layer, keepdims=False)


class _Kernels(nn.Module):
  """Base of modules whose parameters carry logical axis names."""

  config: GemmaConfig

  def kernel(
      self,
      name: str,
      shape: tuple[int, ...],
      axes: tuple[str, ...],
      inputs: int,
  ) -> Array:
    """A weight whose first `inputs` axes are summed over."""
    init = nn.initializers.variance_scaling(
        1.0,
        'fan_in',
        'normal',
        in_axis=tuple(range(inputs)),
        out_axis=tuple(range(inputs, len(shape))),
    )
    weight = self.param(
        name,
        nn.with_logical_partitioning(init, axes),
        shape,
        jnp.dtype(self.config.param_dtype),
    )
    return weight.astype(self.config.compute_dtype)


class RMSNorm(nn.Module):
  """`x / rms(x) * (1 + scale)`, in float32 or wider."""

  config: GemmaConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale_D = self.param(
        'scale',
        nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)),
        (x.shape[-1],),
        jnp.dtype(self.config.param_dtype),
    )
    dtype = masking.wide(x.dtype)
    wide_x = x.astype(dtype)
    mean_square = jnp.mean(jnp.square(wide_x), axis=-1, keepdims=True)
    normed = wide_x * jax.lax.rsqrt(mean_square + self.config.norm_eps)
    gain = 1 + jnp.expand_dims(scale_D.astype(dtype), range(x.ndim - 1))
    return (normed * gain).astype(x.dtype)


class Attention(_Kernels):
  """Grouped-query attention with rotary positions and an optional cache."""

  @nn.compact
  def __call__(
      self,
      x_BLD: Array,
      positions_BL: Array,
      mask_BLS: Array,
      cache: Cache | None,
      layer: Array,
      slot: Array | int,
  ) -> tuple[Array, Cache | None]:
    c = self.config
    q_axes, kv_axes = ('embed', 'heads', 'head'), ('embed', 'kv_heads', 'head')
    kv_shape = (c.embed_dim, c.num_kv_heads, c.head_dim)
    query = self.kernel(
        'query', (c.embed_dim, c.num_heads, c.head_dim), q_axes, 1
    )
    key = self.kernel('key', kv_shape, kv_axes, 1)
    value = self.kernel('value', kv_shape, kv_axes, 1)
    out = self.kernel(
        'out',
        (c.num_heads, c.head_dim, c.embed_dim),
        ('heads', 'head', 'embed'),
        2,
    )
    project = lambda kernel: jnp.einsum('bld,dnh->blnh', x_BLD, kernel)
    queries = rotate(project(query), positions_BL, theta=c.rope_theta)
    keys = rotate(project(key), positions_BL, theta=c.rope_theta)
    values = project(value)
    if cache is not None:
      cache = cache.write(layer, slot, keys, values)
      keys, values = cache.layer(layer)
    mixed = attend(queries, keys, values, mask_BLS, scale=c.head_dim**-0.5)
    return jnp.einsum('blnh,nhd->bld', mixed, out), cache


class MLP(_Kernels):
  """`down(gelu(gate(x)) * up(x))` with the tanh form of GELU."""

  @nn.compact
  def __call__(self, x_BLD: Array) -> Array:
    shape = (self.config.embed_dim, self.config.mlp_dim)
    gate = self.kernel('gate', shape, ('embed', 'mlp'), 1)
    up = self.kernel('up', shape, ('embed', 'mlp'), 1)
    down = self.kernel('down', shape[::-1], ('mlp', 'embed'), 1)
    hidden = jax.nn.gelu(x_BLD @ gate, approximate=True) * (x_BLD @ up)
    return hidden @ down


class Layer(nn.Module):
  """One pre-norm block; the carry of the scan is (activations, cache)."""

  config: GemmaConfig

  @nn.compact
  def __call__(
      self,
      carry: tuple[Array, Cache | None],
      layer: Array,
      positions_BL: Array,
      mask_BLS: Array,
      slot: Array | int,
  ) -> tuple[tuple[Array, Cache | None], None]:
    x, cache = carry
    normed = RMSNorm(self.config, name='attention_norm')(x)
    mixed, cache = Attention(self.config, name='attention')(
        normed, positions_BL, mask_BLS, cache, layer, slot
    )
    x = x + mixed
    normed = RMSNorm(self.config, name='mlp_norm')(x)
    x = x + MLP(self.config, name='mlp')(normed)
    return (constrain(x, ('batch', 'length', 'width')), cache), None


class Gemma(nn.Module):
  """Tokens to hidden states; the tied head is applied by the caller."""

  config: GemmaConfig

  @nn.compact
  def __call__(
      self,
      tokens_BL: Array,
      positions_BL: Array,
      mask_BLS: Array,
      cache: Cache | None = None,
      slot: Array | int = 0,
  ) -> tuple[Array, Cache | None]:
    """Hidden states after the final norm, and the cache with these tokens.

    Args:
      tokens_BL: int32.
      positions_BL: int32 rotary positions.
      mask_BLS: bool; S is L without a cache, else the number of its slots.
      cache: keys and values of earlier tokens, or None.
      slot: the cache slot of the first of these tokens.

    Returns:
      float [B, L, D] in the compute dtype, and the new cache (or None).
    """
    chex.assert_rank([tokens_BL, positions_BL, mask_BLS], [2, 2, 3])
    c = self.config
    embedding_VD = self.param(
        'embedding',
        nn.with_logical_partitioning(
            nn.initializers.normal(c.embed_dim**-0.5), ('vocab', 'embed')
        ),
        (c.vocab_size, c.embed_dim),
        jnp.dtype(c.param_dtype),
    )
    # The factor is rounded to the compute dtype, as in the reference.
    factor = jnp.asarray(c.embed_dim**0.5, c.compute_dtype)
    x = embedding_VD[tokens_BL].astype(c.compute_dtype) * factor
    block = nn.remat(Layer, prevent_cse=False) if c.remat else Layer
    layers = nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=c.num_layers,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )(c, name='layers')
    (x, cache), _ = layers(
        (constrain(x, ('batch', 'length', 'width')), cache),
        jnp.arange(c.num_layers, dtype=jnp.int32),
        positions_BL,
        mask_BLS,
        slot,
    )
    return RMSNorm(c, name='final_norm')(x), cache


def hidden_states(
    config: GemmaConfig, params: Params, tokens_BL: Array, mask_BL: Array
) -> Array:
  """Hidden states [B, L, D] of whole padded rows, without a cache."""
  hidden_BLD, _ = Gemma(config).apply(
      {'params': params},
      tokens_BL,
      masking.positions(mask_BL),
      masking.causal_mask(mask_BL),
  )
  return hidden_BLD


def head_logits(hidden_xD: Array, embedding_VD: Array) -> Array:
  """Logits [..., V] of the tied head, at least in float32."""
  return jnp.einsum(
      '...d,vd->...v',
      hidden_xD,
      embedding_VD.astype(hidden_xD.dtype),
      preferred_element_type=masking.wide(hidden_xD.dtype),
  )


def dummy_inputs() -> tuple[Any, ...]:
  """The smallest inputs that create all parameters."""
  token_BL = jnp.zeros((1, 1), jnp.int32)
  return token_BL, token_BL, jnp.ones((1, 1, 1), bool)
