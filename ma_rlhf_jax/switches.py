"""The switches that define the algorithm: variants, controls, contradictions.

A variant or a control is a table of explicit values, named after the colon of
--config and set before any flag: `--config=configs/tiny.py:authors`. Controls
are worked out from what variants and arguments beside them say; flags win.
"""

from collections.abc import Callable, Iterator, Sequence
import textwrap
from typing import Any

from ml_collections import ConfigDict

from ma_rlhf_jax import arguments

Values = dict[str, Any]

_OURS: Values = {
    'macro.reward': 'sum',
    'macro.value': 'start',
    'macro.last_token_alone': False,
    'macro.empty_step': False,
    'macro.random_lengths': (2, 3, 5, 10),
    'ppo.advantage': 'shared',
    'ppo.ratio': 'token',
    'ppo.loss_reduction': 'sequence',
    'ppo.discount': 'macro',
    'ppo.baseline': 'critic',
    'ppo.logprob_temperature': 0.0,
    'critic.target': 'token',
}

# arXiv 2410.02743 as written, and as the authors' code has it.
VARIANTS: dict[str, Values] = {
    'ours': _OURS,
    'paper': _OURS
    | {
        'macro.value': 'equal',
        'ppo.ratio': 'macro',
        'ppo.loss_reduction': 'macro',
        'critic.target': 'macro',
    },
    'authors': _OURS
    | {
        'macro.reward': 'mean',
        'macro.value': 'equal',
        'macro.last_token_alone': True,
        'macro.empty_step': True,
        'macro.random_lengths': (1, 2, 3, 5, 10),
        'ppo.logprob_temperature': 1.0,
        'critic.target': 'macro',
    },
}

# Whatever a variant or an argument says: macro actions that are of this size.
_BARE: Values = {
    'macro.termination': 'fixed',
    'macro.min_len': 1,
    'macro.max_len': 0,
    'macro.last_token_alone': False,
    'macro.empty_step': False,
}
_TOKENS: Values = _BARE | {'macro.ngram': 1}
_RLOO_SAMPLES = 4


def _tokens_per_macro(config: ConfigDict, control: str) -> int:
  if config.macro.termination != 'fixed' or config.macro.ngram < 2:
    raise arguments.ArgumentError(
        f'{control} matches macro actions of a fixed number of tokens above 1, '
        f'but macro.termination={config.macro.termination!r} and macro.ngram='
        f'{config.macro.ngram}; write for example :ngram=5,{control}'
    )
  return config.macro.ngram


def _kl_over_macros(reward: str) -> Values:
  """Summed against averaged rewards; the score stays whole in both."""
  return {
      'macro.reward': reward,
      'macro.last_token_alone': True,
      'macro.empty_step': False,
      'critic.target': 'macro',
  }


def _rloo(config: ConfigDict) -> Values:
  """As many responses and updates as before, in groups of four."""
  return {
      'ppo.baseline': 'rloo',
      'ppo.samples_per_prompt': _RLOO_SAMPLES,
      'ppo.batch_size': max(1, config.ppo.batch_size // _RLOO_SAMPLES),
      'ppo.epochs': config.ppo.epochs / _RLOO_SAMPLES,
      'ppo.gae_lambda': 1.0,
      'macro.empty_step': False,
  }


# What tells apart why macro actions help. n is macro.ngram without the control.
CONTROLS: dict[str, Callable[[ConfigDict], Values]] = {
    # No macro actions.
    'token_ppo': lambda c: _TOKENS,
    # The credit horizon of n-token macro actions without them.
    'lambda_matched': lambda c: _TOKENS
    | {
        'ppo.gae_lambda': c.ppo.gae_lambda
        ** (1 / _tokens_per_macro(c, 'lambda_matched'))
    },
    # Their credit exactly, with a baseline for each token.
    'piecewise': lambda c: {
        'macro.reward': 'sum',
        'macro.value': 'start',
        'macro.empty_step': False,
        'ppo.advantage': 'own',
        'ppo.ratio': 'token',
        'critic.target': 'token',
    },
    # The KL weight that averaged rewards amount to, without macro actions.
    'kl_matched': lambda c: _TOKENS
    | {'ppo.kl_coef': c.ppo.kl_coef / _tokens_per_macro(c, 'kl_matched')},
    'kl_summed': lambda c: _kl_over_macros('sum'),
    'kl_averaged': lambda c: _kl_over_macros('mean'),
    # The longest horizon: rewards to go less a baseline.
    'lambda_one': lambda c: {'ppo.gae_lambda': 1.0},
    # n = infinity: a response is one decision.
    'one_macro': lambda c: _BARE | {'macro.ngram': 0},
    # No critic: the other responses to a prompt are the baseline.
    'rloo': _rloo,
}


def _lora(config: ConfigDict) -> Values:
  """Adapters, at ten times the learning rates, in passes that fit one GPU.

  SFT from random weights has no adapters and keeps its rate.
  """
  stages = ('sft', 'reward_model', 'ppo')
  adapted = (*stages, 'critic') if config.sft.init else (*stages[1:], 'critic')
  rows = config.ppo.batch_size * config.ppo.samples_per_prompt
  # A token of 7B's cache takes 448 KiB, of 2B's 18.
  fits = 16 if config.model.preset.endswith('7b') else 64
  return {
      'lora.rank': 32,
      # What a recipe sets for its slice is too much for one GPU.
      'model.remat': 'full',
      'mesh.tensor': 1,
      **({'ppo.one_pass': 'policy'} if config.model.preset else {}),
      **{f'{s}.optim.lr': 10 * config[s].optim.lr for s in adapted},
      **{f'{s}.micro_batch_size': min(8, config[s].batch_size) for s in stages},
      'rollout.batch_size': min(fits, rows),
  }


# How a run fits its machine; changes what is trained, not the algorithm.
SETUPS: dict[str, Callable[[ConfigDict], Values]] = {'lora': _lora}
WORDS = (*VARIANTS, *CONTROLS, *SETUPS)


def select_variant(config: ConfigDict, word: str) -> None:
  """Sets what a variant, a key of `VARIANTS`, stands for."""
  values = VARIANTS[word] | {'macro.variant': word}
  config.update_from_flattened_dict(values)


def select_controls(
    config: ConfigDict,
    words: Sequence[str],
    given: arguments.Given | None = None,
) -> None:
  """Sets what controls, then set-ups stand for.

  Args:
    config: what variants and arguments have made of it; is changed.
    words: keys of `CONTROLS` and `SETUPS`, in any order.
    given: field -> (argument, value) of what arguments have set.

  Raises:
    ArgumentError: if a control means nothing for this config, or contradicts
      another one or an argument.
  """
  said = arguments.kept(given or {}, words)
  for word in dict.fromkeys(words):
    for name, value in CONTROLS.get(word, lambda c: {})(config).items():
      other, set_to = said.setdefault(name, (word, value))
      if set_to != value:
        raise arguments.ArgumentError(
            f'{other} sets {name}={set_to!r} and {word} sets it to {value!r}; '
            'leave one of them out'
        )
  values = {name: value for name, (_, value) in said.items()}
  config.update_from_flattened_dict(values)
  arguments.check_ngram(given or {}, config.macro.termination)
  for word in dict.fromkeys(words):
    if word in SETUPS:
      config.update_from_flattened_dict(SETUPS[word](config))


def _kl_weight(config: ConfigDict) -> str:
  """What a macro action is charged for a nat of its summed log-ratio."""
  m, p = config.macro, config.ppo
  weight = f'{p.kl_coef:g}'
  if m.reward != 'sum':
    bounded = m.min_len > m.ngram or 0 < m.max_len < m.ngram
    if m.termination == 'fixed' and m.ngram and not bounded:
      weight = f'{p.kl_coef:g} / {m.ngram} = {p.kl_coef / m.ngram:g}'
    else:
      weight = f'{p.kl_coef:g} / its tokens'
  weight += ' per nat of its summed log-ratio'
  if p.kl_target:
    weight += f' at first, adapted to a KL of {p.kl_target:g} nats per response'
  return weight


def _rule(macro: ConfigDict) -> str:
  rule = f'macro.termination={macro.termination}'
  if macro.termination == 'fixed':
    rule += f' with macro.ngram={macro.ngram or "0 (infinity)"}'
  if macro.min_len > 1 or macro.max_len:
    rule += f', {macro.min_len} to {macro.max_len or "any"} tokens'
  return rule


def describe(config: ConfigDict) -> str:
  """The resolved switches and the effective KL weight, a few lines."""
  shown = {name: _field(config, name) for name in _OURS}
  del shown['macro.random_lengths']  # says nothing under other rules
  shown |= {'ppo.gamma': config.ppo.gamma, 'ppo.gae_lambda': _lambda(config)}
  words = ' '.join(f'{name}={value}' for name, value in shown.items())
  lines = textwrap.wrap(words, 100, break_on_hyphens=False)
  return '\n    '.join(
      [
          f'macro actions: {config.macro.variant}; {_rule(config.macro)}',
          *lines,
          f'KL weight of a macro action: {_kl_weight(config)}',
      ]
  )


def _lambda(config: ConfigDict) -> str:
  own = config.critic.gae_lambda
  told = f'{config.ppo.gae_lambda:g}'
  return told if own < 0 else f'{told} critic.gae_lambda={own:g}'


def _field(config: ConfigDict, name: str) -> Any:
  block, field = name.split('.')
  return config[block][field]


def _of_estimation(f: Values) -> Iterator[str]:
  """Rewards, values, advantages and targets that contradict each other."""
  reward, own = f['macro.reward'], f['ppo.advantage'] == 'own'
  per_token = f['ppo.discount'] == 'token'
  target = f['critic.target']
  if reward != 'sum' and target == 'token' and f['ppo.baseline'] == 'critic':
    yield (
        "critic.target='token' aims at summed rewards; with macro.reward="
        f"{reward!r} use critic.target='macro'"
    )
  if reward != 'sum' and per_token:
    yield (
        f"ppo.discount='token' weighs summed rewards; with macro.reward="
        f"{reward!r} use ppo.discount='macro'"
    )
  if own and f['ppo.ratio'] != 'token':
    yield (
        f"ppo.ratio={f['ppo.ratio']!r} is one for a macro action and needs one "
        "advantage for it; use ppo.advantage='shared'"
    )
  if own and per_token and f['macro.value'] != 'start':
    yield (
        "ppo.advantage='own' with ppo.discount='token' is defined for "
        f"macro.value='start' only, not {f['macro.value']!r}"
    )
  if f['ppo.kl_target'] and not f['ppo.kl_coef']:
    yield (
        f"ppo.kl_target={f['ppo.kl_target']} adapts ppo.kl_coef by factors, "
        'and 0 stays 0; start from another, 0.05 for example'
    )


def _of_boundaries(f: Values) -> Iterator[str]:
  """Macro actions that cannot be as they are asked for."""
  least, most = f['macro.min_len'], f['macro.max_len']
  if most > 0 and most < 2 * least - 1:
    yield (
        f'macro.max_len={most} must be 0 or at least {2 * least - 1} with '
        f'macro.min_len={least}: no lengths in between add up to {most + 1}'
    )
  if f['macro.last_token_alone'] and least > 1:
    yield (
        f'macro.last_token_alone makes a macro action of one token; with it '
        f'macro.min_len={least} must be 1'
    )
  if f['macro.termination'] == 'parsing' and not f['macro.parser']:
    yield (
        "macro.parser is empty; macro.termination='parsing' needs "
        "'module:function', a .jsonl file of trees or 'command: ...'"
    )


def _of_authors(f: Values) -> Iterator[str]:
  """What the authors' code cannot do, or only in company."""
  if f['macro.empty_step']:
    for name, value in (
        ('macro.last_token_alone', True),
        ('ppo.advantage', 'shared'),
        ('ppo.discount', 'macro'),
        ('ppo.baseline', 'critic'),
    ):
      if f[name] != value:
        yield (
            f'macro.empty_step, a quirk of the authors, needs {name}={value!r},'
            f' not {f[name]!r}'
        )
    if f['critic.target'] == 'token':
      yield (
          'macro.empty_step is a step of macro actions, and critic.target='
          "'token' has none; use critic.target='macro'"
      )
  if f['macro.variant'] != 'authors':
    return
  if f['macro.value'] == 'unit':
    yield (
        "macro.value='unit' always crashes in the authors' code (it indexes a "
        'vector as a matrix); use it with macro.variant=ours or paper'
    )
  if f['macro.termination'] == 'parsing':
    yield (
        "macro.termination='parsing' crashes in the authors' code on every "
        'response without EOS, on contractions and on brackets; use it with '
        'macro.variant=ours or paper'
    )


def _without_critic(f: Values) -> Iterator[str]:
  if (baseline := f['ppo.baseline']) == 'critic':
    return
  needs = {
      'ppo.samples_per_prompt': (lambda n: n > 1, 'at least 2'),
      'ppo.gae_lambda': (lambda x: x == 1, '1'),
      'ppo.critic_warmup_updates': (lambda n: n == 0, '0'),
  }
  for name, (holds, need) in needs.items():
    if not holds(f[name]):
      wrong = f'{name}={f[name]!r} must be {need} with ppo.baseline='
      yield f'{wrong}{baseline!r}, which has no critic'


def _of_variant(f: Values) -> Iterator[str]:
  """A variant is a table, so the name alone does nothing."""
  table = VARIANTS.get(f['macro.variant'], _OURS)
  same = lambda value: tuple(value) if isinstance(value, list) else value
  own = {name: v for name, v in table.items() if v != _OURS[name]}
  if own and all(same(f[name]) == _OURS[name] for name in own):
    yield (
        f"macro.variant={f['macro.variant']!r} is only a name here, none of its"
        f" values is set; select it by --config=recipe.py:{f['macro.variant']}"
    )


def problems(flat: Values) -> list[str]:
  """What contradicts itself among the switches, one line each.

  Args:
    flat: `config.flatten` of a config whose single values are in range.
  """
  return [
      line
      for check in (
          _of_estimation,
          _of_boundaries,
          _of_authors,
          _without_critic,
          _of_variant,
      )
      for line in check(flat)
  ]


def warnings(config: ConfigDict) -> list[str]:
  """What is allowed and may not be what was meant, one line each."""
  m, found = config.macro, []
  if ':' in config.ppo.advantage and config.ppo.ratio != 'token':
    found.append(
        f'ppo.ratio={config.ppo.ratio!r}: of what {config.ppo.advantage} '
        'gives, only the number at the first token of a macro action counts'
    )
  if m.variant == 'authors' and m.termination in ('ppl', 'ppl_adjacent'):
    found.append(
        f"macro.termination={m.termination!r} is the paper's; the authors' "
        "rule is 'ppl_authors', and what their training loop makes of it is "
        'macro.termination=fixed with macro.ngram=0'
    )
  if m.reward != 'sum' and not m.last_token_alone:
    found.append(
        f'macro.reward={m.reward!r} divides the score by the length of the last'
        ' macro action; macro.last_token_alone=True keeps it whole'
    )
  return found
