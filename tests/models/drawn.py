"""Weights that let errors show, and a slow plain Gemma to compare with.

Fresh models hide errors: norm weights of 0 make `w` and `1 + w` alike up to a
scale, and large embeddings make a tied head repeat its input.

What is compiled here is compiled once for all the files that use it with the
same shape, such as `left_padded(LENGTHS, 9)`.
"""

import dataclasses

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ma_rlhf_jax.models import gemma, vocabulary
from ma_rlhf_jax.models.heads import abstract_params
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.models.tensor_names import list_tensors, to_theirs
from ma_rlhf_jax.structs import Array, Params
from tests import tolerance

# All sizes differ, and heads * head_dim is not the width.
TINY = GemmaConfig(
    vocab_size=50,
    num_layers=3,
    embed_dim=24,
    mlp_dim=36,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
)
ONE_KV_HEAD = dataclasses.replace(TINY, num_kv_heads=1)
# With room for a tokenizer, and constants that are not Gemma's.
UNUSUAL = dataclasses.replace(
    TINY, vocab_size=320, rope_theta=500.0, norm_eps=1e-3
)
# Gemma 2 with layers that slide, a scale that is not the size of a head, and
# caps that bite: scores and logits reach a few units.
TINY_2 = dataclasses.replace(
    TINY,
    family='gemma2',
    query_pre_attn_scalar=7,
    attn_softcap=1.5,
    final_softcap=2.0,
    sliding_window=4,
    sliding_layers=(True, False, True),
)
UNUSUAL_2 = dataclasses.replace(
    TINY_2, vocab_size=320, rope_theta=500.0, norm_eps=1e-3
)
# Eight rows, one of them empty.
LENGTHS = [9, 4, 6, 1, 0, 9, 8, 3]


def draw(kind: str, config: GemmaConfig, seed: int) -> Params:
  """Parameters with std 0.25, norms 0.3, embeddings 0.05."""
  random = np.random.default_rng(seed)

  def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> Array:
    name = jax.tree_util.keystr(path)
    std = 0.3 if 'scale' in name else 0.05 if 'embedding' in name else 0.25
    drawn = std * random.standard_normal(like.shape)
    return jnp.asarray(drawn.astype(like.dtype))  # nothing to compile

  return jax.tree_util.tree_map_with_path(leaf, abstract_params(kind, config))


def their_tensors(
    kind: str, config: GemmaConfig, params: Params, **names: str
) -> dict[str, np.ndarray]:
  """The tensors of a file that holds `params`; `names` as in list_tensors."""
  leaves = traverse_util.flatten_dict(params, sep='/')
  tensors = {}
  for t in list_tensors(kind, config, **names):
    leaf = np.asarray(leaves[t.path])
    layer = leaf if t.layer is None else leaf[t.layer]
    tensors[t.name] = np.ascontiguousarray(to_theirs(layer, t.inputs))
  return tensors


def left_padded(lengths: list[int], width: int, seed: int = 0) -> tuple:
  """int32 [B, L] random tokens and their bool mask, padded on the left."""
  tokens = np.random.default_rng(seed).integers(3, 50, (len(lengths), width))
  mask = np.arange(width) >= width - np.array(lengths)[:, None]
  return np.where(mask, tokens, 0).astype(np.int32), mask


def assert_same_bits(ours: Params, theirs: Params) -> None:
  """Equal trees and leaves, dtype included."""
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(
        np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)
    )


def loss(
    config: GemmaConfig, params: Params, tokens: Array, mask: Array
) -> Array:
  """A sum over the logits at real tokens; id v counts sin(v), so 0 nothing."""
  hidden = gemma.hidden_states(config, params, tokens, mask)
  softcap = config.final_softcap
  logits = vocabulary.head_logits(hidden, params['embedding'], softcap=softcap)
  weights_V = jnp.sin(jnp.arange(config.vocab_size, dtype=logits.dtype))
  return jnp.sum(jnp.where(mask[..., None], jnp.sin(logits), 0) @ weights_V)


states = jax.jit(gemma.hidden_states, static_argnums=0)
value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)


def rounding(
    config: GemmaConfig, params: Params, tokens: Array, mask: Array
) -> float:
  """How far hidden states of real tokens may be off, see `tolerance`."""
  real = lambda p: states(config, p, tokens, mask)[np.asarray(mask)]
  (bound,) = tolerance.of_sums(real, (params,), config.mlp_dim)
  return bound


def gradient_rounding(
    config: GemmaConfig, params: Params, tokens: Array, mask: Array
) -> list[float]:
  """The same of `value_and_grad`, whose sums go over tokens and entries."""
  return tolerance.of_sums(
      lambda p: value_and_grad(config, p, tokens, mask),
      (params,),
      tokens.size * config.vocab_size,
  )


def plain_gemma(
    config: GemmaConfig, params: Params, tokens_l: list[int]
) -> np.ndarray:
  """float64 hidden states [l, D] of one row without padding, by loops."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  half, group = config.head_dim // 2, config.num_heads // config.num_kv_heads
  scalar = config.query_pre_attn_scalar or config.head_dim
  window = config.sliding_window

  def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    rms = np.sqrt(np.mean(x * x, -1, keepdims=True) + config.norm_eps)
    return x / rms * (1 + scale)

  def capped(x: np.ndarray, cap: float) -> np.ndarray:
    return cap * np.tanh(x / cap) if cap else x

  def turn(x: np.ndarray, position: int) -> np.ndarray:
    out = np.empty_like(x)
    for i in range(half):
      angle = position / config.rope_theta ** (2 * i / config.head_dim)
      sin, cos = np.sin(angle), np.cos(angle)
      out[i] = x[i] * cos - x[half + i] * sin
      out[half + i] = x[half + i] * cos + x[i] * sin
    return out

  x = p['embedding'][np.asarray(tokens_l)] * np.sqrt(config.embed_dim)
  for layer in range(config.num_layers):
    w = jax.tree.map(lambda leaf, n=layer: leaf[n], p['layers'])
    a, mlp = w['attention'], w['mlp']
    h = norm(x, w['attention_norm']['scale'])
    slides = config.sliding_layers and config.sliding_layers[layer]
    added = np.zeros_like(x)
    for n in range(config.num_heads):
      k = n // group
      keys = [turn(h[t] @ a['key'][:, k], t) for t in range(len(x))]
      values = [row @ a['value'][:, k] for row in h]
      for t in range(len(x)):
        seen = slice(max(0, t + 1 - window) if slides else 0, t + 1)
        query = turn(h[t] @ a['query'][:, n], t)
        scores = np.array([query @ key for key in keys[seen]]) / np.sqrt(scalar)
        weights = np.exp(capped(scores, config.attn_softcap))
        mixed = weights @ np.array(values[seen]) / weights.sum()
        added[t] += mixed @ a['out'][n]
    if config.family == 'gemma2':
      added = norm(added, w['attention_post_norm']['scale'])
    x = x + added
    h = norm(x, w['mlp_norm']['scale'])
    gate = h @ mlp['gate']
    cube = gate + 0.044715 * gate**3
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * cube))
    added = (gelu * (h @ mlp['up'])) @ mlp['down']
    if config.family == 'gemma2':
      added = norm(added, w['mlp_post_norm']['scale'])
    x = x + added
  return norm(x, p['final_norm']['scale'])
