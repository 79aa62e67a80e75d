"""Padding, neighbours and order of rows change nothing, for every switch."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax.macro import aggregate, termination
from ma_rlhf_jax.objective import losses, rewards, targets
from tests import tiny

ARRAYS = ('logprobs', 'ref', 'values', 'new_logprobs', 'new_values')
VALUES = ('start', 'equal', 'unit', 'position', 'position_reversed')
COLUMNS = 11
# (rule, empty step and last token alone)
RULES = [
    *[(rule, False) for rule in termination.RULES],
    *[(rule, True) for rule in ('fixed', 'randomised', 'ppl_authors')],
]


@functools.partial(jax.jit, static_argnames=('settings', 'how'))
def _estimate(case: dict, *, settings: Any, how: tuple) -> dict[str, Any]:
  """Everything from masks to losses and gradients, sums over rows."""
  how = dict(how)
  mask = case['mask']
  macro = termination.segment(
      termination.TerminationInputs(mask, case['ref'], case['keys']), settings
  )
  token_rewards = rewards.token_rewards(
      case['logprobs'],
      case['ref'],
      case['score'],
      mask,
      kl_coef=0.1,
      score_clip=0.0,
  )
  made = targets.macro_targets(
      case['values'],
      token_rewards,
      macro,
      tiny.objective(
          gamma=0.9,
          gae_lambda=0.8,
          critic_lambda=0.7,
          discount='macro',
          pool_rewards=how['reward'],
          pool_values=how['value'],
          advantage=how['advantage'],
          critic_target=how['target'],
      ),
  )
  weights = losses.loss_weights(
      mask, macro.starts_BT, reduction=how['reduction']
  )
  policy = lambda x: losses.policy_loss(
      x,
      case['logprobs'],
      made.advantages_BT,
      weights,
      macro,
      clip_eps=0.2,
      ratio=how['ratio'],
  )[0]
  seen = targets.critic_mask(mask, macro.starts_BT, how['target'])
  critic = lambda x: losses.value_loss(
      x, case['values'], made.returns_BT, weights, seen, clip_eps=0.2
  )[0]
  return {
      'ids': macro.ids_BT,
      'rewards': token_rewards,
      'pooled': jnp.sum(aggregate.pool(token_rewards, macro, weights='sum'), 1),
      'advantages': made.advantages_BT,
      'returns': made.returns_BT,
      'policy_grad': jax.grad(policy)(case['new_logprobs']),
      'critic_grad': jax.grad(critic)(case['new_values']),
  }


def _case(seed: int, pad: float = np.nan, rows: int = 5) -> dict[str, Any]:
  """Rows of random lengths, of which one may be 0; `pad` on the padding."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(0, COLUMNS + 1, size=rows)
  mask = np.arange(COLUMNS)[None] < lengths[:, None]
  arrays = {
      name: jnp.asarray(np.where(mask, rng.normal(size=mask.shape), pad))
      for name in ARRAYS
  }
  return {
      **arrays,
      'mask': jnp.asarray(mask),
      'score': jnp.asarray(rng.normal(size=len(mask))),
      'keys': jax.random.split(jax.random.key(seed), len(mask)),
  }


def _hows() -> list[tuple]:
  """Each value of each switch at least once, no contradiction."""
  wheels = zip(
      itertools.cycle(('sum', 'mean', 'sum')),
      VALUES * 3,
      itertools.cycle(('shared', 'own')),
      itertools.cycle(('token', 'macro', 'starts')),
      itertools.cycle(('sequence', 'token', 'macro', 'constant')),
      itertools.cycle(
          ('token', 'token', 'macro', 'token', 'geometric', 'token')
      ),
      strict=False,
  )
  names = ('reward', 'value', 'advantage', 'target', 'reduction', 'ratio')
  return [tuple(zip(names, wheel, strict=True)) for wheel in wheels]


def _settings(rule: str, alone: bool) -> termination.TerminationSettings:
  return termination.TerminationSettings(
      rule,
      ngram=3,
      random_lengths=(1, 2, 4),
      random_repeats=1,
      last_token_alone=alone,
      empty_step=alone,
  )


def _cases() -> list:
  hows = itertools.cycle(_hows())
  return [
      (rule, alone, how)
      for rule, alone in RULES
      for how in itertools.islice(hows, 2)
      if not alone or dict(how)['advantage'] == 'shared'
  ]


def _close(got: dict, want: dict, rows: Any = slice(None)) -> None:
  for name, x in want.items():
    np.testing.assert_allclose(
        got[name], np.asarray(x)[rows], rtol=0, atol=1e-12, err_msg=name
    )


def _assert_row_is_its_own(alone: dict, batch: dict, row: int) -> None:
  """A row alone gives what it gave in its batch.

  The gradients differ by what the batch divides them by.
  """
  for name in ('rewards', 'advantages', 'returns', 'ids'):
    np.testing.assert_allclose(
        alone[name][0], batch[name][row], rtol=0, atol=1e-12
    )
  for name in ('policy_grad', 'critic_grad'):
    one, many = alone[name][0], batch[name][row]
    scale = np.abs(one).max() / (np.abs(many).max() or 1)
    np.testing.assert_allclose(one, scale * many, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ('rule', 'alone', 'how'),
    [
        pytest.param(*case, marks=pytest.mark.slow if i % 2 else ())
        for i, case in enumerate(_cases())
    ],
)
def test_padding_order_and_neighbours_change_nothing(
    rule: str, alone: bool, how: tuple
):
  with jax.enable_x64(True):
    run = functools.partial(_estimate, settings=_settings(rule, alone), how=how)
    for seed in range(4):
      case = _case(seed)
      base = jax.device_get(run(case))
      mask = np.asarray(case['mask'])
      # Padding.
      _close(run(_case(seed, pad=np.inf)), base)
      for name in (
          'rewards',
          'advantages',
          'returns',
          'policy_grad',
          'critic_grad',
      ):
        assert np.isfinite(base[name]).all() and not base[name][~mask].any()
      assert (base['ids'][~mask] == COLUMNS).all()
      # Order.
      order = np.random.default_rng(seed).permutation(len(mask))
      _close(run(jax.tree.map(lambda x, o=order: x[o], case)), base, order)
      for row in range(len(mask)):
        one = jax.tree.map(lambda x, r=row: x[r : r + 1], case)
        _assert_row_is_its_own(jax.device_get(run(one)), base, row)


@pytest.mark.parametrize('rule', ['fixed', 'ppl'])
def test_any_batch_and_any_width_give_a_row_the_same(rule: str):
  with jax.enable_x64(True):
    run = functools.partial(
        _estimate, settings=_settings(rule, False), how=_hows()[0]
    )
    for rows in (2, 7):
      case = _case(rows, rows=rows)
      base = jax.device_get(run(case))
      row, length = 0, max(1, int(case['mask'][0].sum()))
      cut = {  # without its columns of padding
          name: x[:1] if x.ndim == 1 else x[:1, :length]
          for name, x in case.items()
      }
      narrow = {
          name: x[:, :length] if np.ndim(x) == 2 else x
          for name, x in base.items()
      }
      real = np.asarray(case['mask'])[:, :length]
      narrow['ids'] = np.where(real, narrow['ids'], length)
      _assert_row_is_its_own(jax.device_get(run(cut)), narrow, row)


@pytest.mark.parametrize('rule', termination.RULES)
def test_macro_rewards_add_up_to_token_rewards_and_no_score_is_lost(rule: str):
  with jax.enable_x64(True):
    how = _hows()[0]
    case = _case(1)
    for score in (0.0, 2.5):
      case['score'] = jnp.full_like(case['score'], score)
      made = _estimate(case, settings=_settings(rule, False), how=how)
      mask = np.asarray(case['mask'])
      kl = np.where(mask, case['logprobs'] - case['ref'], 0).sum(axis=1)
      want = np.where(mask.any(axis=1), score - 0.1 * kl, 0)
      np.testing.assert_allclose(made['pooled'], want, rtol=0, atol=1e-12)
      total = np.asarray(made['rewards']).sum(axis=1)
      np.testing.assert_allclose(total, want, rtol=0, atol=1e-12)


def test_the_score_stands_on_the_last_real_token():
  mask = jnp.array([[True, True, True, False], [True, False, False, False]])
  got = rewards.token_rewards(
      jnp.zeros((2, 4)),
      jnp.zeros((2, 4)),
      jnp.array([1.5, -2.0]),
      mask,
      kl_coef=0.1,
      score_clip=0.0,
  )
  assert got.tolist() == [[0, 0, 1.5, 0], [-2, 0, 0, 0]]
