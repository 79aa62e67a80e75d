"""Drawing one token a row from logits."""

import chex
import jax
import jax.numpy as jnp

from ma_rlhf_jax.structs import Array


def row_keys(
    stream_key: Array,
    step: Array | int,
    prompt_ids_B: Array,
    sample_ids_B: Array,
) -> Array:
  """One key a row, from step, prompt and sample only, never from neighbours.

  Args:
    stream_key: the key of one stream of samples (a stage's rollouts, say).
    step: int, the update for which rows are drawn.
    prompt_ids_B: int32, which prompt.
    sample_ids_B: int32, which of several samples of it.
  """
  step_key = jax.random.fold_in(stream_key, step)

  def one(prompt_id: Array, sample_id: Array) -> Array:
    return jax.random.fold_in(
        jax.random.fold_in(step_key, prompt_id), sample_id
    )

  return jax.vmap(one)(prompt_ids_B, sample_ids_B)


def kept_tokens(logprobs_BV: Array, *, top_k: int, top_p: float) -> Array:
  """bool [B, V]: tokens that top-k and then top-p leave.

  Top-k keeps the k most probable tokens (ties with the k-th stay). Top-p keeps
  the smallest set of the most probable remaining tokens whose renormalised
  mass reaches `top_p` (arXiv 1904.09751); the first always stays.

  Args:
    logprobs_BV: float, nats, normalised.
    top_k: 0 = off.
    top_p: in (0, 1]; 1 = off.
  """
  keep = jnp.ones(logprobs_BV.shape, bool)
  vocab = logprobs_BV.shape[-1]
  if 0 < top_k < vocab:
    best_Bk, ids_Bk = jax.lax.top_k(logprobs_BV, top_k)
    mark = lambda keep_V, ids_k: keep_V.at[ids_k].set(True)
    # By their ids: a compiler may compute `logprobs_BV` twice, rounded apart,
    # so that the k-th is less than itself. The comparison is for ties.
    keep = jax.vmap(mark)(jnp.zeros(logprobs_BV.shape, bool), ids_Bk)
    keep |= logprobs_BV >= best_Bk[:, -1:]
  if top_p < 1.0:
    kept = jax.nn.log_softmax(jnp.where(keep, logprobs_BV, -jnp.inf), axis=-1)
    order = jnp.argsort(-kept, axis=-1, stable=True)
    sorted_p = jnp.exp(jnp.take_along_axis(kept, order, axis=-1))
    mass_before = jnp.cumsum(sorted_p, axis=-1) - sorted_p
    inside = jnp.take_along_axis(
        mass_before < top_p, jnp.argsort(order, axis=-1), axis=-1
    )
    keep &= inside
  return keep


def sample(
    logits_BV: Array,
    keys_B: Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    banned_V: Array | None = None,
) -> tuple[Array, Array, Array]:
  """Draws a token a row from softmax(logits / temperature), filtered.

  Args:
    logits_BV: float logits.
    keys_B: one random key a row.
    temperature: >= 0; 0 takes the most probable token.
    top_k: 0 = off.
    top_p: 1 = off.
    banned_V: bool, tokens that must not be drawn.

  Returns:
    tokens_B: int32.
    logprobs_B: nats, under the distribution drawn from (0 at temperature 0).
    kept_mass_B: mass of softmax(logits / temperature) that filters and ban
      left (1 at temperature 0).
  """
  chex.assert_rank([logits_BV, keys_B], [2, 1])
  allowed_BV = logits_BV
  if banned_V is not None:
    allowed_BV = jnp.where(banned_V[None], -jnp.inf, logits_BV)
  if temperature == 0.0:
    tokens_B = jnp.argmax(allowed_BV, axis=-1).astype(jnp.int32)
    zeros_B = jnp.zeros(tokens_B.shape, logits_BV.dtype)
    return tokens_B, zeros_B, zeros_B + 1
  logprobs_BV = jax.nn.log_softmax(logits_BV / temperature, axis=-1)
  keep_BV = jnp.isfinite(allowed_BV)
  if 0 < top_k or top_p < 1.0:
    allowed_BV = jax.nn.log_softmax(allowed_BV / temperature, axis=-1)
    keep_BV &= kept_tokens(allowed_BV, top_k=top_k, top_p=top_p)
  filtered_BV = jnp.where(keep_BV, logprobs_BV, -jnp.inf)
  tokens_B = jax.vmap(jax.random.categorical)(keys_B, filtered_BV)
  log_mass_B = jax.nn.logsumexp(filtered_BV, axis=-1)
  drawn = jnp.take_along_axis(filtered_BV, tokens_B[:, None], axis=-1)[:, 0]
  kept_mass_B = jnp.minimum(jnp.exp(log_mass_B), 1)
  return tokens_B.astype(jnp.int32), drawn - log_mass_B, kept_mass_B
