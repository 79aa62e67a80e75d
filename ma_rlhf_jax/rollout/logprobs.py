"""Log-probs of given tokens without an array of all logits.

Gemma's vocabulary has 256,000 entries: float32 logits of one 1,024-token row
take 1 GB. So only a part of them exists at a time, in the forward and
(recomputed) in the backward pass.

One device takes all tokens against one block of the vocabulary after the other;
the gradient of each block of the table is then written once, where it belongs.

On a mesh, chunks of tokens come one after the other, and no device ever holds
the whole table of embeddings. Its rows are split over `tensor` and `fsdp`
before the loop over chunks (an all-to-all of one device's share), and the
devices of an `fsdp` group work on the same chunk, each on its own part of the
vocabulary:

  device       tokens of a chunk    rows of the table
  fsdp 0       own | others'        [0, V / 2)          each logit is computed
  fsdp 1       own | others'        [V / 2, V)          once in the group

What crosses devices in the loop are hidden states, D numbers a token, and a
few sums; the gradient of the table stays where its rows are, and is summed
over `data` once, after the loop.
"""

from collections.abc import Callable
import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ma_rlhf_jax.models.vocabulary import head_logits
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.rollout.logprob_blocks import Settings, block_logprobs
from ma_rlhf_jax.structs import Array

# The mesh axes that tokens, and rows of the table, are spread over.
_GROUP = 'fsdp'
_ROWS = ('tensor', _GROUP)


def _split_table(embedding_Vd: Array) -> tuple[Array, Array]:
  """This device's rows [v, D] and their token ids, -1 where there is none.

  Args:
    embedding_Vd: rows of this `tensor` shard, columns of this `fsdp` shard.
  """
  rows, group = embedding_Vd.shape[0], jax.lax.axis_size(_GROUP)
  padded = jnp.pad(embedding_Vd, [(0, -rows % group), (0, 0)])
  table_vD = jax.lax.all_to_all(padded, _GROUP, 0, 1, tiled=True)
  # Sums over `data` wait until the loop is over.
  table_vD = jax.lax.pcast(table_vD, 'data', to='varying')
  own_v = jnp.arange(table_vD.shape[0], dtype=jnp.int32)
  own_v += jax.lax.axis_index(_GROUP) * table_vD.shape[0]
  ids_v = own_v + jax.lax.axis_index('tensor') * rows
  return table_vD, jnp.where(own_v < rows, ids_v, -1)


@jax.custom_vjp
def _picked(x_Cv: Array, ids_v: Array, tokens_C: Array) -> Array:
  """[C]: the entry of each row whose id is the token; 0 where none is.

  Its gradient is a comparison that is fused with the rest of the softmax's; a
  gather's would be an array of zeros to scatter into.
  """
  at_C = tokens_C - ids_v[0]
  inside_C = (at_C >= 0) & (at_C < ids_v.shape[0])
  at_C1 = jnp.where(inside_C, at_C, 0)[:, None]
  found_C = jnp.take_along_axis(x_Cv, at_C1, axis=-1)[:, 0]
  return jnp.where(inside_C & (ids_v[at_C1[:, 0]] >= 0), found_C, 0)


def _picked_forward(
    x_Cv: Array, ids_v: Array, tokens_C: Array
) -> tuple[Array, tuple[Array, Array]]:
  return _picked(x_Cv, ids_v, tokens_C), (ids_v, tokens_C)


def _picked_backward(
    ids: tuple[Array, Array], grad_C: Array
) -> tuple[Array, None, None]:
  ids_v, tokens_C = ids
  hit_Cv = ids_v[None] == tokens_C[:, None]
  return jnp.where(hit_Cv, grad_C[:, None], 0), None, None


_picked.defvjp(_picked_forward, _picked_backward)


def _log_sums(
    logits_Cv: Array, tokens_C: Array, ids_v: Array, top_C: Array, entropy: bool
) -> Array:
  """[2 or 3, C]: what this part of the vocabulary adds to each sum.

  With l = logits - top: sum(exp(l)), l[token] and, for the entropy,
  sum(exp(l) * l).
  """
  shifted_Cv = logits_Cv - top_C[:, None]
  weights_Cv = jnp.exp(shifted_Cv)
  sums = [
      jnp.sum(weights_Cv, axis=-1),
      _picked(shifted_Cv, ids_v, tokens_C),
  ]
  if entropy:
    sums.append(jnp.sum(weights_Cv * shifted_Cv, axis=-1))
  return jnp.stack(sums)


def _statistics(
    hidden_CD: Array,
    tokens_C: Array,
    *,
    table_vD: Array,
    ids_v: Array,
    softcap: float,
    temperature: float,
    with_entropy: bool,
) -> tuple[Array, Array]:
  """Log-probs and entropies [C] of one chunk of this device's tokens."""
  gather = functools.partial(jax.lax.all_gather, axis_name=_GROUP, tiled=True)
  hidden_CD, tokens_C = gather(hidden_CD), gather(tokens_C)
  hidden_CD = jax.lax.pcast(hidden_CD, 'tensor', to='varying')
  logits_Cv = head_logits(hidden_CD, table_vD, softcap=softcap) / temperature
  floor = jnp.finfo(logits_Cv.dtype).min / 2
  logits_Cv = jnp.where(ids_v[None] >= 0, logits_Cv, floor)
  top_C = jax.lax.stop_gradient(jnp.max(logits_Cv, axis=-1))
  top_C = jax.lax.pmax(top_C, _ROWS)
  sums_xC = jax.lax.psum_scatter(
      jax.lax.psum(
          _log_sums(logits_Cv, tokens_C, ids_v, top_C, with_entropy), 'tensor'
      ),
      _GROUP,
      scatter_dimension=1,
      tiled=True,
  )
  log_z_C = jnp.log(sums_xC[0])
  logprobs_C = sums_xC[1] - log_z_C
  if not with_entropy:
    return logprobs_C, jnp.zeros_like(logprobs_C)
  return logprobs_C, log_z_C - sums_xC[2] / sums_xC[0]


def _in_chunks(
    statistics: Callable[[Array, Array], tuple[Array, Array]],
    hidden_BTD: Array,
    tokens_BT: Array,
    chunk: int,
) -> tuple[Array, Array]:
  """`statistics` of `chunk` tokens after the other, as [B, T]."""
  tokens = tokens_BT.size
  chunk = min(chunk, tokens)
  num = -(-tokens // chunk)

  def cut(x_BTx: Array) -> Array:
    flat = x_BTx.reshape(tokens, *x_BTx.shape[2:])
    widths = [(0, num * chunk - tokens)] + [(0, 0)] * (flat.ndim - 1)
    return jnp.pad(flat, widths).reshape(num, chunk, *flat.shape[1:])

  body = jax.checkpoint(lambda _, x: (None, statistics(*x)), prevent_cse=False)
  _, found = jax.lax.scan(body, None, (cut(hidden_BTD), cut(tokens_BT)))
  join = lambda x: x.reshape(-1)[:tokens].reshape(tokens_BT.shape)
  return join(found[0]), join(found[1])


def token_logprobs(
    hidden_BTD: Array,
    embedding_VD: Array,
    tokens_BT: Array,
    *,
    softcap: float,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool = False,
) -> tuple[Array, Array]:
  """Log-probs (and entropies) of tokens under softmax(head(hidden) / T).

    logprob = logits[token] / T - logsumexp(logits / T)
    entropy = logsumexp(logits / T) - sum(softmax(logits / T) * logits / T)

  Args:
    hidden_BTD: the hidden states from which the tokens are predicted. Under a
      mesh the devices that share a batch must divide B.
    embedding_VD: the tied head.
    tokens_BT: int32 tokens.
    softcap: of the logits, `final_softcap` of the model; 0 = off.
    temperature: T > 0.
    chunk_tokens: tokens; one device holds as many logits as they have, V each.
    with_entropy: also compute entropies, else they are 0.

  Returns:
    (logprobs_BT, entropy_BT) in nats, in float32 or wider; nothing is masked.
  """
  chex.assert_rank([hidden_BTD, embedding_VD, tokens_BT], [3, 2, 2])
  chex.assert_equal_shape_prefix([hidden_BTD, tokens_BT], 2)
  mesh = partition.current_mesh()
  if mesh is None:
    settings = Settings(softcap, temperature, with_entropy, chunk_tokens)
    logprobs_N, entropy_N = block_logprobs(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        embedding_VD,
        tokens_BT.reshape(-1),
        settings,
    )
    return (
        logprobs_N.reshape(tokens_BT.shape),
        entropy_N.reshape(tokens_BT.shape),
    )

  def spread(
      hidden_bTD: Array, embedding_Vd: Array, tokens_bT: Array
  ) -> tuple[Array, Array]:
    table_vD, ids_v = _split_table(embedding_Vd)
    one = functools.partial(
        _statistics,
        table_vD=table_vD,
        ids_v=ids_v,
        softcap=softcap,
        temperature=temperature,
        with_entropy=with_entropy,
    )
    # A device holds 1 / (tensor * fsdp) of the logits of fsdp such chunks.
    own = chunk_tokens * mesh.shape['tensor']
    return _in_chunks(one, hidden_bTD, tokens_bT, own)

  rows = partition.spec(('batch', None))
  return jax.shard_map(
      spread,
      in_specs=(
          partition.spec(('batch', None, None)),
          PartitionSpec('tensor', _GROUP),
          rows,
      ),
      out_specs=(rows, rows),
  )(hidden_BTD, embedding_VD, tokens_BT)
