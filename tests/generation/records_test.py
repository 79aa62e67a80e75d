"""Rows of the output by hand, and which of several responses is the best."""

from ma_rlhf_jax.generation import records
from ma_rlhf_jax.generation.responses import Response


def _response(row: int, sample: int, score: float | None = None) -> Response:
  return Response(row, sample, [4, sample, 1], -1.5 * (sample + 1), score)


def _spell(ids: list[int]) -> str:
  return '-'.join(map(str, ids))


def test_a_prompt_is_complete_with_its_last_sample():
  collector = records.Collector(2)
  a0, a1, b0, b1 = (_response(row, n) for row in (0, 3) for n in (0, 1))
  assert collector.add([a1, b0]) == []
  assert collector.add([b1]) == [[b0, b1]]
  assert collector.add([a0]) == [[a0, a1]]  # by sample


def test_one_response_makes_one_row():
  rows = records.rows({'prompt': 'p', 'id': 7}, [_response(0, 0)], _spell)
  assert rows == [
      {
          'prompt': 'p',
          'id': 7,
          'response': '4-0-1',
          'response_ids': [4, 0, 1],
          'num_tokens': 3,
          'logprob': -1.5,
      }
  ]
  assert list(rows[0])[:2] == ['prompt', 'id']


def test_samples_without_scores_make_a_row_each():
  rows = records.rows(
      {'prompt': 'p'}, [_response(0, n) for n in (0, 1)], _spell
  )
  assert [(r['sample'], r['response'], r['logprob']) for r in rows] == [
      (0, '4-0-1', -1.5),
      (1, '4-1-1', -3.0),
  ]
  assert 'score' not in rows[0]


def test_of_scored_samples_the_best_is_kept_and_the_first_of_equals():
  scored = [_response(0, n, s) for n, s in enumerate([0.5, 2.0, -1.0, 2.0])]
  (row,) = records.rows({'prompt': 'p'}, scored, _spell)
  assert row['response'] == '4-1-1' and row['score'] == 2.0
  assert row['scores'] == [0.5, 2.0, -1.0, 2.0]
  (row,) = records.rows({}, [_response(0, 0, 0.25)], _spell)
  assert row['score'] == 0.25 and 'scores' not in row


def test_fields_of_an_earlier_output_do_not_stay():
  given = {'prompt': 'p', 'score': 9.0, 'response': 'old', 'id': 1}
  (row,) = records.rows(given, [_response(0, 0)], _spell)
  assert row['response'] == '4-0-1' and 'score' not in row and row['id'] == 1
  assert records.replaced([{'prompt': 'p'}, given]) == ['response', 'score']
