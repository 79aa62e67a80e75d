"""Prompts -> responses: prefill and decode in one jitted program.

The loop over tokens runs in stages. Within one, attention looks at the slots
that the stage can fill, not at all of them; between two, the rows that have
ended are set aside, and the others go on in a smaller batch.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.models.cache import Cache
from ma_rlhf_jax.models.gemma import Gemma
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.models.vocabulary import head_logits
from ma_rlhf_jax.rollout import live_rows
from ma_rlhf_jax.rollout.live_rows import DecodeState
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
    int8_cache: hold keys and values in 8 bits, which changes what is drawn.
  """

  max_new_tokens: int
  eos_id: int
  pad_id: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_new_tokens: int = 0
  int8_cache: bool = False


def _prefill(
    config: GemmaConfig,
    params: Params,
    prompts: PromptBatch,
    keys_B: Array,
    s: SamplingSettings,
    bound: int,
) -> DecodeState:
  """The state before the first response token."""
  batch, width = prompts.tokens_BP.shape
  unused = ((0, 0), (0, 0), (0, bound))
  hidden_B1D, cache = Gemma(config).apply(
      {'params': params},
      prompts.tokens_BP,
      masking.positions(prompts.mask_BP),
      jnp.pad(masking.causal_mask(prompts.mask_BP), unused),
      Cache.empty(config, batch, width + bound, int8=s.int8_cache),
      ends=1,
  )
  shape = (batch, s.max_new_tokens)
  dtype = masking.wide(config.compute_dtype)
  return DecodeState(
      t=jnp.zeros((), jnp.int32),
      prompt_mask_BP=prompts.mask_BP,
      keys_B=keys_B,
      rows_B=jnp.arange(batch, dtype=jnp.int32),
      hidden_BD=hidden_B1D[:, 0],
      cache=cache,
      done_B=jnp.zeros(batch, bool),
      tokens_BT=jnp.full(shape, s.pad_id, jnp.int32),
      mask_BT=jnp.zeros(shape, bool),
      logprobs_BT=jnp.zeros(shape, dtype),
      kept_mass_BT=jnp.ones(shape, dtype),
      limits_B=prompts.limits_B,
  )


def _draw(
    config: GemmaConfig, params: Params, state: DecodeState, s: SamplingSettings
) -> DecodeState:
  """Draws response token t; ended rows get pads."""
  banned_id = None
  if s.min_new_tokens:
    banned_id = jnp.where(state.t < s.min_new_tokens, s.eos_id, -1)
  tokens_B, logprobs_B, kept_B = sample(
      head_logits(
          state.hidden_BD, params['embedding'], softcap=config.final_softcap
      ),
      jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.t),
      temperature=s.temperature,
      top_k=s.top_k,
      top_p=s.top_p,
      banned_id=banned_id,
  )
  live_B, ends_B = ~state.done_B, tokens_B == s.eos_id
  if state.limits_B is not None:
    ends_B |= state.t + 1 >= state.limits_B
  put = lambda x_BT, x_B, pad: x_BT.at[:, state.t].set(
      jnp.where(live_B, x_B, pad).astype(x_BT.dtype)
  )
  return state.replace(
      t=state.t + 1,
      done_B=state.done_B | ends_B,
      tokens_BT=put(state.tokens_BT, tokens_B, s.pad_id),
      mask_BT=put(state.mask_BT, True, False),
      logprobs_BT=put(state.logprobs_BT, logprobs_B, 0),
      kept_mass_BT=put(state.kept_mass_BT, kept_B, 1),
  )


def _advance(
    config: GemmaConfig, params: Params, state: DecodeState
) -> DecodeState:
  """Runs the model on the token drawn last."""
  column = state.t - 1
  tokens_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BT, column, 1, axis=1)
  batch, width = state.prompt_mask_BP.shape
  slots = state.cache.slots
  lengths_B = jnp.sum(state.prompt_mask_BP, axis=-1, dtype=jnp.int32)
  positions_B1 = lengths_B[:, None] + column
  # Ended rows attend to their pads; nothing reads what comes out of it.
  drawn = jnp.arange(slots - width, dtype=jnp.int32) <= column
  mask_BS = jnp.concatenate(
      [state.prompt_mask_BP, jnp.broadcast_to(drawn, (batch, slots - width))],
      axis=-1,
  )
  hidden_B1D, cache = Gemma(config).apply(
      {'params': params},
      tokens_B1,
      positions_B1,
      mask_BS[:, None],
      state.cache,
      width + column,
  )
  return state.replace(hidden_BD=hidden_B1D[:, 0], cache=cache)


def start(
    config: GemmaConfig,
    params: Params,
    prompts: PromptBatch,
    keys_B: Array,
    settings: SamplingSettings,
    bound: int | None = None,
) -> DecodeState:
  """The state after the prompts and the first response token.

  Its cache has room for `bound` response tokens, by default for all.
  """
  bound = bound or settings.max_new_tokens
  keys_B = jnp.asarray(keys_B)
  state = _prefill(config, params, prompts, keys_B, settings, bound)
  return _draw(config, params, state, settings)


def extend(
    config: GemmaConfig,
    params: Params,
    state: DecodeState,
    settings: SamplingSettings,
    more: Array | int,
) -> DecodeState:
  """`state` after `more` tokens of each row, or once all rows have ended.

  Args:
    config: shape of the policy.
    params: its parameters.
    state: what `start` or `extend` gave.
    settings: how to sample.
    more: tokens, at most those that the cache has room for.
  """

  def unfinished(carry: tuple[Array, DecodeState]) -> Array:
    # A count from 0, so that who reads the program can tell how often it runs.
    drawn, state = carry
    return (drawn < more) & ~jnp.all(state.done_B)

  def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
    drawn, state = carry
    state = _advance(config, params, state)
    return drawn + 1, _draw(config, params, state, settings)

  return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def stage_limits(max_new_tokens: int) -> tuple[int, ...]:
  """Tokens of a response after each stage: T/8, T/4, T/2 and T.

  Short responses have fewer stages: each is a program of its own to compile.
  """
  parts = [8, 4, 2] if max_new_tokens >= 256 else [2]
  if max_new_tokens < 128:
    parts = []
  return (*(max_new_tokens // part for part in parts), max_new_tokens)


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
  width = prompts.tokens_BP.shape[1]
  limits = stage_limits(settings.max_new_tokens)
  state = start(config, params, prompts, keys_B, settings, limits[0])
  drawn = 1
  for number, limit in enumerate(limits):
    # A slice of a larger cache would be copied for every token.
    state = state.replace(cache=state.cache.grown(width + limit))
    run = lambda state, more=limit - drawn: extend(
        config, params, state, settings, more
    )
    state = live_rows.run(run, state, most=2**number)
    drawn = limit
  state = live_rows.in_order(state)
  return Rollout(
      sequences=masking.join(
          prompts.tokens_BP, prompts.mask_BP, state.tokens_BT, state.mask_BT
      ),
      sample_logprobs_BT=state.logprobs_BT,
      kept_mass_BT=state.kept_mass_BT,
  )
