"""Log-probs on one device: all tokens against one block of the vocabulary.

The forward pass carries a few sums of each token over the blocks. The backward
pass makes the logits again, and writes the gradient of each block of the table
once, where it belongs. N counts tokens.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ma_rlhf_jax.models.vocabulary import head_logits
from ma_rlhf_jax.structs import Array

# Blocks are multiples of this, the width of a vector unit, where they can be.
_LANES = 128


class Settings(NamedTuple):
  """What is computed; hashable.

  Attributes:
    softcap: of the logits; 0 = off.
    temperature: T, which divides them.
    with_entropy: also compute entropies, else they are 0.
    chunk_tokens: tokens, all logits of which take as much as a block's.
  """

  softcap: float
  temperature: float
  with_entropy: bool
  chunk_tokens: int


class _Sums(NamedTuple):
  """Of each token, [N], over the blocks so far; l = logits - top.

  Attributes:
    top: the largest logit.
    weights: sum(exp(l)).
    weighted: sum(exp(l) * l), for the entropy.
    picked: the logit of the token itself.
  """

  top: Array
  weights: Array
  weighted: Array
  picked: Array


def _over_blocks(
    function: Callable[[Any, Array | int, int], Any],
    carry: Any,
    settings: Settings,
    *,
    tokens: int,
    vocab: int,
) -> Any:
  """`function(carry, first row, rows)` of one block after the other."""
  block = min(max(settings.chunk_tokens * vocab // tokens, 1), vocab)
  block = -(-vocab // -(-vocab // block))  # as even as they can be
  if _LANES < block < vocab:
    block -= block % _LANES
  whole, rest = divmod(vocab, block)
  carry, _ = jax.lax.scan(
      lambda carry, first: (function(carry, first, block), None),
      carry,
      jnp.arange(whole, dtype=jnp.int32) * block,
  )
  return function(carry, vocab - rest, rest) if rest else carry


def _logits(hidden_ND: Array, rows_vD: Array, settings: Settings) -> Array:
  logits_Nv = head_logits(hidden_ND, rows_vD, softcap=settings.softcap)
  return logits_Nv / settings.temperature


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def block_logprobs(
    hidden_ND: Array, embedding_VD: Array, tokens_N: Array, settings: Settings
) -> tuple[Array, Array]:
  """(log-probs, entropies) [N] in nats, see `logprobs.token_logprobs`."""
  found, _ = _with_normalizers(hidden_ND, embedding_VD, tokens_N, settings)
  return found


def _with_normalizers(
    hidden_ND: Array, embedding_VD: Array, tokens_N: Array, settings: Settings
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
  """The results; the largest logits [N], and the logsumexp above them.

  Their sum would round away what the logsumexp adds to a large logit.
  """

  def add(sums: _Sums, first: Array | int, size: int) -> _Sums:
    rows_vD = jax.lax.dynamic_slice_in_dim(embedding_VD, first, size)
    logits_Nv = _logits(hidden_ND, rows_vD, settings)
    top_N = jnp.maximum(sums.top, jnp.max(logits_Nv, axis=-1))
    shifted_Nv = logits_Nv - top_N[:, None]
    weights_Nv = jnp.exp(shifted_Nv)
    lower_N = sums.top - top_N
    shrunk_N = jnp.exp(lower_N)
    weighted_N = sums.weighted
    if settings.with_entropy:
      weighted_N = shrunk_N * (weighted_N + lower_N * sums.weights)
      weighted_N += jnp.sum(weights_Nv * shifted_Nv, axis=-1)
    at_N = tokens_N - first
    inside_N = (at_N >= 0) & (at_N < size)
    at_N1 = jnp.where(inside_N, at_N, 0)[:, None]
    found_N = jnp.take_along_axis(logits_Nv, at_N1, axis=-1)[:, 0]
    return _Sums(
        top=top_N,
        weights=shrunk_N * sums.weights + jnp.sum(weights_Nv, axis=-1),
        weighted=weighted_N,
        picked=jnp.where(inside_N, found_N, sums.picked),
    )

  one = jax.eval_shape(
      functools.partial(_logits, settings=settings), hidden_ND, embedding_VD
  )
  zero_N = jnp.zeros(one.shape[0], one.dtype)
  # Not minus infinity, which times a sum of nothing would not be a number.
  lowest_N = jnp.full_like(zero_N, jnp.finfo(one.dtype).min)
  sums = _over_blocks(
      add,
      _Sums(lowest_N, zero_N, zero_N, zero_N),
      settings,
      tokens=hidden_ND.shape[0],
      vocab=embedding_VD.shape[0],
  )
  log_N = jnp.log(sums.weights)
  entropy_N = zero_N
  if settings.with_entropy:
    entropy_N = log_N - sums.weighted / sums.weights
  return (sums.picked - sums.top - log_N, entropy_N), (sums.top, log_N)


def _forward(
    hidden_ND: Any, embedding_VD: Any, tokens_N: Any, settings: Settings
) -> tuple[tuple[Array, Array], tuple]:
  inputs = hidden_ND.value, embedding_VD.value, tokens_N.value
  found, normalizers = _with_normalizers(*inputs, settings)
  # Of a table that does not learn no gradient is made.
  learns = () if embedding_VD.perturbed else None
  return found, (*inputs, found[1], *normalizers, learns)


def _backward(
    settings: Settings, saved: tuple, grads: tuple[Any, Any]
) -> tuple[Array, Array | None, None]:
  hidden_ND, embedding_VD, tokens_N, entropy_N, top_N, log_N, learns = saved
  flat = lambda x: not isinstance(x, jax.custom_derivatives.SymbolicZero)
  logprob_grad_N, entropy_grad_N = (x if flat(x) else None for x in grads)

  def logits_grad(logits_Nv: Array, ids_v: Array) -> Array:
    logprob_Nv = (logits_Nv - top_N[:, None]) - log_N[:, None]
    probs_Nv = jnp.exp(logprob_Nv)
    total_Nv = jnp.zeros_like(logits_Nv)
    if logprob_grad_N is not None:
      hit_Nv = ids_v[None] == tokens_N[:, None]
      total_Nv += logprob_grad_N[:, None] * (hit_Nv - probs_Nv)
    if settings.with_entropy and entropy_grad_N is not None:
      apart_Nv = logprob_Nv + entropy_N[:, None]
      total_Nv -= entropy_grad_N[:, None] * probs_Nv * apart_Nv
    return total_Nv

  def add(carry: tuple, first: Array | int, size: int) -> tuple:
    hidden_grad_ND, table_grad_VD = carry
    rows_vD = jax.lax.dynamic_slice_in_dim(embedding_VD, first, size)
    logits_Nv, pull = jax.vjp(
        functools.partial(_logits, settings=settings), hidden_ND, rows_vD
    )
    ids_v = first + jnp.arange(size, dtype=jnp.int32)
    back_ND, back_vD = pull(logits_grad(logits_Nv, ids_v))
    if table_grad_VD is not None:
      table_grad_VD = jax.lax.dynamic_update_slice_in_dim(
          table_grad_VD, back_vD, first, axis=0
      )
    return hidden_grad_ND + back_ND, table_grad_VD

  hidden_grad_ND, table_grad_VD = _over_blocks(
      add,
      (
          jnp.zeros(hidden_ND.shape, top_N.dtype),
          None if learns is None else jnp.zeros_like(embedding_VD),
      ),
      settings,
      tokens=hidden_ND.shape[0],
      vocab=embedding_VD.shape[0],
  )
  return hidden_grad_ND.astype(hidden_ND.dtype), table_grad_VD, None


block_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)
