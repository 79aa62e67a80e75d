"""Variants, controls, and what contradicts itself."""

from typing import Any

from ml_collections import ConfigDict
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import switches
from ma_rlhf_jax.arguments import ArgumentError


def _config(arguments: str = '', **fields: Any) -> ConfigDict:
  config = config_lib.apply_arguments(config_lib.base(), arguments)
  flat = {name.replace('__', '.'): value for name, value in fields.items()}
  config.update_from_flattened_dict(flat)
  return config


def _problems(arguments: str = '', **fields: Any) -> list[str]:
  return switches.problems(config_lib.flatten(_config(arguments, **fields)))


def test_the_defaults_are_ours():
  flat = config_lib.flatten(config_lib.base())
  for name, value in switches.VARIANTS['ours'].items():
    assert flat[name] == (list(value) if isinstance(value, tuple) else value)


def test_the_authors_variant_is_what_their_code_does():
  c = _config('authors')
  assert (c.macro.variant, c.macro.reward, c.macro.value) == (
      'authors',
      'mean',
      'equal',
  )
  assert c.macro.last_token_alone and c.macro.empty_step
  assert (c.ppo.ratio, c.ppo.loss_reduction) == ('token', 'sequence')
  assert c.ppo.logprob_temperature == 1.0
  assert c.macro.random_lengths == (1, 2, 3, 5, 10)
  assert c.critic.target == 'macro'


def test_the_paper_variant_sums_and_has_one_ratio_a_macro_action():
  c = _config('paper')
  assert (c.macro.reward, c.macro.value) == ('sum', 'equal')
  assert (c.ppo.ratio, c.ppo.loss_reduction) == ('macro', 'macro')
  assert not c.macro.last_token_alone and not c.macro.empty_step


def test_what_is_said_later_wins():
  c = _config('authors,ngram=3', macro__reward='sum')
  assert (c.macro.ngram, c.macro.reward) == (3, 'sum')
  assert c.macro.empty_step  # the rest stays
  with pytest.raises(ArgumentError, match='authors and ours are two variants'):
    _config('authors,ours')


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ('ngram=10,token_ppo', ('ngram=10', 'token_ppo', 'macro.ngram=10')),
        ('token_ppo,ngram=10', ('ngram=10', 'token_ppo')),
        ('one_macro,ngram=5', ('ngram=5', 'one_macro')),
        ('termination=ppl,token_ppo', ('termination=ppl', 'token_ppo')),
        ('termination=ppl,ngram=3', ('ngram=3', "macro.termination='ppl'")),
        ('ngram=3,ngram=4', ('ngram=3', 'ngram=4')),
        ('ngram=3,termination=python,authors', ('ngram=3', 'python')),
    ],
)
def test_an_argument_that_would_be_unheard_is_refused(
    arguments: str, said: tuple[str, ...]
):
  with pytest.raises(ArgumentError) as caught:
    _config(arguments)
  assert all(part in str(caught.value) for part in said)


@pytest.mark.parametrize(
    ('arguments', 'ngram'),
    [
        ('ngram=1,token_ppo', 1),
        ('token_ppo,lambda_matched,ngram=10', 1),
        ('termination=parsing,ngram=3', 3),
        ('ngram=3,ngram=3', 3),
        ('ngram=0,one_macro', 0),
        ('termination=fixed,token_ppo', 1),
    ],
)
def test_arguments_that_words_agree_with_are_kept(arguments: str, ngram: int):
  assert _config(arguments).macro.ngram == ngram


@pytest.mark.parametrize(
    ('arguments', 'want'),
    [
        ('token_ppo', {'macro.ngram': 1, 'ppo.gae_lambda': 0.95}),
        # .95 ** (1/5), .95 ** (1/10)
        ('lambda_matched', {'macro.ngram': 1, 'ppo.gae_lambda': 0.9897938}),
        ('ngram=10,lambda_matched', {'ppo.gae_lambda': 0.9948838}),
        ('piecewise', {'macro.ngram': 5, 'ppo.advantage': 'own'}),
        ('kl_matched', {'macro.ngram': 1, 'ppo.kl_coef': 0.01}),
        ('kl_summed', {'macro.reward': 'sum', 'macro.last_token_alone': True}),
        ('kl_averaged', {'macro.reward': 'mean', 'critic.target': 'macro'}),
        ('lambda_one', {'ppo.gae_lambda': 1.0, 'macro.ngram': 5}),
        ('one_macro', {'macro.ngram': 0, 'macro.termination': 'fixed'}),
        ('rloo', {'ppo.samples_per_prompt': 4, 'ppo.batch_size': 64}),
    ],
)
def test_controls_by_hand(arguments: str, want: dict[str, Any]):
  flat = config_lib.flatten(_config(arguments))
  for name, value in want.items():
    if isinstance(value, float):
      value = pytest.approx(value, abs=1e-7)
    assert flat[name] == value
  assert switches.problems(flat) == []


def test_the_two_kl_controls_differ_in_the_rewards_alone():
  one, two = (
      config_lib.flatten(_config(name)) for name in ('kl_summed', 'kl_averaged')
  )
  assert {n for n in one if one[n] != two[n]} == {'macro.reward'}


@pytest.mark.parametrize(
    'arguments',
    [
        'termination=ppl,lambda_matched',
        'ngram=0,kl_matched',
        'ngram=1,kl_matched',
    ],
)
def test_a_matched_control_needs_a_number_of_tokens(arguments: str):
  with pytest.raises(ValueError, match='write for example :ngram=5'):
    _config(arguments)


@pytest.mark.parametrize('word', ['token_ppo', 'lambda_matched', 'kl_matched'])
def test_one_token_macros_have_nothing_of_a_variant_left(word: str):
  c = _config(f'authors,{word}')
  assert c.macro.ngram == 1
  assert not c.macro.empty_step and not c.macro.last_token_alone
  assert not _config('authors,one_macro').macro.last_token_alone


def test_controls_are_worked_out_from_the_same_config_in_any_order():
  for arguments in (
      'lambda_matched,kl_matched,ngram=10',
      'ngram=10,kl_matched,lambda_matched,kl_matched',
  ):
    c = _config(arguments)
    assert c.macro.ngram == 1
    assert c.ppo.kl_coef == pytest.approx(0.005)  # .05 / 10
    assert c.ppo.gae_lambda == pytest.approx(0.9948838)  # .95 ** (1 / 10)
  for arguments in ('rloo,authors', 'authors,rloo', 'rloo,rloo,authors'):
    c = _config(arguments)
    assert (c.ppo.baseline, c.ppo.batch_size) == ('rloo', 64)
    assert (c.macro.reward, c.ppo.gae_lambda) == ('mean', 1.0)


def test_controls_that_contradict_each_other_are_refused():
  words = 'lambda_matched sets ppo.gae_lambda=.* and lambda_one sets it to 1.0'
  with pytest.raises(ValueError, match=words):
    _config('lambda_matched,lambda_one')
  with pytest.raises(
      ValueError, match='one_macro sets macro.ngram=0 and token'
  ):
    _config('one_macro,token_ppo')


def test_adapters_come_on_top_of_the_controls():
  c = _config('lora,rloo')
  assert c.lora.rank == 32
  assert c.ppo.batch_size == 64 and c.rollout.batch_size == 64
  assert c.ppo.optim.lr == pytest.approx(1.5e-4)
  large = config_lib.published('google/gemma-7b', 'gemma-7b')
  large.model.remat = 'dots'
  assert config_lib.apply_arguments(large, 'lora').model.remat == 'full'
  assert config_lib.apply_arguments(large, 'lora').rollout.batch_size == 16


# Fields that are set, and words that the only message must hold.
_REFUSED = [
    (
        {'macro__reward': 'mean'},
        "macro.reward='mean' use critic.target='macro'",
    ),
    (
        {
            'macro__reward': 'mean',
            'critic__target': 'macro',
            'ppo__discount': 'token',
        },
        "macro.reward='mean' use ppo.discount='macro'",
    ),
    (
        {'ppo__advantage': 'own', 'ppo__ratio': 'macro'},
        "ppo.ratio='macro' is one for a macro action",
    ),
    (
        {
            'ppo__advantage': 'own',
            'ppo__discount': 'token',
            'macro__value': 'unit',
        },
        "macro.value='start' only, not 'unit'",
    ),
    (
        {'ppo__kl_target': 3.0, 'ppo__kl_coef': 0.0},
        'ppo.kl_target=3.0 adapts ppo.kl_coef by factors',
    ),
    (
        {'macro__min_len': 3, 'macro__max_len': 4},
        'macro.max_len=4 must be 0 or at least 5',
    ),
    (
        {'macro__last_token_alone': True, 'macro__min_len': 2},
        'macro.min_len=2 must be 1',
    ),
    ({'macro__termination': 'parsing'}, 'macro.parser is empty'),
    (
        {'macro__empty_step': True, 'critic__target': 'macro'},
        'needs macro.last_token_alone=True, not False',
    ),
    (
        {'macro__empty_step': True, 'macro__last_token_alone': True},
        "use critic.target='macro'",
    ),
    (
        {'ppo__baseline': 'rloo', 'ppo__gae_lambda': 1.0},
        'ppo.samples_per_prompt=1 must be at least 2',
    ),
    (
        {'ppo__baseline': 'rloo', 'ppo__samples_per_prompt': 2},
        'ppo.gae_lambda=0.95 must be 1',
    ),
    ({'macro__variant': 'paper'}, "macro.variant='paper' is only a name here"),
]


@pytest.mark.parametrize(('fields', 'words'), _REFUSED)
def test_a_contradiction_is_refused(fields: dict[str, Any], words: str):
  found = _problems(**fields)
  assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        ({'macro__value': 'unit'}, "macro.value='unit' always crashes"),
        (
            {'macro__termination': 'parsing', 'macro__parser': 'a:b'},
            "macro.termination='parsing' crashes in the authors' code",
        ),
    ],
)
def test_what_crashes_in_the_authors_code_is_refused_there(
    fields: dict[str, Any], words: str
):
  found = _problems('authors', **fields)
  assert len(found) == 1 and words in found[0]
  assert _problems('paper', **fields) == []


@pytest.mark.parametrize(
    ('arguments', 'weight'),
    [
        ('', '0.05 per nat'),
        ('authors', '0.05 / 5 = 0.01 per nat'),
        ('authors,ngram=0', '0.05 / its tokens per nat'),
    ],
)
def test_the_kl_weight_of_a_macro_action_is_told(arguments: str, weight: str):
  told = switches.describe(_config(arguments))
  assert f'KL weight of a macro action: {weight}' in told
  assert 'macro.reward=' in told and 'ppo.ratio=token' in told


def test_rules_that_are_not_the_authors_warn_under_their_variant():
  (found,) = switches.warnings(_config('authors,termination=ppl'))
  assert "'ppl_authors'" in found
  assert switches.warnings(_config('authors,termination=ppl_authors')) == []
  (found,) = switches.warnings(
      _config(macro__reward='mean', critic__target='macro')
  )
  assert 'macro.last_token_alone=True' in found
