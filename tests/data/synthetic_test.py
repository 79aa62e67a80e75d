"""The synthetic task: its gold score by hand, and what its rows promise."""

import numpy as np
import pytest

from ma_rlhf_jax.data import synthetic
from ma_rlhf_jax.data.synthetic import gold_score, make_rows

POST = 'My boss was late again. I told a friend.\nTL;DR:'


@pytest.mark.parametrize(
    'response, score',
    [
        (' work calm fair kind neat warm wise true.', 8 / 8),
        (' calm fair.', 2 / 8),  # scored as if it had eight words
        ('CALM, Fair!', 2 / 8),  # case and punctuation do not count
        (' calm fair kind neat warm wise true also and but', 7 / 10),
        (' calm calm calm', (1 - 2) / 8),  # one different word, two repeats
        (' and and', -1 / 8),
        (' cold fair', (1 - 1) / 8),
        (' cold cold cold', (-3 - 2) / 8),
        (' money fair', (1 - 1) / 8),  # another topic
        (' work money', (1 - 1) / 8),
        (' work work', (1 - 1) / 8),
        (' calmly', 0.0),  # whole words only
        (' cold' * 8, -1.0),  # (-8 - 7) / 8, bounded
        ('', -1.0),
        (' ... ', -1.0),
    ],
)
def test_gold_score_by_hand(response: str, score: float) -> None:
  assert gold_score(POST, response) == pytest.approx(score, abs=1e-12)


def test_each_noun_points_at_its_own_topic() -> None:
  for topic, nouns in synthetic.TOPICS.items():
    for noun in nouns:
      assert gold_score(f'My {noun} was late.', f' {topic}') == 1 / 8
      for other in set(synthetic.TOPICS) - {topic}:
        assert gold_score(f'My {noun} was late.', f' {other}') == -1 / 8


def test_no_word_has_two_meanings() -> None:
  lists = [synthetic.GOOD, synthetic.BAD, synthetic.NEUTRAL]
  words = [word for some in lists for word in some] + list(synthetic.TOPICS)
  assert len(words) == len(set(words))
  nouns = [noun for some in synthetic.TOPICS.values() for noun in some]
  templates = ' '.join(
      synthetic.EVENTS + synthetic.TIMES + synthetic.REACTIONS
  ).lower()
  assert len(nouns) == len(set(nouns))
  assert not set(nouns) & set(templates.replace('.', ' ').split())


def test_rows_depend_on_seed_and_index_only() -> None:
  rows = make_rows(40, seed=3, label_noise=0.3)
  assert rows == make_rows(40, seed=3, label_noise=0.3)
  assert rows[:7] == make_rows(7, seed=3, label_noise=0.3)
  assert rows[30:] == make_rows(10, seed=3, label_noise=0.3, start=30)
  other = make_rows(40, seed=4, label_noise=0.3)
  assert sum(a == b for a, b in zip(rows, other, strict=True)) == 0


def test_a_row_is_a_post_and_two_summaries() -> None:
  for row in make_rows(50, seed=0, label_noise=0.5):
    assert list(row) == ['prompt', 'chosen', 'rejected']
    assert row['prompt'].endswith('\nTL;DR:')
    for name in ('chosen', 'rejected'):
      assert row[name][0] == ' ' and row[name][1] != ' '
      assert 8 <= len(row[name].split()) <= 11


@pytest.mark.parametrize('noise, low, high', [(0, 0, 0), (1, 1, 1)])
def test_labels_follow_gold_but_for_noise(
    noise: float, low: float, high: float
) -> None:
  gold = _gold(make_rows(200, seed=1, label_noise=noise))
  assert low <= np.mean(gold[:, 0] < gold[:, 1]) <= high
  assert np.all(gold[:, 0] != gold[:, 1])


def test_a_tenth_of_the_labels_are_wrong() -> None:
  gold = _gold(make_rows(2000, seed=1, label_noise=0.1))
  # Standard deviation of the share: sqrt(.1 * .9 / 2000) = 0.007.
  assert 0.07 < np.mean(gold[:, 0] < gold[:, 1]) < 0.13


def test_chosen_responses_leave_room_to_improve() -> None:
  gold = _gold(make_rows(1000, seed=2, label_noise=0.1))
  assert 0.05 < gold[:, 0].mean() < 0.3
  assert gold[:, 0].std() > 0.25
  assert gold[:, 0].mean() - gold[:, 1].mean() > 0.25
  assert gold.max() <= 1


def test_length_says_little_about_gold() -> None:
  rows = make_rows(1000, seed=5, label_noise=0.0)
  lengths = [len(row['chosen'].split()) for row in rows]
  assert abs(np.corrcoef(lengths, _gold(rows)[:, 0])[0, 1]) < 0.2


def _gold(rows: list[dict[str, str]]) -> np.ndarray:
  names = ('chosen', 'rejected')
  return np.array(
      [[gold_score(r['prompt'], r[n]) for n in names] for r in rows]
  )
