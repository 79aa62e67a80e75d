"""The variants that the package and the method in one file are compared on."""

import dataclasses
from typing import Any, NamedTuple

from tests.reference.ma_ppo import AUTHORS, PAPER, Settings


class Variant(NamedTuple):
  """One update, told to the package and to the reference.

  Attributes:
    words: of the recipe.
    fields: of the config, after them.
    settings: of the reference.
    epochs: passes over the batch.
    together: the models that learn in the pass that scores.
    temperature: of the log-probs.
  """

  words: str
  fields: dict[str, Any]
  settings: Settings
  epochs: int = 1
  together: tuple[str, ...] = ()
  temperature: float = 1.0


_OURS = Settings()
_set = dataclasses.replace
_BOTH = ('policy', 'critic')
VARIANTS = {
    'ours': Variant('ours', {}, _OURS, together=_BOTH),
    'paper': Variant('paper', {}, PAPER, epochs=2),
    # Whatever the temperature of samples, their log-probs are at 1.
    'authors': Variant(
        'authors', {'rollout.temperature': 0.7}, AUTHORS, together=_BOTH
    ),
    'token_ppo': Variant(
        'token_ppo',
        {'ppo.gamma': 0.9, 'ppo.loss_reduction': 'token'},
        _set(_OURS, ngram=1, gamma=0.9, reduction='token'),
        epochs=3,
    ),
    'rloo': Variant(
        'paper,rloo',
        {'ppo.gamma': 0.9, 'rollout.temperature': 0.7},
        _set(PAPER, baseline='rloo', gamma=0.9),
        epochs=2,
        temperature=0.7,
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
IN_CI = ('ours', 'paper', 'authors')
