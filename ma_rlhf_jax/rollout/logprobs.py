"""Log-probs of given tokens without an array of all logits.

Gemma's vocabulary has 256,000 entries: float32 logits of one 1,024-token row
take 1 GB. Logits exist for one chunk of tokens at a time, in the forward and
(recomputed) in the backward pass.
"""

import chex
import jax
import jax.numpy as jnp

from ma_rlhf_jax.models.gemma import head_logits
from ma_rlhf_jax.structs import Array


def _chunk_statistics(
    hidden_BCD: Array,
    embedding_VD: Array,
    tokens_BC: Array,
    *,
    softcap: float,
    temperature: float,
    with_entropy: bool,
) -> tuple[Array, Array]:
  logits_BCV = head_logits(hidden_BCD, embedding_VD, softcap=softcap)
  logits_BCV = logits_BCV / temperature
  log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
  chosen = jnp.take_along_axis(logits_BCV, tokens_BC[..., None], axis=-1)
  logprobs_BC = chosen[..., 0] - log_z_BC
  if not with_entropy:
    return logprobs_BC, jnp.zeros_like(logprobs_BC)
  probs_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
  entropy_BC = log_z_BC - jnp.sum(probs_BCV * logits_BCV, axis=-1)
  return logprobs_BC, entropy_BC


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
    hidden_BTD: the hidden states from which the tokens are predicted.
    embedding_VD: the tied head.
    tokens_BT: int32 tokens.
    softcap: of the logits, `final_softcap` of the model; 0 = off.
    temperature: T > 0.
    chunk_tokens: tokens whose logits exist at once (at least one column).
    with_entropy: also compute entropies, else they are 0.

  Returns:
    (logprobs_BT, entropy_BT) in nats, in float32 or wider; nothing is masked.
  """
  chex.assert_rank([hidden_BTD, embedding_VD, tokens_BT], [3, 2, 2])
  chex.assert_equal_shape_prefix([hidden_BTD, tokens_BT], 2)
  batch, length = tokens_BT.shape
  columns = min(length, max(1, chunk_tokens // batch))
  num_chunks = -(-length // columns)
  pad = num_chunks * columns - length

  def chunked(x_BTx: Array) -> Array:
    widths = [(0, 0), (0, pad)] + [(0, 0)] * (x_BTx.ndim - 2)
    padded = jnp.pad(x_BTx, widths)
    shape = (batch, num_chunks, columns, *x_BTx.shape[2:])
    return jnp.moveaxis(padded.reshape(shape), 1, 0)

  @jax.checkpoint
  def body(_: None, chunk: tuple[Array, Array]) -> tuple[None, tuple]:
    return None, _chunk_statistics(
        chunk[0],
        embedding_VD,
        chunk[1],
        softcap=softcap,
        temperature=temperature,
        with_entropy=with_entropy,
    )

  _, chunks = jax.lax.scan(
      body, None, (chunked(hidden_BTD), chunked(tokens_BT))
  )
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length]
  return join(chunks[0]), join(chunks[1])
