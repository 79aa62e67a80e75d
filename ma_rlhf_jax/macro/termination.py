"""Where macro actions start: the termination conditions.

A rule looks at finished responses and says which tokens open a macro action:

  tokens     the cat sat on  the mat eos pad
  starts      1   0   0   1   0   0   1   0      fixed, 3 tokens
  macro ids   0   0   0   1   1   1   2   8      T = 8 marks padding

A new rule is one function of `TerminationInputs` and `TerminationSettings` and
one entry in `RULES`, or a function of the user's own, which a config names as
`module:function`. Whatever a rule says, `macro_actions` opens one at the first
real token, so that every response token belongs to exactly one. Rules that
read the text instead live in `macro.host` and hand over `host_starts_BT`.

Source: MA-RLHF, arXiv 2410.02743, appendix B.4.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Self

import chex
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ma_rlhf_jax import masking, registry
from ma_rlhf_jax.macro import authors
from ma_rlhf_jax.structs import Array, MacroActions, Scored


@dataclasses.dataclass(frozen=True)
class TerminationSettings:
  """What is fixed for a run; hashable, a static argument under `jit`.

  Fields of `macro`, see `config_fields`.
  """

  termination: str
  ngram: int = 5
  random_lengths: tuple[int, ...] = (2, 3, 5, 10)
  random_repeats: int = 3
  random_leftover: str = 'one'
  cut_probability: float = 0.9
  cut_count: int = 5
  min_len: int = 1
  max_len: int = 0
  last_token_alone: bool = False
  empty_step: bool = False
  logprobs: str = 'ref'

  @classmethod
  def from_config(cls, macro: ConfigDict) -> Self:
    """The settings in the `macro` block of a config."""
    values = {f.name: macro[f.name] for f in dataclasses.fields(cls)}
    values['random_lengths'] = tuple(values['random_lengths'])
    return cls(**values)

  @property
  def asks_models(self) -> bool:
    """Whether the rule may read what models say about the response."""
    known = self.termination in RULES or registry.is_path(self.termination)
    return known and self.termination not in BY_POSITION


@struct.dataclass
class TerminationInputs:
  """What a rule may look at.

  Attributes:
    mask_BT: bool, true on real response tokens.
    logprobs_BT: float, nats, under the model that `macro.logprobs` names;
      anything on padding.
    keys_B: one random key for each row.
    host_starts_BT: bool, true where a rule of the host opens a macro action;
      None where the rule runs on the device.
    scored: all that the models say about the responses; None where the rule
      asks none of them.
  """

  mask_BT: Array
  logprobs_BT: Array
  keys_B: Array
  host_starts_BT: Array | None = None
  scored: Scored | None = None


def _check(mask_BT: Array) -> None:
  chex.assert_rank(mask_BT, 2)
  chex.assert_type(mask_BT, bool)


def fixed(mask_BT: Array, *, ngram: int) -> Array:
  """bool [B, T]: every `ngram` tokens; 0 = one macro action per response."""
  _check(mask_BT)
  position_BT = masking.positions(mask_BT)
  place_BT = position_BT % ngram if ngram else position_BT
  return mask_BT & (place_BT == 0)


def from_lengths(
    mask_BT: Array, lengths_BR: Array, *, leftover: str = 'one'
) -> Array:
  """Macro actions of given lengths, consumed in order.

  Args:
    mask_BT: bool, true on real response tokens.
    lengths_BR: int32 >= 1, tokens, of the first R macro actions of each row.
    leftover: what a response has beyond their sum is `one` more macro action
      (paper), or the list is gone through again, `cycle`.

  Returns:
    bool [B, T], true where a macro action opens.
  """
  _check(mask_BT)
  chex.assert_shape(lengths_BR, (mask_BT.shape[0], None))
  position_BT = masking.positions(mask_BT)
  # No response is longer than T, so longer lengths change nothing.
  lengths_BR = jnp.minimum(lengths_BR, mask_BT.shape[1]).astype(jnp.int32)
  ends_BR = jnp.cumsum(lengths_BR, axis=1, dtype=jnp.int32)
  if leftover == 'cycle':
    position_BT = position_BT % ends_BR[:, -1:]
  opens_BT = jnp.any(position_BT[:, :, None] == ends_BR[:, None, :], axis=-1)
  return mask_BT & (opens_BT | (position_BT == 0))


def randomised(
    mask_BT: Array,
    keys_B: Array,
    *,
    lengths: tuple[int, ...],
    repeats: int,
    leftover: str = 'one',
) -> Array:
  """Macro actions of shuffled lengths, each row in its own order.

  Args:
    mask_BT: bool, true on real response tokens.
    keys_B: one random key for each row.
    lengths: tokens, >= 1.
    repeats: how often each length occurs in the shuffled list.
    leftover: see `from_lengths`.

  Returns:
    bool [B, T], true where a macro action opens; see `from_lengths`.
  """
  list_R = jnp.tile(jnp.asarray(lengths, dtype=jnp.int32), repeats)
  shuffle = lambda key: jax.random.permutation(key, list_R)
  lengths_BR = jax.vmap(shuffle)(keys_B)
  return from_lengths(mask_BT, lengths_BR, leftover=leftover)


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


def low_probability(
    logprobs_BT: Array,
    mask_BT: Array,
    *,
    cut_probability: float,
    cut_count: int,
) -> Array:
  """Opens a macro action at every `cut_count`-th improbable token.

  A token less probable than `cut_probability` is a cut point: a place where
  the response could have gone another way.

  Args:
    logprobs_BT: float, nats; anything on padding.
    mask_BT: bool, true on real response tokens.
    cut_probability: in (0, 1].
    cut_count: >= 1.

  Returns:
    bool [B, T], true where a macro action opens.

  Source: SPO, arXiv 2505.23564, section 4.1, whose segments hold a number of
  tokens with probability below 0.9. There the first cut point counts; here too.
  """
  _check(mask_BT)
  chex.assert_equal_shape([logprobs_BT, mask_BT])
  cut_BT = mask_BT & (logprobs_BT < math.log(cut_probability))
  cuts_BT = jnp.cumsum(cut_BT, axis=1, dtype=jnp.int32)
  return cut_BT & (cuts_BT % cut_count == 0)


def bounded(
    starts_BT: Array, mask_BT: Array, *, min_len: int, max_len: int
) -> Array:
  """bool [B, T]: the starts, with macro actions of lengths within bounds.

  From left to right, a start too early is dropped, one too late is put in, and
  so is one without which the rest would not come out. A response shorter than
  `min_len` is one macro action.

  Args:
    starts_BT: bool, true where a macro action should open.
    mask_BT: bool, true on real response tokens.
    min_len: tokens, >= 1.
    max_len: tokens, >= 2 * min_len - 1, so that every length from `min_len` on
      is a sum of allowed ones; 0 = no bound.

  Raises:
    ValueError: if the bounds contradict each other.
  """
  _check(mask_BT)
  chex.assert_equal_shape([starts_BT, mask_BT])
  if max_len and max_len < 2 * min_len - 1:
    raise ValueError(
        f'max_len={max_len} must be 0 or at least {2 * min_len - 1} with '
        f'min_len={min_len}: no lengths in between add up to {max_len + 1}'
    )
  most = max_len or mask_BT.shape[1]
  tokens_BT = jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32)
  left_BT = tokens_BT[:, -1:] - tokens_BT + 1  # this token included

  def step(length_B: Array, x: tuple[Array, ...]) -> tuple[Array, Array]:
    wanted_B, left_B, mask_B = x
    # Without a cut here the last `min_len` tokens could not stand alone.
    now_B = (left_B == min_len) & (length_B + left_B > most)
    may_B = (length_B >= min_len) & (left_B >= min_len)
    cut_B = may_B & (wanted_B | (length_B >= most) | now_B)
    cut_B = mask_B & (cut_B | (length_B == 0))
    grown_B = jnp.where(cut_B, 1, length_B + 1)
    return jnp.where(mask_B, grown_B, length_B), cut_B

  none_B = jnp.zeros_like(left_BT[:, 0])
  _, cuts_TB = lax.scan(step, none_B, (starts_BT.T, left_BT.T, mask_BT.T))
  return cuts_TB.T


# -> bool [B, T], true where a macro action opens.
Rule = Callable[[TerminationInputs, TerminationSettings], Array]

RULES: dict[str, Rule] = {
    'fixed': lambda x, s: fixed(x.mask_BT, ngram=s.ngram),
    'randomised': lambda x, s: randomised(
        x.mask_BT,
        x.keys_B,
        lengths=s.random_lengths,
        repeats=s.random_repeats,
        leftover=s.random_leftover,
    ),
    'ppl': lambda x, s: ppl(x.logprobs_BT, x.mask_BT),
    'ppl_adjacent': lambda x, s: ppl_adjacent(x.logprobs_BT, x.mask_BT),
    'ppl_authors': lambda x, s: authors.ppl(x.logprobs_BT, x.mask_BT),
    'low_probability': lambda x, s: low_probability(
        x.logprobs_BT,
        x.mask_BT,
        cut_probability=s.cut_probability,
        cut_count=s.cut_count,
    ),
}


# The rules that read positions alone; all others are told what the models say.
BY_POSITION = ('fixed', 'randomised')
# Those that read `logprobs_BT`, for which tools need a model.
BY_PROBABILITY = ('ppl', 'ppl_adjacent', 'ppl_authors', 'low_probability')


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
  mask_BT, starts_BT = inputs.mask_BT, inputs.host_starts_BT
  if starts_BT is None:
    name = settings.termination
    rule = registry.resolve(RULES, name, 'macro.termination')
    starts_BT = rule(inputs, settings)
  if settings.min_len > 1 or settings.max_len:
    starts_BT = bounded(
        starts_BT,
        mask_BT,
        min_len=settings.min_len,
        max_len=settings.max_len,
    )
  if not settings.last_token_alone:
    return macro_actions(starts_BT, mask_BT)
  starts_BT, empty_B = authors.last_column_alone(
      macro_actions(starts_BT, mask_BT).starts_BT,
      mask_BT,
      masking.last_real(mask_BT) + 1,
  )
  macro = macro_actions(starts_BT, mask_BT)
  return macro.replace(empty_B=empty_B) if settings.empty_step else macro
