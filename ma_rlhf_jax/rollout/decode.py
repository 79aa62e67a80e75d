"""Prompts -> responses: prefill and decode in one jitted program."""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.models.gemma import Cache, Gemma, head_logits
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.rollout.sampling import sample
from ma_rlhf_jax.structs import Array, Params, PromptBatch, Rollout


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
  """How responses are drawn; hashable, so static under jit.

  Attributes:
    max_new_tokens: T, response columns.
    temperature: >= 0; 0 = greedy.
    top_k: 0 = off.
    top_p: 1 = off.
    min_new_tokens: tokens before EOS may be drawn.
    eos_id: ends a response.
    pad_id: fills it up.
  """

  max_new_tokens: int
  eos_id: int
  pad_id: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_new_tokens: int = 0


@struct.dataclass
class DecodeState:
  """What the decode loop carries.

  Attributes:
    t: int32 scalar, response tokens drawn so far.
    hidden_BD: hidden state from which token t is drawn.
    cache: keys and values of the prompt and of tokens before t.
    done_B: bool, rows whose EOS has been drawn.
    tokens_BT: drawn tokens, pad id elsewhere.
    mask_BT: bool, drawn tokens.
    logprobs_BT: nats, under the distribution drawn from.
    kept_mass_BT: mass that the filters left.
  """

  t: Array
  hidden_BD: Array
  cache: Cache
  done_B: Array
  tokens_BT: Array
  mask_BT: Array
  logprobs_BT: Array
  kept_mass_BT: Array


def _prefill(
    config: GemmaConfig,
    params: Params,
    prompts: PromptBatch,
    s: SamplingSettings,
) -> DecodeState:
  """The state before the first response token."""
  batch, width = prompts.tokens_BP.shape
  slots = width + s.max_new_tokens
  unused = ((0, 0), (0, 0), (0, s.max_new_tokens))
  hidden_BPD, cache = Gemma(config).apply(
      {'params': params},
      prompts.tokens_BP,
      masking.positions(prompts.mask_BP),
      jnp.pad(masking.causal_mask(prompts.mask_BP), unused),
      Cache.empty(config, batch, slots),
  )
  shape = (batch, s.max_new_tokens)
  dtype = masking.wide(config.compute_dtype)
  return DecodeState(
      t=jnp.zeros((), jnp.int32),
      hidden_BD=hidden_BPD[:, -1],
      cache=cache,
      done_B=jnp.zeros(batch, bool),
      tokens_BT=jnp.full(shape, s.pad_id, jnp.int32),
      mask_BT=jnp.zeros(shape, bool),
      logprobs_BT=jnp.zeros(shape, dtype),
      kept_mass_BT=jnp.ones(shape, dtype),
  )


def _draw(
    config: GemmaConfig,
    params: Params,
    keys_B: Array,
    state: DecodeState,
    s: SamplingSettings,
) -> DecodeState:
  """Draws response token t; ended rows get pads."""
  banned_V, embedding_VD = None, params['embedding']
  if s.min_new_tokens:
    is_eos_V = jnp.arange(embedding_VD.shape[0], dtype=jnp.int32) == s.eos_id
    banned_V = is_eos_V & (state.t < s.min_new_tokens)
  tokens_B, logprobs_B, kept_B = sample(
      head_logits(state.hidden_BD, embedding_VD, softcap=config.final_softcap),
      jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.t),
      temperature=s.temperature,
      top_k=s.top_k,
      top_p=s.top_p,
      banned_V=banned_V,
  )
  live_B = ~state.done_B
  put = lambda x_BT, x_B, pad: x_BT.at[:, state.t].set(
      jnp.where(live_B, x_B, pad).astype(x_BT.dtype)
  )
  return state.replace(
      t=state.t + 1,
      done_B=state.done_B | (tokens_B == s.eos_id),
      tokens_BT=put(state.tokens_BT, tokens_B, s.pad_id),
      mask_BT=put(state.mask_BT, True, False),
      logprobs_BT=put(state.logprobs_BT, logprobs_B, 0),
      kept_mass_BT=put(state.kept_mass_BT, kept_B, 1),
  )


def _advance(
    config: GemmaConfig,
    params: Params,
    prompt_mask_BP: Array,
    state: DecodeState,
) -> DecodeState:
  """Runs the model on the token drawn last."""
  column = state.t - 1
  tokens_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BT, column, 1, axis=1)
  lengths_B = jnp.sum(prompt_mask_BP, axis=-1, dtype=jnp.int32)
  positions_B1 = lengths_B[:, None] + column
  # Ended rows attend to their pads; nothing reads what comes out of it.
  slots_T = jnp.arange(state.tokens_BT.shape[1], dtype=jnp.int32)
  batch = prompt_mask_BP.shape[0]
  drawn_BT = jnp.broadcast_to(slots_T <= column, (batch, slots_T.shape[0]))
  mask_BS = jnp.concatenate([prompt_mask_BP, drawn_BT], axis=-1)
  hidden_B1D, cache = Gemma(config).apply(
      {'params': params},
      tokens_B1,
      positions_B1,
      mask_BS[:, None],
      state.cache,
      prompt_mask_BP.shape[1] + column,
  )
  return state.replace(hidden_BD=hidden_B1D[:, 0], cache=cache)


def start(
    config: GemmaConfig,
    params: Params,
    prompts: PromptBatch,
    keys_B: Array,
    settings: SamplingSettings,
) -> DecodeState:
  """The state after the prompts and the first response token."""
  state = _prefill(config, params, prompts, settings)
  return _draw(config, params, keys_B, state, settings)


def extend(
    config: GemmaConfig,
    params: Params,
    prompt_mask_BP: Array,
    keys_B: Array,
    state: DecodeState,
    settings: SamplingSettings,
    limit: Array | int,
) -> DecodeState:
  """`state` once `limit` tokens have been drawn, or all rows have ended."""
  limit = jnp.minimum(limit, settings.max_new_tokens)

  def unfinished(state: DecodeState) -> Array:
    return (state.t < limit) & ~jnp.all(state.done_B)

  def body(state: DecodeState) -> DecodeState:
    state = _advance(config, params, prompt_mask_BP, state)
    return _draw(config, params, keys_B, state, settings)

  return jax.lax.while_loop(unfinished, body, state)


def generate(
    config: GemmaConfig,
    params: Params,
    prompts: PromptBatch,
    keys_B: Array,
    settings: SamplingSettings,
) -> Rollout:
  """Samples one response a row; stops when every row has ended.

  Args:
    config: shape of the policy.
    params: its parameters.
    prompts: left-padded prompts with at least one real token a row.
    keys_B: one random key a row (`sampling.row_keys`).
    settings: how to sample.

  Returns:
    The rollout. A response that reached T columns without EOS has none.
  """
  keys_B = jnp.asarray(keys_B)
  state = start(config, params, prompts, keys_B, settings)
  state = extend(
      config,
      params,
      prompts.mask_BP,
      keys_B,
      state,
      settings,
      settings.max_new_tokens,
  )
  return Rollout(
      sequences=masking.join(
          prompts.tokens_BP, prompts.mask_BP, state.tokens_BT, state.mask_BT
      ),
      sample_logprobs_BT=state.logprobs_BT,
      kept_mass_BT=state.kept_mass_BT,
  )
