"""The method in one file takes the update that the PPO stage takes.

`ma_ppo.py` is written from the paper and shares no code with the package. Only
the forward passes, and their products with a gradient, are the package's here:
they have tests of their own. All numbers are float64.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import tempfile
from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.rollout import sampling, scoring
from ma_rlhf_jax.structs import (
    Array,
    Params,
    PromptBatch,
    Rollout,
    SequenceBatch,
)
from ma_rlhf_jax.training import optim, ppo
from ma_rlhf_jax.training.experience import Models, form_macro_actions
from tests import tiny
from tests.reference import ma_ppo
from tests.reference.ma_ppo import AUTHORS, PAPER, Settings

ROWS, TEMPERATURE = 8, 0.7
SHAPE = dataclasses.replace(tiny.SHAPE, dtype='float64', param_dtype='float64')
# Steps of this size move ratios and values out of their clip ranges.
LR = {'policy': 4e-3, 'critic': 2e-2}
# Differences of this share of the quantity, and of a step where it is 0.
TOLERANCE = 1e-6


class Variant(NamedTuple):
  """One update, told to the package and to the reference.

  Attributes:
    words: of the recipe.
    fields: of the config, after them.
    settings: of the reference.
    epochs: passes over the batch.
    together: the models that learn in the pass that scores.
  """

  words: str
  fields: dict[str, Any]
  settings: Settings
  epochs: int = 1
  together: tuple[str, ...] = ()


_OURS = Settings()
_set = dataclasses.replace
_BOTH = ('policy', 'critic')
VARIANTS = {
    'ours': Variant('ours', {}, _OURS, together=_BOTH),
    'paper': Variant('paper', {}, PAPER, epochs=2),
    'authors': Variant('authors', {}, AUTHORS, together=_BOTH),
    'token_ppo': Variant(
        'token_ppo',
        {'ppo.gamma': 0.9, 'ppo.loss_reduction': 'token'},
        _set(_OURS, ngram=1, gamma=0.9, reduction='token'),
        epochs=3,
    ),
    'rloo': Variant(
        'paper,rloo',
        {'ppo.gamma': 0.9},
        _set(PAPER, baseline='rloo', gamma=0.9),
        epochs=2,
    ),
    'one_macro': Variant(
        'one_macro',
        {'ppo.ratio': 'macro'},
        _set(_OURS, ngram=0, ratio='macro'),
        epochs=2,
    ),
    'given boundaries': Variant(
        'paper',
        {
            'macro.termination': 'randomised',
            'macro.random_lengths': (1, 2, 4),
            'macro.random_repeats': 1,
            'macro.value': 'position_reversed',
            'ppo.one_pass': 'policy',
        },
        _set(PAPER, termination='given', pool_values='position_reversed'),
        together=('policy',),
    ),
    'perplexity of the old policy, own targets of the critic': Variant(
        'paper',
        {
            'macro.termination': 'ppl',
            'macro.logprobs': 'old',
            'macro.value': 'position',
            'critic.target': 'token',
            'ppo.gamma': 0.9,
        },
        _set(
            PAPER,
            termination='ppl',
            logprobs='old',
            pool_values='position',
            critic_target='own',
            gamma=0.9,
        ),
    ),
    'own advantages, discounted tokens': Variant(
        'piecewise',
        {'ppo.discount': 'token', 'ppo.gamma': 0.9, 'ppo.gae_lambda': 0.8},
        _set(
            _OURS, advantage='own', discount='token', gamma=0.9, gae_lambda=0.8
        ),
        together=_BOTH,
    ),
    'a critic of starts, perplexity, discounted macro actions': Variant(
        'ours',
        {
            'macro.termination': 'ppl',
            'macro.value': 'unit',
            'critic.target': 'starts',
            'ppo.discount': 'token',
            'ppo.gamma': 0.9,
        },
        _set(
            _OURS,
            termination='ppl',
            pool_values='unit',
            critic_target='starts',
            discount='token',
            gamma=0.9,
        ),
        epochs=2,
    ),
    'geometric ratio, constant divisor': Variant(
        'ours',
        {'ppo.ratio': 'geometric', 'ppo.loss_reduction': 'constant'},
        _set(_OURS, ratio='geometric', reduction='constant'),
        epochs=3,
    ),
    'adaptive KL, whitened, clipped scores': Variant(
        'authors',
        {
            'ppo.kl_target': 1.0,
            'ppo.kl_horizon': 50,
            'ppo.whiten_advantages': True,
            'ppo.score_clip': 0.1,
        },
        _set(
            AUTHORS,
            kl_target=1.0,
            kl_horizon=50.0,
            whiten_advantages=True,
            score_clip=0.1,
        ),
        epochs=2,
    ),
}
_IN_CI = ('ours', 'paper', 'authors')


class Update(NamedTuple):
  """What one whole update has made.

  Attributes:
    kl_coef: of the next one.
    losses: of each model, the mean over its epochs.
    norms: of the gradient before it is clipped, likewise.
    moments: Adam's averages of the gradient and of its square, as one.
    moves: of the parameters, in learning rates.
  """

  kl_coef: float
  losses: dict[str, float]
  norms: dict[str, float]
  moments: dict[str, np.ndarray]
  moves: dict[str, np.ndarray]


# What both sides are given.


def _wide(kind: str, seed: int) -> Params:
  drawn = tiny.params(kind, seed)
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), drawn)


def _params() -> Models:
  return Models(
      policy=_wide('policy', 0),
      ref_policy=_wide('policy', 2),
      critic=_wide('scalar', 1),
      reward_model=_wide('scalar', 3),
  )


def _prompts() -> PromptBatch:
  """Two prompts, with four responses each."""
  rows = [3] * 4 + [4] * 4
  return tiny.prompts(rows, sample_ids=[0, 1, 2, 3] * 2)


def _sequences() -> SequenceBatch:
  """Responses of 5, 7, 8, 1, 3, 8, 2 and 6 tokens to `_prompts()`."""
  rows, prompts = tiny.sequences(list(range(ROWS))), _prompts()
  swap = lambda x, prompt: jnp.asarray(x).at[:, : tiny.PROMPT_LEN].set(prompt)
  return rows.replace(
      tokens_BL=swap(rows.tokens_BL, prompts.tokens_BP),
      mask_BL=swap(rows.mask_BL, prompts.mask_BP),
  )


def _config(variant: Variant) -> Any:
  fields = {
      'ppo.batch_size': ROWS,
      'ppo.steps': 1,
      'macro.ngram': 3,
      'rollout.temperature': TEMPERATURE,
      'model.logprob_chunk': 8,
      'ppo.ppo_epochs': variant.epochs,
  }
  for block in ('ppo', 'critic'):
    fields[f'{block}.optim.schedule'] = 'constant'
    fields[f'{block}.optim.warmup_ratio'] = 0.0
  fields['ppo.optim.lr'] = LR['policy']
  fields['critic.optim.lr'] = LR['critic']
  config = tiny.config()
  config.update_from_flattened_dict(fields)
  config_lib.apply_arguments(config, variant.words)
  config.update_from_flattened_dict(variant.fields)
  return config


def _stage(variant: Variant, folder: str) -> ppo.PPO:
  run = tiny.run(folder, _config(variant), mesh=tiny.mesh(1, 1, 1))
  params = jax.tree.map(jnp.array, _params())  # steps donate
  return ppo.PPO(run, Models(*[SHAPE] * 4), params)


# The package.


def _listen(stage: ppo.PPO) -> dict[str, dict[str, Array]]:
  """What the updates of the stage will tell of each model."""
  heard: dict[str, dict[str, Array]] = {}

  def hearing(name: str, update: Callable[..., Any]) -> Callable[..., Any]:
    def told(*args: Any) -> Any:
      made = update(*args)
      heard[name] = dict(made[1])
      return made

    return told

  def together(*args: Any, one: Callable[..., Any] = stage._one_pass) -> Any:
    made = one(*args)
    heard.update({name: dict(found) for name, found in made[3].items()})
    return made

  stage._updates = {n: hearing(n, f) for n, f in stage._updates.items()}
  stage._one_pass = together
  return heard


@functools.cache
def _by_package(name: str) -> Update:
  variant = VARIANTS[name]
  flat = lambda tree: np.asarray(ravel_pytree(tree)[0])
  with jax.enable_x64(True), tempfile.TemporaryDirectory() as folder:
    stage, sequences = _stage(variant, folder), _sequences()
    assert stage.together == variant.together
    zeros = jnp.zeros(sequences.response_mask_BT.shape)
    rollout = Rollout(sequences, zeros, zeros + 1)
    heard = _listen(stage)
    with jax.set_mesh(stage.run.mesh):
      states, _ = stage.learn(stage.states, _prompts(), rollout, 0)
    told = lambda field: {n: float(found[field]) for n, found in heard.items()}
    adam = lambda n, field: flat(optax.tree.get(states[n].opt_state, field))
    start = _params()._asdict()
    moves = {
        n: (flat(states[n].params) - flat(start[n])) / LR[n] for n in heard
    }
    return Update(
        kl_coef=float(states['kl_coef']),
        losses=told('loss'),
        norms=told('grad_norm'),
        moments={
            n: np.concatenate([adam(n, 'mu'), np.sqrt(adam(n, 'nu'))])
            for n in heard
        },
        moves=moves,
    )


# The reference.


@functools.partial(jax.jit, static_argnames=('kind', 'temperature'))
def _forward(
    params: Params, rows: SequenceBatch, *, kind: str, temperature: float
) -> Array:
  """[B, T]: log-probs of the policy, or values of the critic."""
  if kind == 'scalar':
    return scoring.response_values(SHAPE, params, rows)
  return scoring.response_logprobs(
      SHAPE, params, rows, temperature=temperature, chunk_tokens=8
  )[0]


@functools.partial(jax.jit, static_argnames=('kind', 'temperature'))
def _pull(
    params: Params, rows: SequenceBatch, grad_BT: Array, **how: Any
) -> Params:
  """The gradient by the parameters of a loss from that by `_forward`."""
  _, pull = jax.vjp(lambda p: _forward(p, rows, **how), params)
  return pull(grad_BT)[0]


class _Differentiable(torch.autograd.Function):
  """A function of JAX, to torch."""

  @staticmethod
  def forward(
      ctx: Any,
      params: torch.Tensor,
      function: Callable[[np.ndarray], np.ndarray],
      pull: Callable[[np.ndarray, np.ndarray], np.ndarray],
  ) -> torch.Tensor:
    ctx.pull = functools.partial(pull, params.detach().numpy())
    return torch.tensor(function(params.detach().numpy()))

  @staticmethod
  def backward(ctx: Any, grad: torch.Tensor) -> tuple:
    return torch.tensor(ctx.pull(grad.numpy())), None, None


def _model(params: Params, kind: str, temperature: float) -> ma_ppo.Model:
  """Parameters as one vector, and what the package computes with them."""
  vector, unravel = ravel_pytree(params)
  rows, how = _sequences(), {'kind': kind, 'temperature': temperature}
  counts = np.asarray(rows.response_mask_BT).sum(1)
  function = lambda p: np.asarray(_forward(unravel(jnp.array(p)), rows, **how))

  def pull(p: np.ndarray, grad_BT: np.ndarray) -> np.ndarray:
    grads = _pull(unravel(jnp.array(p)), rows, jnp.array(grad_BT), **how)
    return np.asarray(ravel_pytree(grads)[0])

  def apply(p: torch.Tensor) -> list[torch.Tensor]:
    found_BT = _Differentiable.apply(p, function, pull)
    return [x_T[:n] for x_T, n in zip(found_BT, counts, strict=True)]

  decayed = jax.tree.map(
      lambda x, decays: jnp.full(x.shape, decays * 1.0),
      params,
      optim.decayed(params),
  )
  return ma_ppo.Model(
      params=np.array(vector),
      apply=apply,
      decayed=np.asarray(ravel_pytree(decayed)[0]),
      lr=LR['policy' if kind == 'policy' else 'critic'],
  )


def _given(variant: Variant) -> list[tuple[int, ...]]:
  """First tokens of the macro actions that the package's rule forms."""
  config, prompts = _config(variant), _prompts()
  with tempfile.TemporaryDirectory() as folder:
    key = tiny.run(folder, config).key('macro')
  keys_B = sampling.row_keys(key, 0, prompts.prompt_ids_B, prompts.sample_ids_B)
  mask_BT = _sequences().response_mask_BT
  macro = form_macro_actions(mask_BT, None, keys_B, None, config.macro)
  return [tuple(np.flatnonzero(row)) for row in np.asarray(macro.starts_BT)]


def _responses(
    variant: Variant, params: Models, temperature: float
) -> list[ma_ppo.Response]:
  policy = lambda p: _model(p, 'policy', temperature)
  said = [
      [x.numpy() for x in model.apply(torch.tensor(model.params))]
      for model in (
          policy(params.policy),
          policy(params.ref_policy),
          _model(params.critic, 'scalar', 1.0),
      )
  ]
  rows = _sequences()
  scores = scoring.sequence_scores(SHAPE, params.reward_model, rows)
  starts = [(0,)] * ROWS
  if variant.settings.termination == 'given':
    starts = _given(variant)
  return [
      ma_ppo.Response(*row, float(score), prompt=k // 4, starts=starts[k])
      for k, (*row, score) in enumerate(zip(*said, scores, strict=True))
  ]


def _by_reference(name: str, **changed: Any) -> Update:
  """The update by the reference, some settings of the variant changed."""
  variant = VARIANTS[name]
  tables = {'ngram': 3, 'response_length': tiny.RESPONSE_LEN}
  if name in ('token_ppo', 'one_macro'):
    del tables['ngram']
  s = dataclasses.replace(variant.settings, **(tables | changed))
  temperature = 1.0 if 'authors' in variant.words else TEMPERATURE
  with jax.enable_x64(True):
    params = _params()
    batch = _responses(variant, params, temperature)
    models = {'policy': _model(params.policy, 'policy', temperature)}
    if s.baseline == 'critic':
      models['critic'] = _model(params.critic, 'scalar', 1.0)
    start, logs = dict(models), []
    for _ in range(variant.epochs):
      policy, critic, kl_coef, log = ma_ppo.update(
          batch, models['policy'], models.get('critic'), s
      )
      models |= {'policy': policy} | ({'critic': critic} if critic else {})
      logs.append(log)
  mean = lambda f, n: float(np.mean([f(log[n]) for log in logs]))
  norm = np.linalg.norm
  return Update(
      kl_coef=float(kl_coef),
      losses={n: mean(float, f'{n}_loss') for n in models},
      norms={n: mean(norm, f'{n}_gradient') for n in models},
      moments={
          n: np.concatenate([m.adam[0], np.sqrt(m.adam[1])])
          for n, m in models.items()
      },
      moves={
          n: (m.params - start[n].params) / m.lr for n, m in models.items()
      },
  )


# Do they agree?


def _close(found: Any, wanted: Any, name: str) -> None:
  """Equal up to `TOLERANCE` of the largest entry."""
  size = max(np.max(np.abs(wanted)), 1e-3)
  np.testing.assert_allclose(
      found, wanted, rtol=0, atol=TOLERANCE * size, err_msg=name
  )


def _agree(package: Update, reference: Update) -> None:
  for field, found, wanted in zip(
      Update._fields, package, reference, strict=True
  ):
    if not isinstance(found, Mapping):
      _close(found, wanted, field)
      continue
    assert found.keys() == wanted.keys()
    for model in found:
      _close(found[model], wanted[model], f'{field} of the {model}')


@pytest.mark.parametrize(
    'name',
    [
        name
        if name in _IN_CI
        else pytest.param(name, marks=pytest.mark.slow)
        for name in VARIANTS
    ],
)
def test_the_method_in_one_file_takes_the_update_of_the_package(
    name: str,
) -> None:
  package = _by_package(name)
  _agree(package, _by_reference(name))
