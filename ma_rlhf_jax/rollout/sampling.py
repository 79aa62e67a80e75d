"""Drawing one token a row from logits."""

import chex
import jax
import jax.numpy as jnp

from ma_rlhf_jax.structs import Array

# Entries that are looked at together where a vocabulary is searched; 2,000
# blocks in Gemma's.
_BLOCK = 128


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


def largest(x_BV: Array, k: int) -> tuple[Array, Array]:
  """The k largest entries of each row and their indices, largest first.

  Of equal entries the one with the smaller index comes first, as in
  `jax.lax.top_k`, which costs several times as much over a large vocabulary:
  the k largest entries lie in the k blocks with the largest maxima.

  Args:
    x_BV: float.
    k: at most V.

  Returns:
    values [B, k] and indices, int32 [B, k].
  """
  batch, vocab = x_BV.shape
  blocks = vocab // _BLOCK
  if vocab % _BLOCK or k >= blocks:
    values, indices = jax.lax.top_k(x_BV, k)
    return values, indices.astype(jnp.int32)
  x_BNb = x_BV.reshape(batch, blocks, _BLOCK)
  _, chosen_Bk = jax.lax.top_k(jnp.max(x_BNb, axis=-1), k)
  chosen_Bk = jnp.sort(chosen_Bk, axis=-1)  # so that ties stay in order
  inside_Bkb = jnp.take_along_axis(x_BNb, chosen_Bk[..., None], axis=1)
  values, places = jax.lax.top_k(inside_Bkb.reshape(batch, k * _BLOCK), k)
  block_Bk = jnp.take_along_axis(chosen_Bk, places // _BLOCK, axis=1)
  return values, (block_Bk * _BLOCK + places % _BLOCK).astype(jnp.int32)


def nucleus(logits_BC: Array, top_p: float) -> Array:
  """bool [B, C]: the first candidates whose mass together reaches `top_p`.

  Args:
    logits_BC: float, nats, largest first; their mass counts as 1.
    top_p: in (0, 1]; the first candidate always stays.

  Source: arXiv 1904.09751.
  """
  p_BC = jax.nn.softmax(logits_BC, axis=-1)
  return jnp.cumsum(p_BC, axis=-1) - p_BC < top_p


def _in_blocks(logits_BV: Array) -> Array:
  """[B, N, b]: a large vocabulary in blocks, a small one as a single block."""
  batch, vocab = logits_BV.shape
  if vocab % _BLOCK or vocab <= 2 * _BLOCK:
    return logits_BV[:, None]
  return logits_BV.reshape(batch, -1, _BLOCK)


def _draw_any(logits_BNb: Array, log_masses_BN: Array, keys_B: Array) -> Array:
  """int32 [B]: a draw from softmax(logits): a block first, then inside it.

  One random number for each block and each of its entries, not for each of V.
  """
  draw = jax.vmap(jax.random.categorical)
  blocks, size = logits_BNb.shape[1:]
  if blocks == 1:
    return draw(keys_B, logits_BNb[:, 0]).astype(jnp.int32)
  keys_B2 = jax.vmap(jax.random.split)(keys_B)
  block_B = draw(keys_B2[:, 0], log_masses_BN)
  inside_Bb = jnp.take_along_axis(logits_BNb, block_B[:, None, None], axis=1)
  place_B = draw(keys_B2[:, 1], inside_Bb[:, 0])
  return (block_B * size + place_B).astype(jnp.int32)


def _draw_filtered(
    logits_BV: Array, keys_B: Array, *, top_k: int, top_p: float
) -> tuple[Array, Array]:
  """Tokens [B] and log-mass [B] of what was kept, relative to the logits."""
  vocab = logits_BV.shape[-1]
  values_BC, ids_BC = largest(logits_BV, min(top_k or vocab, vocab))
  if top_p < 1.0:
    inside_BC = nucleus(values_BC, top_p)
    values_BC = jnp.where(inside_BC, values_BC, -jnp.inf)
  place_B = jax.vmap(jax.random.categorical)(keys_B, values_BC)
  tokens_B = jnp.take_along_axis(ids_BC, place_B[:, None], axis=1)[:, 0]
  return tokens_B, jax.nn.logsumexp(values_BC, axis=-1)


def sample(
    logits_BV: Array,
    keys_B: Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    banned_id: Array | int | None = None,
) -> tuple[Array, Array, Array]:
  """Draws a token a row from softmax(logits / temperature), filtered.

  Top-k keeps the k most probable tokens, of equal ones those that come first.
  Top-p keeps the fewest of the most probable tokens that are left whose
  renormalised mass reaches `top_p`; the first always stays.

  Args:
    logits_BV: float logits.
    keys_B: one random key a row.
    temperature: >= 0; 0 takes the most probable token.
    top_k: 0 = off.
    top_p: 1 = off.
    banned_id: int, a token that must not be drawn; negative or None = none.

  Returns:
    tokens_B: int32.
    logprobs_B: nats, under the distribution drawn from (0 at temperature 0).
    kept_mass_B: mass of softmax(logits / temperature) that filters and ban
      left (1 at temperature 0).
  """
  chex.assert_rank([logits_BV, keys_B], [2, 1])
  vocab = logits_BV.shape[-1]
  banned = jnp.asarray(-1 if banned_id is None else banned_id, jnp.int32)
  is_banned_V = jnp.arange(vocab, dtype=jnp.int32) == banned
  allowed_BV = jnp.where(is_banned_V[None], -jnp.inf, logits_BV)
  if temperature == 0.0:
    tokens_B = jnp.argmax(allowed_BV, axis=-1).astype(jnp.int32)
    zeros_B = jnp.zeros(tokens_B.shape, logits_BV.dtype)
    return tokens_B, zeros_B, zeros_B + 1
  tempered_BV = allowed_BV / temperature
  # Masses of blocks are summed once; those of the whole follow from them.
  blocks_BNb = _in_blocks(tempered_BV)
  log_masses_BN = jax.nn.logsumexp(blocks_BNb, axis=-1)
  log_allowed_B = jax.nn.logsumexp(log_masses_BN, axis=-1)
  lost_B = jnp.where(banned >= 0, logits_BV[:, banned] / temperature, -jnp.inf)
  if 0 < top_k < vocab or top_p < 1.0:
    tokens_B, log_mass_B = _draw_filtered(
        tempered_BV, keys_B, top_k=top_k, top_p=top_p
    )
  else:
    tokens_B = _draw_any(blocks_BNb, log_masses_BN, keys_B)
    log_mass_B = log_allowed_B
  drawn_B = jnp.take_along_axis(tempered_BV, tokens_B[:, None], axis=-1)[:, 0]
  log_z_B = jnp.logaddexp(log_allowed_B, lost_B)
  kept_mass_B = jnp.minimum(jnp.exp(log_mass_B - log_z_B), 1)
  return tokens_B, drawn_B - log_mass_B, kept_mass_B
