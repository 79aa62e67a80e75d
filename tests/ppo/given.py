"""Two responses of four columns and all that is said of them, by hand."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ma_rlhf_jax.macro.termination import TerminationSettings
from ma_rlhf_jax.objective.advantage import Objective
from ma_rlhf_jax.ppo import step
from ma_rlhf_jax.ppo.host import HostAnswers
from ma_rlhf_jax.ppo.method import Method
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    Models,
    Scored,
    SequenceBatch,
)
from tests import tiny

NAN = math.nan
MASK = jnp.array([[True, True, True, True], [True, True, False, False]])
_TOKENS = jnp.zeros((2, 7), jnp.int32)
SEQUENCES = SequenceBatch(_TOKENS, _TOKENS == 0, MASK)
# Log-ratios .2 .4 -.6 .8 and -.4 .2; scores beyond and within +-2.5.
SCORED = Scored(
    logprobs_BT=jnp.array([[-1.0, -2, -3, -1], [-0.5, -1, NAN, NAN]]),
    ref_logprobs_BT=jnp.array(
        [[-1.2, -2.4, -2.4, -1.8], [-0.1, -1.2, NAN, NAN]]
    ),
    entropy_BT=jnp.array([[1.0, 2, 3, 4], [2, 6, NAN, NAN]]),
    values_BT=jnp.array([[0.5, 7, -0.25, 9], [1.5, 3, NAN, NAN]]),
    score_B=jnp.array([4.0, -1.5]),
)
FIELDS = {
    'ppo__score_clip': 2.5,
    'ppo__gamma': 0.8,
    'ppo__gae_lambda': 0.5,
    'macro__ngram': 2,
    'critic__target': 'macro',
}


def method(temperature: float = 1.0, **fields: Any) -> Method:
  """Of four tiny models and `tiny.config(**fields)`."""
  config = tiny.config(**fields)
  return Method(
      Models(*[tiny.SHAPE] * 4),
      Objective.from_config(config),
      TerminationSettings.from_config(config.macro),
      temperature,
  )


def experience(
    kl_coef: float = 0.5,
    scored: Scored = SCORED,
    host: HostAnswers = HostAnswers(),  # noqa: B008
    **fields: Any,
) -> tuple[Experience, Array]:
  """By `form_experience`, with `FIELDS` and then `fields`."""
  keys_B = jax.random.split(jax.random.key(2), len(MASK))
  return step.form_experience(
      SEQUENCES,
      scored,
      keys_B,
      jnp.float32(kl_coef),
      host,
      method(**FIELDS | fields),
  )
