"""Gemma 1 and 2 in linen: embedding, scanned layers, final norm, tied head.

Gemma 2 also norms what a block adds, caps attention scores and logits, and lets
every other layer attend to a sliding window only.

Source: the Gemma reports (arXiv 2403.08295, 2408.00118); numerics follow the
`transformers` implementation, against which they are tested.
"""

from collections.abc import Callable
from typing import Any

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.models import vocabulary
from ma_rlhf_jax.models.attention import Masks, rotate
from ma_rlhf_jax.models.cache import Cache
from ma_rlhf_jax.models.contraction import PRODUCT, contract
from ma_rlhf_jax.models.kernels import SAVED
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel.partition import (
    LORA_A,
    LORA_B,
    beside_cache,
    constrain,
    current_mesh,
)
from ma_rlhf_jax.structs import Array, Params


class _Kernels(nn.Module):
  """Base of modules with matrices."""

  config: GemmaConfig

  def _weight(
      self,
      name: str,
      init: nn.initializers.Initializer,
      shape: tuple[int, ...],
      dtype: str,
  ) -> Array:
    """A parameter of `dtype` in the compute dtype."""
    weight = self.param(name, init, shape, jnp.dtype(dtype))
    return weight.astype(self.config.compute_dtype)

  def project(
      self, name: str, x: Array, outputs: tuple[int, ...], count: int = 1
  ) -> Array:
    """`x` times a kernel, plus what its adapter adds.

    Args:
      name: of the kernel, one of `config_fields.KERNELS`.
      x: [..., *inputs].
      outputs: sizes of the axes that the result has in place of `inputs`.
      count: of axes in `inputs`.
    """
    c = self.config
    inputs = x.shape[x.ndim - count :]
    fans = {
        'in_axis': tuple(range(count)),
        'out_axis': tuple(range(count, count + len(outputs))),
    }
    init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal', **fans)
    dtype = c.kernel_dtype or c.param_dtype
    kernel = self._weight(name, init, inputs + outputs, dtype)
    y = contract(x, kernel, count)
    if c.lora is None or name not in c.lora.targets:
      return y
    # B of zeros: an adapter changes nothing before it has learned.
    down = nn.initializers.variance_scaling(
        1 / 3, 'fan_in', 'uniform', in_axis=fans['in_axis'], out_axis=count
    )
    a = self._weight(name + LORA_A, down, (*inputs, c.lora.rank), c.param_dtype)
    b = self._weight(
        name + LORA_B,
        nn.initializers.zeros,
        (c.lora.rank, *outputs),
        c.param_dtype,
    )
    added = contract(contract(x, a, count), b, 1)
    return y + added * jnp.asarray(c.lora.scale, added.dtype)


class RMSNorm(nn.Module):
  """`x / rms(x) * (1 + scale)`, in float32 or wider."""

  config: GemmaConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale_D = self.param(
        'scale',
        nn.initializers.zeros,
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
      masks: Masks,
      slides: Array,
      cache: Cache | None,
      layer: Array | int,
      slot: Array | int,
      ends: int,
  ) -> tuple[Array, Cache | None]:
    c = self.config

    def heads(name: str, number: int) -> Array:
      return self.project(name, x_BLD, (number, c.head_dim))

    queries = heads('query', c.num_heads)
    keys = heads('key', c.num_kv_heads)
    values = heads('value', c.num_kv_heads)
    queries = rotate(queries, positions_BL, theta=c.rope_theta)
    keys = rotate(keys, positions_BL, theta=c.rope_theta)
    scales = {}
    if cache is not None:
      cache = cache.write(layer, slot, keys, values)
      keys, values, scales = cache.layer(layer)
      queries = beside_cache(queries, c.num_kv_heads)
    mixed = masks.attend(c, slides, queries, keys, values, **scales)
    if cache is not None:
      mixed = beside_cache(mixed, c.num_kv_heads)
      # To the heads of `out`, or that would be gathered to where the rows are.
      mixed = constrain(mixed, ('batch', 'length', 'heads', 'head'))
    out = self.project('out', mixed[:, -ends:], (c.embed_dim,), count=2)
    return out, cache


class MLP(_Kernels):
  """`down(gelu(gate(x)) * up(x))` with the tanh form of GELU."""

  @nn.compact
  def __call__(self, x_BLD: Array) -> Array:
    c = self.config
    gate = self.project('gate', x_BLD, (c.mlp_dim,))
    up = self.project('up', x_BLD, (c.mlp_dim,))
    hidden = jax.nn.gelu(gate, approximate=True) * up
    return self.project('down', hidden, (c.embed_dim,))


# What the backward pass finds of each layer, beside what went into it.
REMAT: dict[str, Callable[..., bool] | None] = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.save_only_these_names(PRODUCT),
    'attention': jax.checkpoint_policies.save_only_these_names(SAVED),
    'none': None,
}


class Layer(nn.Module):
  """One block; the carry of the scan is (activations, cache).

  Attributes:
    config: of the model.
    ends: the last columns whose activations are wanted; 0 = all. Of others
      only keys and values, and what they attend to, are computed.
  """

  config: GemmaConfig
  ends: int = 0

  @nn.compact
  def __call__(
      self,
      carry: tuple[Array, Cache | None],
      layer: Array | int,
      slides: Array | bool,
      positions_BL: Array,
      masks: Masks,
      slot: Array | int,
  ) -> tuple[tuple[Array, Cache | None], None]:
    x, cache = carry
    c = self.config

    def added(name: str, y: Array) -> Array:
      return RMSNorm(c, name=name)(y) if c.post_norms else y

    normed = RMSNorm(c, name='attention_norm')(x)
    mixed, cache = Attention(c, name='attention')(
        normed, positions_BL, masks, slides, cache, layer, slot, self.ends
    )
    x = x[:, -self.ends :] + added('attention_post_norm', mixed)
    normed = RMSNorm(c, name='mlp_norm')(x)
    x = x + added('mlp_post_norm', MLP(c, name='mlp')(normed))
    return (constrain(x, ('batch', 'length', 'width')), cache), None


class Gemma(nn.Module):
  """Tokens to hidden states; the tied head is applied by the caller."""

  config: GemmaConfig

  @nn.nowrap
  def _embed(self, tokens_BL: Array) -> Array:
    c, x = self.config, tokens_BL
    if x.ndim == 2:
      init = nn.initializers.normal(c.embed_dim**-0.5)
      shape = c.vocab_size, c.embed_dim
      dtype = jnp.dtype(c.kernel_dtype or c.param_dtype)
      x = self.param('embedding', init, shape, dtype)[tokens_BL]
    # The factor is rounded to the compute dtype, as in the reference.
    factor = jnp.asarray(c.embed_dim**0.5, c.compute_dtype)
    x = x.astype(c.compute_dtype) * factor
    return constrain(x, ('batch', 'length', 'width'))

  @nn.compact
  def __call__(
      self,
      tokens_BL: Array,
      positions_BL: Array,
      mask: Array,
      cache: Cache | None = None,
      slot: Array | int = 0,
      ends: int = 0,
  ) -> tuple[Array, Cache | None]:
    """Hidden states after the final norm, and the cache with these tokens.

    Args:
      tokens_BL: int32. Or their rows of the embedding, [B, L, D].
      positions_BL: int32 rotary positions.
      mask: bool [B, L, S], what each token attends to; S is L without a cache,
        else the number of its slots. Or [B, L], the real tokens of rows that
        are read from left to right, without a cache.
      cache: keys and values of earlier tokens, or None.
      slot: the cache slot of the first of these tokens.
      ends: the last columns whose states are wanted; 0 = all. Without a loop
        over layers (`unroll=0`, `unrolled`) the last one leaves out most of the
        others.

    Returns:
      float [B, L, D] (or [B, ends, D]) in the compute dtype; the cache or None.
    """
    chex.assert_rank([tokens_BL, positions_BL, mask], [{2, 3}, 2, {2, 3}])
    c, x = self.config, self._embed(tokens_BL)
    slides = c.sliding_layers or (False,) * c.num_layers
    rows = positions_BL, Masks.of(c, mask, slot), slot
    carry = x, cache
    if c.unrolled:
      for layer in range(c.num_layers):
        last = layer == c.num_layers - 1
        block = Layer(c, ends if last else 0, name=layer_name(layer))
        carry, _ = block(carry, layer, slides[layer], *rows)
    elif c.unroll or self.is_initializing():
      carry = _in_turns(c, carry, slides, rows)
    else:
      stack = self.get_variable('params', 'layers')
      carry = _one_by_one(c, stack, carry, slides, rows, ends)
    x, cache = carry
    return RMSNorm(c, name='final_norm')(x[:, -ends:]), cache


def _in_turns(
    config: GemmaConfig,
    carry: tuple[Array, Cache | None],
    slides: tuple[bool, ...],
    rows: tuple[Any, ...],
) -> tuple[Array, Cache | None]:
  """All layers in a loop, `unroll` of them in a turn."""
  block, policy = Layer, REMAT[config.remat]
  if policy is not None:
    # Between turns of a loop nothing is found to be computed twice.
    block = nn.remat(Layer, prevent_cse=config.unroll != 1, policy=policy)
  layers = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=config.num_layers,
      unroll=min(config.unroll or 1, config.num_layers),
  )(config, name='layers')
  numbers = jnp.arange(config.num_layers, dtype=jnp.int32)
  return layers(carry, numbers, jnp.asarray(slides), *rows)[0]


def _one_by_one(
    config: GemmaConfig,
    stack: Params,
    carry: tuple[Array, Cache | None],
    slides: tuple[bool, ...],
    rows: tuple[Any, ...],
    ends: int,
) -> tuple[Array, Cache | None]:
  """All layers of a stack without a loop, the last one for `ends` columns."""
  number = config.num_layers
  # Gradients are joined once, where those of x[layer] would be padded and
  # added.
  parts = jax.tree.map(lambda x: jax.lax.split(x, (1,) * number), stack)
  policy = REMAT[config.remat]
  for layer in range(number):

    def block(params: Params, carry: Any, rows: Any, layer: int = layer) -> Any:
      made = Layer(config, ends if layer == number - 1 else 0)
      given = carry, layer, slides[layer], *rows
      return made.apply({'params': params}, *given)[0]

    if policy is not None:
      block = jax.checkpoint(block, policy=policy)
    params = jax.tree.map(
        lambda x, layer=layer: x[layer][0],
        parts,
        is_leaf=lambda x: isinstance(x, list | tuple),
    )
    carry = block(params, carry, rows)
  return carry


def layer_name(layer: int) -> str:
  """What the parameters of one layer are called where layers are unrolled."""
  return f'layer_{layer}'


def hidden_and_head(
    config: GemmaConfig,
    params: Params,
    tokens_BL: Array,
    mask_BL: Array,
    ends: int = 0,
) -> tuple[Array, Array]:
  """Hidden states [B, L, D] of whole padded rows, and the tied head [V, D].

  With `ends` only those of so many columns, [B, ends, D].
  """
  given, head_VD = tokens_BL, params['embedding']
  wide = head_VD.dtype == masking.wide(head_VD.dtype)
  # On a mesh the table is in parts; a sum in bfloat16 would lose small terms.
  if wide and current_mesh() is None:
    given, head_VD = vocabulary.look_up(head_VD, tokens_BL)
  hidden_BLD, _ = Gemma(config).apply(
      {'params': params}, given, masking.positions(mask_BL), mask_BL, ends=ends
  )
  return hidden_BLD, head_VD


def hidden_states(
    config: GemmaConfig, params: Params, tokens_BL: Array, mask_BL: Array
) -> Array:
  """Hidden states [B, L, D] of whole padded rows, without a cache."""
  return hidden_and_head(config, params, tokens_BL, mask_BL)[0]


def dummy_inputs() -> tuple[Any, ...]:
  """The smallest inputs that create all parameters."""
  token_BL = jnp.zeros((1, 1), jnp.int32)
  return token_BL, token_BL, jnp.ones((1, 1, 1), bool)
