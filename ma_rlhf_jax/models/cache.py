"""Keys and values of the tokens so far, whole or in 8 bits."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel.partition import split_cache
from ma_rlhf_jax.structs import Array


@struct.dataclass
class Cache:
  """Keys and values of all layers; slot s belongs to token column s.

  Either one array of all layers, as a scan over layers carries it, or a tuple
  of one array [B, S, K, H] a layer, which a loop over tokens updates in place.

  Attributes:
    keys_XBSKH: rotated keys, in the compute dtype or int8.
    values_XBSKH: values.
    key_scales_XBSK: of int8 keys, one a token and head; () = not quantised.
    value_scales_XBSK: of int8 values.
  """

  keys_XBSKH: Array | tuple[Array, ...]
  values_XBSKH: Array | tuple[Array, ...]
  key_scales_XBSK: Array | tuple[Array, ...] = ()
  value_scales_XBSK: Array | tuple[Array, ...] = ()

  @classmethod
  def empty(
      cls, config: GemmaConfig, batch: int, slots: int, *, int8: bool = False
  ) -> 'Cache':
    """A cache of zeros; by layers where the layers of the config are."""
    c = config
    shape = (batch, slots, c.num_kv_heads, c.head_dim)

    def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
      if c.unrolled:
        make = lambda: split_cache(jnp.zeros(shape, dtype))
        return tuple(make() for _ in range(c.num_layers))
      return split_cache(jnp.zeros((c.num_layers, *shape), dtype), stacked=True)

    if not int8:
      return cls(*(zeros(shape, c.compute_dtype) for _ in range(2)))
    scales = lambda: zeros(shape[:-1], jnp.float32)
    quantised = lambda: zeros(shape, jnp.int8)
    return cls(quantised(), quantised(), scales(), scales())

  def write(
      self, layer: Array | int, slot: Array | int, keys: Array, values: Array
  ) -> 'Cache':
    """The cache with [B, L, K, H] keys and values from `slot` on."""

    def put(cached: Any, new: Array) -> Any:
      # Of one type, also where plain integers would be 64 bits wide.
      update = jax.lax.dynamic_update_slice
      at = tuple(map(jnp.int32, (0, slot) + (0,) * (new.ndim - 2)))
      if isinstance(cached, tuple):
        written = update(cached[layer], new, at)
        return cached[:layer] + (written,) + cached[layer + 1 :]
      return update(cached, new[None], (jnp.int32(layer), *at))

    if not self._is_int8:
      return Cache(put(self.keys_XBSKH, keys), put(self.values_XBSKH, values))
    (keys, key_scales), (values, value_scales) = map(quantise, (keys, values))
    return Cache(
        put(self.keys_XBSKH, keys),
        put(self.values_XBSKH, values),
        put(self.key_scales_XBSK, key_scales),
        put(self.value_scales_XBSK, value_scales),
    )

  def layer(self, layer: Array | int) -> tuple[Array, Array, dict[str, Array]]:
    """Keys and values [B, S, K, H] of one layer.

    And, of int8 ones, their scales by the names that `attend` has for them.
    """

    def take(cached: Any) -> Array:
      if isinstance(cached, tuple):
        return cached[layer]
      return jax.lax.dynamic_index_in_dim(cached, layer, keepdims=False)

    scales = {}
    if self._is_int8:
      scales['key_scales_BSK'] = take(self.key_scales_XBSK)
      scales['value_scales_BSK'] = take(self.value_scales_XBSK)
    return take(self.keys_XBSKH), take(self.values_XBSKH), scales

  def grown(self, slots: int) -> 'Cache':
    """The cache with so many slots, the new ones of zeros."""
    stacked = not isinstance(self.keys_XBSKH, tuple)

    def pad(x: Array) -> Array:
      missing = slots - x.shape[1 + stacked]
      widths = [(0, 0)] * x.ndim
      widths[1 + stacked] = (0, missing)
      return split_cache(jnp.pad(x, widths), stacked=stacked)

    return jax.tree.map(pad, self)

  @property
  def slots(self) -> int:
    """S."""
    return jax.tree.leaves(self.keys_XBSKH)[0].shape[-3]

  @property
  def num_kv_heads(self) -> int:
    """K."""
    return jax.tree.leaves(self.keys_XBSKH)[0].shape[-2]

  @property
  def _is_int8(self) -> bool:
    return not isinstance(self.key_scales_XBSK, tuple) or bool(
        self.key_scales_XBSK
    )


def quantise(x: Array) -> tuple[Array, Array]:
  """int8 [..., H] and scales [...], such that int8 * scale is nearly `x`."""
  wide_x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(wide_x), axis=-1) / 127
  safe = jnp.where(scale > 0, scale, 1)
  return jnp.round(wide_x / safe[..., None]).astype(jnp.int8), scale
