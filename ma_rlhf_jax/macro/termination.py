"""Where macro actions start: the termination conditions.

A rule looks at finished responses and says which tokens open a macro action:

  tokens     the cat sat on  the mat eos pad
  starts      1   0   0   1   0   0   1   0      fixed, 3 tokens
  macro ids   0   0   0   1   1   1   2   8      T = 8 marks padding

A new rule is one function of `TerminationInputs` and `TerminationSettings` and
one entry in `RULES`. Whatever a rule says, `macro_actions` opens one at the
first real token, so that every response token belongs to exactly one.

Source: MA-RLHF, arXiv 2410.02743, appendix B.4.
"""

from collections.abc import Callable
import dataclasses

import chex
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from ma_rlhf_jax import masking
from ma_rlhf_jax.structs import Array, MacroActions


@dataclasses.dataclass(frozen=True)
class TerminationSettings:
  """What is fixed for a run; hashable, a static argument under `jit`.

  Attributes:
    termination: name of the rule, a key of `RULES`.
    ngram: tokens per macro action of `fixed`; 0 = infinity.
    random_lengths: tokens, the lengths that `randomised` shuffles.
    random_repeats: how often each of them occurs.
  """

  termination: str
  ngram: int
  random_lengths: tuple[int, ...]
  random_repeats: int


@struct.dataclass
class TerminationInputs:
  """What a rule may look at.

  Attributes:
    mask_BT: bool, true on real response tokens.
    ref_logprobs_BT: float, nats, under the reference policy; anything on
      padding.
    keys_B: one random key for each row.
  """

  mask_BT: Array
  ref_logprobs_BT: Array
  keys_B: Array


def _check(mask_BT: Array) -> None:
  chex.assert_rank(mask_BT, 2)
  chex.assert_type(mask_BT, bool)


def fixed(mask_BT: Array, *, ngram: int) -> Array:
  """bool [B, T]: every `ngram` tokens; 0 = one macro action per response."""
  _check(mask_BT)
  position_BT = masking.positions(mask_BT)
  place_BT = position_BT % ngram if ngram else position_BT
  return mask_BT & (place_BT == 0)


def from_lengths(mask_BT: Array, lengths_BR: Array) -> Array:
  """Macro actions of given lengths, consumed in order.

  Args:
    mask_BT: bool, true on real response tokens.
    lengths_BR: int32 >= 1, tokens, of the first R macro actions of each row.
      What a response has beyond their sum is one more macro action.

  Returns:
    bool [B, T], true where a macro action opens.
  """
  _check(mask_BT)
  chex.assert_shape(lengths_BR, (mask_BT.shape[0], None))
  position_BT1 = masking.positions(mask_BT)[:, :, None]
  starts_B1R = jnp.cumsum(lengths_BR, axis=1, dtype=jnp.int32)[:, None, :]
  opens_BT = jnp.any(position_BT1 == starts_B1R, axis=-1)
  return mask_BT & (opens_BT | (position_BT1[..., 0] == 0))


def randomised(
    mask_BT: Array, keys_B: Array, *, lengths: tuple[int, ...], repeats: int
) -> Array:
  """Macro actions of shuffled lengths, each row in its own order.

  Args:
    mask_BT: bool, true on real response tokens.
    keys_B: one random key for each row.
    lengths: tokens, >= 1.
    repeats: how often each length occurs in the shuffled list.

  Returns:
    bool [B, T], true where a macro action opens; see `from_lengths`.
  """
  list_R = jnp.tile(jnp.asarray(lengths, dtype=jnp.int32), repeats)
  shuffle = lambda key: jax.random.permutation(key, list_R)
  return from_lengths(mask_BT, jax.vmap(shuffle)(keys_B))


def _cut_on_rise(
    logprobs_BT: Array,
    mask_BT: Array,
    level_after: Callable[[Array, Array, Array], Array],
) -> Array:
  """Opens a macro action at each token whose nll lies above the level.

  Args:
    logprobs_BT: float, nats; anything on padding.
    mask_BT: bool, true on real response tokens.
    level_after: (level_B, nll_B, count_B) -> the level once the token with
      this nll has joined as the `count`-th of its macro action. The first
      token of a macro action sets the level to its own nll.

  Returns:
    bool [B, T].
  """
  _check(mask_BT)
  chex.assert_equal_shape([logprobs_BT, mask_BT])
  nll_BT = jnp.where(mask_BT, -logprobs_BT, 0)
  nll_BT = nll_BT.astype(masking.wide(nll_BT.dtype))

  def step(carry, token):
    level_B, count_B = carry
    nll_B, mask_B = token
    opens_B = mask_B & ((count_B == 0) | (nll_B > level_B))
    new_count_B = jnp.where(opens_B, 1, count_B + 1)
    joined_B = level_after(level_B, nll_B, new_count_B)
    new_level_B = jnp.where(opens_B, nll_B, joined_B)
    level_B = jnp.where(mask_B, new_level_B, level_B)
    return (level_B, jnp.where(mask_B, new_count_B, count_B)), opens_B

  start = (
      jnp.zeros_like(nll_BT[:, 0]),
      jnp.zeros_like(mask_BT[:, 0], jnp.int32),
  )
  _, opens_TB = lax.scan(step, start, (nll_BT.T, mask_BT.T))
  return opens_TB.T


def ppl(logprobs_BT: Array, mask_BT: Array) -> Array:
  """Ends a macro action when the next token would raise its perplexity.

  perplexity = exp(-mean(logprobs of the macro action)), so a token opens the
  next one when its own nll is strictly above the mean nll so far.

  Args:
    logprobs_BT: float, nats; anything on padding.
    mask_BT: bool, true on real response tokens.

  Returns:
    bool [B, T], true where a macro action opens.

  Source: arXiv 2410.02743, the formal rule; its pseudocode is `ppl_adjacent`.
  """

  # A running mean of equal numbers stays exact, so that a tie does not cut.
  def mean(level_B: Array, nll_B: Array, count_B: Array) -> Array:
    return level_B + (nll_B - level_B) / count_B.astype(nll_B.dtype)

  return _cut_on_rise(logprobs_BT, mask_BT, mean)


def ppl_adjacent(logprobs_BT: Array, mask_BT: Array) -> Array:
  """Opens a macro action where a token's nll exceeds the previous token's.

  Args:
    logprobs_BT: float, nats; anything on padding.
    mask_BT: bool, true on real response tokens.

  Returns:
    bool [B, T], true where a macro action opens.

  Source: arXiv 2410.02743, the pseudocode. The authors' code opens at the token
  before the rise instead.
  """
  return _cut_on_rise(logprobs_BT, mask_BT, lambda level, nll, count: nll)


Rule = Callable[[TerminationInputs, TerminationSettings], Array]

RULES: dict[str, Rule] = {
    'fixed': lambda x, s: fixed(x.mask_BT, ngram=s.ngram),
    'randomised': lambda x, s: randomised(
        x.mask_BT,
        x.keys_B,
        lengths=s.random_lengths,
        repeats=s.random_repeats,
    ),
    'ppl': lambda x, s: ppl(x.ref_logprobs_BT, x.mask_BT),
    'ppl_adjacent': lambda x, s: ppl_adjacent(x.ref_logprobs_BT, x.mask_BT),
}


def macro_actions(starts_BT: Array, mask_BT: Array) -> MacroActions:
  """Macro actions from their first tokens.

  Args:
    starts_BT: bool, true where a macro action opens. Padding is ignored, and
      the first real token of a row opens one in any case.
    mask_BT: bool, true on real response tokens.

  Returns:
    Macro actions that are never empty and hold each real token exactly once.
  """
  _check(mask_BT)
  chex.assert_equal_shape([starts_BT, mask_BT])
  first_BT = jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) == 1
  starts_BT = mask_BT & (starts_BT | first_BT)
  ids_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32) - 1
  return MacroActions(
      ids_BT=jnp.where(mask_BT, ids_BT, mask_BT.shape[1]),
      starts_BT=starts_BT,
      mask_BT=mask_BT,
  )


def segment(
    inputs: TerminationInputs, settings: TerminationSettings
) -> MacroActions:
  """The macro actions of a batch under the rule that `settings` names."""
  starts_BT = RULES[settings.termination](inputs, settings)
  return macro_actions(starts_BT, inputs.mask_BT)
