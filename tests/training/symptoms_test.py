"""Each symptom by numbers typed by hand; when it is said, and what stops."""

import dataclasses
from typing import Any

import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax.training import symptoms

# A stage of PPO that learned: score up, KL and entropy as they should be.
_FIRST = {
    'eval/score': 0.7,
    'eval/kl': 0.0,
    'eval/ended': 0.98,
    'eval/repeated': 0.15,
    'objective/entropy': 2.0,
    'objective/score_std': 0.8,
}
_HEALTHY = _FIRST | {
    'eval/score': 2.4,
    'eval/kl': 4.3,
    'objective/entropy': 0.9,
}


def _codes(stage: str, **changed: Any) -> list[str]:
  """What the table finds in a reading with these metrics changed."""
  metrics = _HEALTHY | {'eval/accuracy': 0.8} | changed
  reading = symptoms.Reading(
      metrics=metrics,
      first=_FIRST,
      is_last=True,
      held_out=256,
      config=config_lib.base(),
  )
  return [
      s.code
      for s in symptoms.SYMPTOMS
      if s.stage == stage and s.evidence(reading)
  ]


@pytest.mark.parametrize('stage', ['sft', 'reward_model', 'ppo'])
def test_a_healthy_stage_has_no_symptom(stage):
  assert _codes(stage) == []


@pytest.mark.parametrize(
    'name, well, ill, code',
    [
        # 256 fair tosses stay below 0.5 + 2.58 * 0.5 / 16 = 0.581.
        ('eval/accuracy', 0.585, 0.578, 'reward_model_at_chance'),
        ('eval/kl', 30.0, 30.1, 'kl_above_max'),
        ('eval/ended', 0.02, 0.0, 'no_response_ends'),
        ('eval/repeated', 0.49, 0.5, 'one_token_repeated'),
        ('objective/entropy', 0.03, 0.01, 'entropy_collapsed'),
        # Below 0.7 - 0.8 / 2 = 0.3.
        ('eval/score', 0.31, 0.29, 'score_below_sft'),
    ],
)
def test_each_symptom_begins_at_its_bound(name, well, ill, code):
  stage = 'reward_model' if name == 'eval/accuracy' else 'ppo'
  assert _codes(stage, **{name: well}) == []
  assert _codes(stage, **{name: ill}) == [code]


@pytest.mark.parametrize(
    'accuracy, held_out, is_last, at_chance',
    [
        (0.5, 256, False, False),  # it has not learned yet
        (0.55, 2000, True, False),  # 0.5 + 2.58 * 0.5 / 44.7 = 0.529
        (0.62, 16, True, False),  # 16 pairs tell nothing: no alarm
        (0.56, 16, True, True),
    ],
)
def test_chance_is_that_of_the_pairs_there_are(
    accuracy, held_out, is_last, at_chance
):
  watch = symptoms.Watch('reward_model', config_lib.base(), held_out)
  watch.note({'eval/accuracy': accuracy})
  assert bool(watch.check(is_last)) == at_chance


def test_what_an_evaluation_does_not_measure_is_no_symptom():
  watch = symptoms.Watch('ppo', config_lib.base(), 256)
  watch.note({'eval/score': -9.0})  # nothing to compare it with yet
  assert watch.check(False) == []


def test_a_symptom_is_said_when_it_begins_and_leaves_when_it_is_gone():
  watch = symptoms.Watch('ppo', config_lib.base(), 256)
  watch.note(_FIRST)
  assert watch.check(False) == []
  watch.note({'eval/kl': 172.0})
  (line,) = watch.check(False)
  for part in ('kl_above_max', '172', 'ppo.max_kl', 'ppo.kl_coef'):
    assert part in line
  assert watch.check(False) == []  # said once
  assert list(watch.found) == ['kl_above_max']
  watch.note({'eval/kl': 12.0})
  watch.check(False)
  assert watch.found == {}
  watch.note({'eval/kl': 40.0})
  assert len(watch.check(False)) == 1  # it begins again


def test_a_restored_watch_goes_on_where_it_was():
  config = config_lib.base()
  whole, later = (symptoms.Watch('ppo', config, 256) for _ in range(2))
  whole.note(_FIRST)
  whole.note({'eval/kl': 40.0})
  whole.check(False)
  later.restore(whole.state())
  # Entropy has fallen against the first update, which was before the kill.
  after = _HEALTHY | {'eval/kl': 40.0, 'objective/entropy': 0.001}
  for watch in (whole, later):
    watch.note(after)
  assert whole.check(True) == later.check(True) != []
  assert whole.found == later.found
  assert list(later.found) == ['kl_above_max', 'entropy_collapsed']


def test_stop_ends_the_run_and_names_what_to_go_back_to():
  config = config_lib.base()
  config.stop.kl_above_max = True
  watch = symptoms.Watch('ppo', config, 256)
  watch.note(_FIRST | {'eval/ended': 0.0})
  watch.check(False)
  watch.stops(10, 'step 5')  # another symptom, which stop does not name
  watch.note({'eval/kl': 99.0})
  watch.check(False)
  with pytest.raises(symptoms.SymptomError) as error:
    watch.stops(20, 'step 10 in DIR')
  for part in (
      'stop.kl_above_max',
      'step 20',
      'step 10 in DIR',
      'ppo.optim.lr',
  ):
    assert part in str(error.value)


def _rows(**means: tuple[float, float]) -> dict[str, dict]:
  """Rows of a comparison from (SFT, PPO), each interval 0.1 to both sides."""
  about = lambda x: (x, x - 0.1, x + 0.1)
  rows = {
      name: {'sft': about(a), 'ppo': about(b), 'difference': about(b - a)}
      for name, (a, b) in means.items()
  }
  return rows | {'win rate by score': {'ppo': (0.8, 0.7, 0.9)}}


@pytest.mark.parametrize(
    'changed, codes',
    [
        ({}, []),
        ({'kl': (0, 31)}, ['kl_above_max']),
        ({'ended': (1, 0)}, ['no_response_ends']),
        ({'repeated': (0.1, 0.9)}, ['one_token_repeated']),
        ({'score': (0.7, 0.65)}, []),  # -0.05 [-0.15, 0.05]
        ({'score': (0.7, 0.5)}, ['score_below_sft']),  # -0.2 [-0.3, -0.1]
    ],
)
def test_the_comparison_shows_what_was_delivered(changed, codes):
  healthy = {
      'kl': (0.0, 4.0),
      'score': (0.7, 2.4),
      'ended': (0.98, 0.95),
      'repeated': (0.15, 0.2),
  }
  rows = _rows(**(healthy | changed))
  assert list(symptoms.of_comparison(rows, config_lib.base())) == codes


def test_the_verdict_counts_and_explains():
  assert 'none' in symptoms.verdict({})
  text = symptoms.verdict(
      {'kl_above_max': 'KL is 172', 'no_response_ends': 'x'}
  )
  head, first, second = text.splitlines()
  assert '2 symptoms' in head
  assert 'kl_above_max: KL is 172; raise ppo.kl_coef' in first
  assert 'no_response_ends' in second


def test_every_symptom_has_its_field_of_stop():
  assert tuple(config_lib.base().stop.keys()) == tuple(sorted(symptoms.CODES))
  assert len(set(symptoms.CODES)) == len(symptoms.SYMPTOMS)
  for symptom in symptoms.SYMPTOMS:
    assert dataclasses.asdict(symptom)['remedy']


def test_what_shows_at_the_end_of_a_stage_stays_with_its_best_step():
  watch = symptoms.Watch('reward_model', config_lib.base(), 256)
  watch.note({'eval/accuracy': 0.5})
  watch.check(True)
  watch.restore_best({'found': {}, 'first': {}})
  assert list(watch.found) == ['reward_model_at_chance']
