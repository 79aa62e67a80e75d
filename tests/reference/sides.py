"""One update of a variant, by the PPO stage and by the method in one file.

Both start from the same weights and the same eight responses. The forward
passes, and their products with a gradient, are the package's on both sides:
they have tests of their own. All numbers are float64.
"""

from collections.abc import Callable
import dataclasses
import functools
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import torch

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import masking
from ma_rlhf_jax.macro.termination import TerminationSettings
from ma_rlhf_jax.ppo import step
from ma_rlhf_jax.ppo.host import HostAnswers
from ma_rlhf_jax.ppo.method import segment
from ma_rlhf_jax.ppo.programs import Programs
from ma_rlhf_jax.ppo.stage import PPO
from ma_rlhf_jax.rollout import sampling, scoring
from ma_rlhf_jax.structs import (
    Array,
    Models,
    Params,
    PromptBatch,
    Rollout,
    SequenceBatch,
)
from ma_rlhf_jax.training import optim
from tests import tiny
from tests.reference import ma_ppo
from tests.reference.variants import VARIANTS, Variant

ROWS = 8
SHAPE = dataclasses.replace(tiny.SHAPE, dtype='float64', param_dtype='float64')
# Steps of this size move ratios and values out of their clip ranges.
LR = {'policy': 4e-3, 'critic': 2e-2}


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


@functools.cache
def _params() -> Models:
  wide = lambda x: np.asarray(x, np.float64)
  return Models(
      policy=jax.tree.map(wide, tiny.params('policy', 0)),
      ref_policy=jax.tree.map(wide, tiny.params('policy', 2)),
      critic=jax.tree.map(wide, tiny.params('scalar', 1)),
      reward_model=jax.tree.map(wide, tiny.params('scalar', 3)),
  )


def _prompts() -> PromptBatch:
  """Two prompts, with four responses each."""
  rows = [3] * 4 + [4] * 4
  return tiny.prompts(rows, sample_ids=[0, 1, 2, 3] * 2)


@functools.cache
def _sequences() -> SequenceBatch:
  """Responses of 5, 7, 8, 1, 3, 8, 2 and 6 tokens to `_prompts()`."""
  rows, prompts = tiny.sequences(list(range(ROWS))), _prompts()
  answer = lambda x_BL: np.asarray(x_BL)[:, tiny.PROMPT_LEN :]
  return masking.join(
      prompts.tokens_BP,
      prompts.mask_BP,
      answer(rows.tokens_BL),
      rows.response_mask_BT,
  )


def _flat(tree: Params) -> np.ndarray:
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def _tree(flat: np.ndarray, like: Params) -> Params:
  leaves, structure = jax.tree.flatten(like)
  ends = np.cumsum([x.size for x in leaves])[:-1]
  parts = np.split(flat, ends)
  return structure.unflatten(
      [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
  )


def _config(variant: Variant) -> ConfigDict:
  fields = {
      'ppo.batch_size': ROWS,
      'ppo.steps': 1,
      'macro.ngram': 3,
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


def _stage(variant: Variant, folder: str) -> PPO:
  run = tiny.run(folder, _config(variant), mesh=tiny.mesh(1, 1, 1))
  params = jax.tree.map(jnp.array, _params())  # steps donate
  return PPO(run, Models(*[SHAPE] * 4), params)


# The package.


def _listen(programs: Programs) -> dict[str, dict[str, Array]]:
  """What the updates of a step will tell of each model."""
  heard: dict[str, dict[str, Array]] = {}

  def hearing(name: str, update: Callable[..., Any]) -> Callable[..., Any]:
    def told(*args: Any) -> Any:
      made = update(*args)
      heard[name] = dict(made[1])
      return made

    return told

  one_pass = programs._score_and_learn

  def together(*args: Any) -> Any:
    made = one_pass(*args)
    heard.update({name: dict(found) for name, found in made[3].items()})
    return made

  updates = programs._updates
  programs._updates = {n: hearing(n, f) for n, f in updates.items()}
  programs._score_and_learn = together
  return heard


@functools.cache
def by_package(name: str) -> Update:
  """The update by the PPO stage, on a rollout that is given."""
  variant = VARIANTS[name]
  with jax.enable_x64(True), tempfile.TemporaryDirectory() as folder:
    stage, sequences = _stage(variant, folder), _sequences()
    programs = stage.programs
    assert programs.fused_models == variant.together
    zeros = np.zeros(sequences.response_mask_BT.shape)
    rollout = Rollout(sequences, zeros, zeros + 1)
    heard = _listen(programs)
    with jax.set_mesh(stage.run.mesh):
      states, _ = step.learn(programs, stage.states, _prompts(), rollout, 0)
    told = lambda field: {n: float(found[field]) for n, found in heard.items()}
    adam = lambda n, field: _flat(optax.tree.get(states[n].opt_state, field))
    start = _params()._asdict()
    moves = {
        n: (_flat(states[n].params) - _flat(start[n])) / LR[n] for n in heard
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
      SHAPE, params, rows, temperature=temperature
  )[0]


_scores = jax.jit(scoring.sequence_scores, static_argnums=0)


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


def _model(
    params: Params, kind: str, temperature: float = 1.0, decay: float = 0.1
) -> ma_ppo.Model:
  """Parameters as one vector, and what the package computes with them."""
  rows, how = _sequences(), {'kind': kind, 'temperature': temperature}
  counts = np.asarray(rows.response_mask_BT).sum(1)
  function = lambda p: np.array(_forward(_tree(p, params), rows, **how))
  pull = lambda p, grad_BT: _flat(_pull(_tree(p, params), rows, grad_BT, **how))

  def apply(p: torch.Tensor) -> list[torch.Tensor]:
    found_BT = _Differentiable.apply(p, function, pull)
    return [x_T[:n] for x_T, n in zip(found_BT, counts, strict=True)]

  # The weights of norms do not decay.
  decays = jax.tree.map(
      lambda x, does: np.full(x.shape, decay * does),
      params,
      optim.decayed(params),
  )
  return ma_ppo.Model(
      params=_flat(params),
      apply=apply,
      decay=_flat(decays),
      lr=LR['policy' if kind == 'policy' else 'critic'],
  )


def _given(variant: Variant) -> list[tuple[int, ...]]:
  """First tokens of the macro actions that the package's rule forms."""
  config, prompts = _config(variant), _prompts()
  key = tiny.spec(config).key('macro')
  keys_B = sampling.row_keys(key, 0, prompts.prompt_ids_B, prompts.sample_ids_B)
  mask_BT = _sequences().response_mask_BT
  rule = TerminationSettings.from_config(config.macro)
  macro = segment(mask_BT, None, keys_B, HostAnswers(), rule)
  return [tuple(np.flatnonzero(row)) for row in np.asarray(macro.starts_BT)]


def _responses(variant: Variant) -> list[ma_ppo.Response]:
  params = _params()
  policy = lambda p: _model(p, 'policy', variant.temperature)
  said = [
      [x.numpy() for x in model.apply(torch.tensor(model.params))]
      for model in (
          policy(params.policy),
          policy(params.ref_policy),
          _model(params.critic, 'scalar'),
      )
  ]
  rows = _sequences()
  scores = _scores(SHAPE, params.reward_model, rows)
  starts = [(0,)] * ROWS
  if variant.settings.termination == 'given':
    starts = _given(variant)
  return [
      ma_ppo.Response(*row, float(score), prompt=k // 4, starts=starts[k])
      for k, (*row, score) in enumerate(zip(*said, scores, strict=True))
  ]


def by_reference(name: str, decay: float = 0.1, **changed: Any) -> Update:
  """The update by the reference, some settings of the variant changed."""
  variant = VARIANTS[name]
  tables = {'ngram': 3, 'response_length': tiny.RESPONSE_LEN}
  if name in ('token_ppo', 'one_macro'):
    del tables['ngram']
  s = dataclasses.replace(variant.settings, **(tables | changed))
  with jax.enable_x64(True):
    params, batch = _params(), _responses(variant)
    models = {
        'policy': _model(params.policy, 'policy', variant.temperature, decay)
    }
    if s.baseline == 'critic':
      models['critic'] = _model(params.critic, 'scalar', decay=decay)
    start, logs = dict(models), []
    for _ in range(variant.epochs):
      policy, critic, kl_coef, log = ma_ppo.update(
          batch, models['policy'], models.get('critic'), s
      )
      models |= {'policy': policy} | ({'critic': critic} if critic else {})
      logs.append(log)
  mean = lambda f, n, i: float(np.mean([f(log[n][i]) for log in logs]))
  norm = np.linalg.norm
  return Update(
      kl_coef=float(kl_coef),
      losses={n: mean(float, n, 0) for n in models},
      norms={n: mean(norm, n, 1) for n in models},
      moments={
          n: np.concatenate([m.adam[0], np.sqrt(m.adam[1])])
          for n, m in models.items()
      },
      moves={n: (m.params - start[n].params) / m.lr for n, m in models.items()},
  )
