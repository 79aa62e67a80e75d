"""What may be wrong with a request, each in one line."""

import math
from typing import Any

import pytest

from ma_rlhf_jax.generation.request import Request


def _problems(**fields: Any) -> list[str]:
  try:
    Request(**{'model': 'm', 'prompt': 'p', **fields}).check()
  except ValueError as error:
    return [line.strip() for line in str(error).splitlines()]
  return []


def test_sensible_requests_pass():
  assert _problems() == []
  assert _problems(prompt='') == []  # BOS alone
  assert _problems(prompt=None) == []  # a conversation
  assert _problems(temperature=0.0, reward_model='r', dtype='bfloat16') == []
  assert _problems(num_samples=4, reward_model='r', top_p=1e-6) == []
  assert _problems(prompt=None, input='a.jsonl.gz', output='b.jsonl') == []


@pytest.mark.parametrize(
    ('fields', 'start'),
    [
        (
            {'temperature': -0.5},
            '--temperature=-0.5 must be 0, which is greedy',
        ),
        ({'temperature': 1e-40}, '--temperature=1e-40 must be 0, which is'),
        ({'top_p': 1e-300}, '--top_p=1e-300 must be from 1e-06 to 1'),
        ({'max_new_tokens': 3 * 10**9}, '--max_new_tokens=3000000000 must be'),
        ({'max_new_tokens': 8192}, '--max_new_tokens=8192 leaves no room'),
        ({'temperature': math.nan}, '--temperature=nan must be'),
        ({'temperature': math.inf}, '--temperature=inf must be'),
        ({'top_k': -1}, '--top_k=-1 must be'),
        ({'top_p': 0.0}, '--top_p=0.0 must be from 1e-06 to 1'),
        ({'top_p': 1.5}, '--top_p=1.5 must be'),
        ({'top_p': math.nan}, '--top_p=nan must be'),
        ({'max_new_tokens': 0}, '--max_new_tokens=0 must be from 1 to'),
        ({'num_samples': 0}, '--num_samples=0 must be from 1'),
        ({'max_prompt_len': -1}, '--max_prompt_len=-1 must be'),
        ({'batch_size': 0}, '--batch_size=0 must be'),
        ({'seed': -1}, '--seed=-1 must be'),
        ({'seed': 2**32}, '--seed=4294967296 must be'),
        ({'dtype': 'float16'}, "--dtype=float16 must be one of ('float32'"),
        ({'tensor': 0}, '--tensor=0 must be'),
        ({'model': ''}, '--model is missing'),
        ({'prompt': '\udcff'}, '--prompt holds half a character'),
        ({'input': 'a', 'output': 'b'}, '--prompt and --input exclude'),
        ({'prompt': None, 'input': 'a'}, '--input=a needs --output'),
        ({'output': 'b'}, '--output=b needs --input'),
        (
            {'prompt': None, 'input': 'gs://a', 'output': 'b'},
            '--input=gs://a must be a local file',
        ),
        (
            {'prompt': None, 'input': 'a', 'output': 'b.gz'},
            '--output=b.gz is written uncompressed',
        ),
        (
            {'temperature': 0.0, 'num_samples': 2},
            '--num_samples=2 at --temperature=0 would be the same',
        ),
        ({'prompt': None, 'num_samples': 2}, '--reward_model and --num_sampl'),
        ({'prompt': None, 'reward_model': 'r'}, '--reward_model and --num_s'),
    ],
)
def test_what_is_wrong_is_said(fields: dict[str, Any], start: str):
  (problem,) = _problems(**fields)
  assert problem.startswith(start)


def test_everything_wrong_is_said_at_once():
  found = _problems(temperature=-1.0, top_p=2.0, model='', dtype='f8')
  assert len(found) == 4


def test_the_longest_prompt_leaves_room_in_the_context():
  assert Request('m').prompt_limit == 8192 - 256
  assert Request('m', max_prompt_len=99).prompt_limit == 99
  assert Request('m', max_new_tokens=9000).prompt_limit == 1
