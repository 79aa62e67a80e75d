"""Whole steps of the authors' trainer, from log-probs and from logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ma_rlhf_jax import switches
from ma_rlhf_jax.macro import aggregate, authors, termination
from ma_rlhf_jax.objective import advantage, losses, rewards, targets
from ma_rlhf_jax.rollout.logprobs import token_logprobs
from ma_rlhf_jax.structs import MacroActions
from tests import oracle, tiny
from tests.authors import columns

Case = dict[str, Any]
_SWITCHES = switches.VARIANTS['authors']
_POOLING = {
    'equal': dict(pool_rewards=_SWITCHES['macro.reward'], pool_values='equal'),
    # Their value function pools the rewards as well.
    'position': dict(
        pool_rewards='position_reversed', pool_values='position_reversed'
    ),
}
_SCORE_CLIP, _CLIP_EPS = 2.5, 0.2  # fixed in their code


def _ngram(case: Case) -> int:
  """Tokens per macro action; their nested perplexities never cut."""
  config = case.get('config', case)
  nested = case.get('tag') in (None, 'ppl-nested-official')
  if config['termination_condition'] == 'ppl' and nested:
    return 0
  return config['ngram'] if config['ngram'] < case['resp_width'] else 0


def _macro(
    mask: jax.Array, width: jax.Array, nll: jax.Array, ngram: int | None
) -> MacroActions:
  """Our ids and empty steps of their boundaries; ngram None = by nll."""
  if ngram is None:
    inside = jnp.arange(mask.shape[1])[None] < width[:, None]
    starts = authors.ppl(-nll, inside)
  else:
    starts = termination.fixed(columns.counted(mask, width), ngram=ngram)
  opens, empty = authors.last_column_alone(starts, mask, width)
  return termination.macro_actions(opens, mask).replace(empty_B=empty)


@functools.partial(jax.jit, static_argnames=('ngram', 'pooling'))
def _step(
    x: dict[str, jax.Array], *, ngram: int | None, pooling: str
) -> dict[str, Any]:
  """Everything that a step computes after its forward passes.

  Args:
    x: the inputs of some rows: [B, T], [B] or scalars.
    ngram: see `_macro`.
    pooling: a key of `_POOLING`.
  """
  mask = x['mask']
  macro = _macro(mask, x['width'], x['nll'], ngram)
  token_rewards = rewards.token_rewards(
      x['logprobs'],
      x['ref_logprobs'],
      x['score'],
      mask,
      kl_coef=x['kl_coef'],
      score_clip=_SCORE_CLIP,
      score_column_B=columns.score_column(mask, x['width']),
  )
  objective = tiny.objective(
      gamma=x['gamma'],
      gae_lambda=x['gae_lambda'],
      critic_lambda=-1.0,
      discount=_SWITCHES['ppo.discount'],
      advantage=_SWITCHES['ppo.advantage'],
      critic_target=_SWITCHES['critic.target'],
      **_POOLING[pooling],
  )
  given = x['values'], token_rewards, macro, objective
  advantages, returns = advantage.macro_gae(*given)
  aims = targets.macro_targets(*given)
  weights = losses.loss_weights(
      mask, macro.starts_BT, reduction=_SWITCHES['ppo.loss_reduction']
  )

  def actor(logprobs):
    return losses.policy_loss(
        logprobs,
        x['logprobs'],
        aims.advantages_BT,
        weights,
        macro,
        clip_eps=_CLIP_EPS,
        ratio=_SWITCHES['ppo.ratio'],
    )[0]

  def critic(values):
    return losses.value_loss(
        values, x['values'], aims.returns_BT, weights, mask, clip_eps=_CLIP_EPS
    )[0]

  actor_loss, grad_logprobs = jax.value_and_grad(actor)(x['new_logprobs'])
  critic_loss, grad_values = jax.value_and_grad(critic)(x['new_values'])
  pool = lambda y, rule: aggregate.pool(y, macro, weights=rule)
  return {
      'macro': macro,
      'token_rewards': token_rewards,
      'macro_values': pool(x['values'], objective.pool_values),
      'macro_rewards': pool(token_rewards, objective.pool_rewards),
      'advantages': advantages,
      'returns': returns,
      'actor_loss': actor_loss,
      'critic_loss': critic_loss,
      'grad_new_logprobs': grad_logprobs,
      'grad_new_values': grad_values,
  }


def _inputs(case: Case, width: int) -> dict[str, jax.Array]:
  names = ('logprobs', 'ref_logprobs', 'values', 'new_logprobs', 'new_values')
  config = case.get('config', case)
  ppl = case.get('ppl', [1.0] * case['resp_width'])
  return {
      **{name: oracle.response(case, name, width) for name in names},
      'mask': oracle.response_mask(case, width),
      'width': jnp.array([case['resp_width']]),
      'score': jnp.asarray(oracle.tensor(case['reward_score'])),
      'nll': oracle.pad(np.log(oracle.tensor([ppl])), width),
      'kl_coef': config['kl_ctl'],
      'gamma': config['gamma'],
      'gae_lambda': config['lam'],
  }


def _run(case: Case, width: int) -> dict[str, Any]:
  config = case.get('config', case)
  flat = case.get('tag') == 'ppl-flat-list'
  return _step(
      _inputs(case, width),
      ngram=None if flat else _ngram(case),
      pooling=config['value_function'],
  )


def _check(case: Case, got: dict[str, Any], name: str) -> None:
  """Macro actions, estimates and losses against a file's figures."""
  expected = case['expected']
  width = got['token_rewards'].shape[1]
  theirs, real = oracle.macro_of(
      {**case, 'ma_lengths': expected['ma_lengths']}, width
  )
  np.testing.assert_array_equal(got['macro'].ids_BT, theirs.ids_BT, name)
  for field in ('macro_values', 'macro_rewards', 'advantages', 'returns'):
    want = oracle.tensor(expected[field])[:, real]
    oracle.close(got[field][:, : len(real)], want, f'{name} {field}')
    assert not np.any(got[field][:, len(real) :])
  for field in ('actor_loss', 'critic_loss'):
    want = oracle.tensor([expected[field]])[0]
    oracle.close(got[field], want, f'{name} {field}')


def _wide(x: jax.Array, case: Case) -> np.ndarray:
  """Gradients at the columns of the response, 0 at those of the prompt."""
  kept = np.asarray(x)[:, : case['resp_width']]
  return np.pad(kept, ((0, 0), (case['start'], 0)))


def test_oracle_e2e():
  cases = oracle.cases('e2e.json')
  width = max(case['resp_width'] for case in cases)
  with jax.enable_x64(True):
    for case in cases:
      got, name = _run(case, width), case['id']
      _check(case, got, name)
      expected = case['expected']
      mask = np.asarray(oracle.response_mask(case, width))
      want = oracle.response({**case, **expected}, 'token_rewards', width)
      want = np.where(mask, want, 0)
      oracle.close(got['token_rewards'], want, name)
      for field in ('grad_new_logprobs', 'grad_new_values'):
        want = oracle.tensor(expected[field])
        oracle.close(_wide(got[field], case), want, f'{name} {field}')


def test_oracle_e2e_in_batches_equals_row_by_row():
  """Rows of different prompts, widths and lengths at once."""
  cases = oracle.cases('e2e.json')
  width = max(case['resp_width'] for case in cases)
  groups: dict[tuple, list[Case]] = {}
  for case in cases:
    flat = case['tag'] == 'ppl-flat-list'
    how = (None if flat else _ngram(case), case['value_function'])
    key = (*how, case['gamma'], case['lam'], case['kl_ctl'])
    groups.setdefault(key, []).append(case)
  batched = [group for group in groups.items() if len(group[1]) > 1]
  oracle.need(batched, 'e2e cases of equal settings')
  most = max(len(group) for _, group in batched)
  with jax.enable_x64(True):
    for (ngram, pooling, *_), group in batched:
      # Of one size, filled up with their first row: a program fits them all.
      filled = group + group[:1] * (most - len(group))
      rows = [_inputs(case, width) for case in filled]
      scalars = {k: v for k, v in rows[0].items() if isinstance(v, float)}
      stacked = {
          name: jnp.concatenate([row[name] for row in rows])
          for name in rows[0].keys() - scalars.keys()
      }
      got = _step({**stacked, **scalars}, ngram=ngram, pooling=pooling)
      alone = [_run(case, width) for case in group]
      for field in ('macro_values', 'macro_rewards', 'advantages', 'returns'):
        np.testing.assert_allclose(
            got[field][: len(group)],
            np.concatenate([one[field] for one in alone]),
            rtol=0,
            atol=1e-12,
        )


@jax.jit
def _logprobs(logits: jax.Array, ids: np.ndarray) -> jax.Array:
  """[B, T - 1]: our scorer with the logits as hidden states."""
  identity = jnp.eye(logits.shape[-1], dtype=logits.dtype)
  return token_logprobs(
      logits[:, :-1],
      identity,
      jnp.asarray(ids[:, 1:]),
      softcap=0.0,
      temperature=_SWITCHES['ppo.logprob_temperature'],
      chunk_tokens=5,
  )[0]


def test_oracle_e2e_logits():
  cases = oracle.cases('e2e_logits.json')
  with jax.enable_x64(True):
    for case in cases:
      name, expected = case['id'], case['expected']
      ids = np.array(case['input_ids'])
      logits = {
          age: jnp.asarray(oracle.tensor(case[f'{age}_logits']))
          for age in ('old', 'ref', 'new')
      }
      logprobs = {age: _logprobs(x, ids) for age, x in logits.items()}
      oracle.close(logprobs['old'], oracle.tensor(expected['logprobs']), name)
      oracle.close(
          logprobs['ref'], oracle.tensor(expected['ref_logprobs']), name
      )
      mask = np.array(expected['attention_mask'])[:, 1:].tolist()
      made = {
          **case,
          'start': case['prompt_len'] - 1,
          'action_mask': mask,
          'logprobs': np.asarray(logprobs['old']).tolist(),
          'ref_logprobs': np.asarray(logprobs['ref']).tolist(),
          'new_logprobs': np.asarray(logprobs['new']).tolist(),
          'values': oracle.tensor(case['old_values'])[:, :-1].tolist(),
          'new_values': oracle.tensor(case['new_values'])[:, :-1].tolist(),
      }
      got = _run(made, case['resp_width'])
      _check(made, got, name)
      pull = jax.vjp(lambda x, ids=ids: _logprobs(x, ids), logits['new'])[1]
      grad = pull(jnp.asarray(_wide(got['grad_new_logprobs'], made)))[0]
      oracle.close(grad, oracle.tensor(expected['grad_new_logits']), name)
      values = np.pad(_wide(got['grad_new_values'], made), ((0, 0), (0, 1)))
      oracle.close(values, oracle.tensor(expected['grad_new_values']), name)


def test_oracle_training_takes_the_same_route():
  """With R = L, `segment` and the explicit boundaries give one answer."""
  settings = termination.TerminationSettings(
      'fixed', ngram=3, last_token_alone=True, empty_step=True
  )
  mask = jnp.arange(12)[None] < jnp.arange(1, 13)[:, None]
  nothing = jnp.zeros(mask.shape)
  inputs = termination.TerminationInputs(
      mask, nothing, jax.random.split(jax.random.key(0), 12)
  )
  want = _macro(mask, jnp.sum(mask, axis=1), nothing, 3)
  jax.tree.map(
      np.testing.assert_array_equal,
      termination.segment(inputs, settings),
      want,
  )
  assert want.empty_B.tolist() == [0, 12, 12, 1, 12, 12, 2, 12, 12, 3, 12, 12]
