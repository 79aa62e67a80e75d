"""Rules of the host, from token ids to starts."""

import sys
from typing import Any

import numpy as np
import pytest

from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.macro import host
from tests.macro.text_rules_test import needs_text
from tests.macro.toys import ABCD, DCBA, SETTINGS, batch, ones, termination_of

pytestmark = pytest.mark.usefixtures('toy')


def test_the_mask_says_where_a_response_is() -> None:
  tokens = np.array([[7, 3, 4, 8, 5, 6]], np.int32)
  mask = np.array([[0, 1, 1, 0, 1, 1]], bool)
  starts, _ = termination_of(parser='toy:count')(tokens, mask)
  assert ones(starts) == [[0, 1, 0, 0, 1, 0]]


def test_equal_responses_are_parsed_once() -> None:
  termination = termination_of(parser='toy:count')
  # Without EOS it is another response of the same text.
  first, _ = termination(*batch(ABCD, DCBA, ABCD, [3, 4, 5, 6]))
  second, counts = termination(*batch(ABCD, DCBA, [3, 4]))
  assert sys.modules['toy'].asked == [['abcd', 'dcba'], ['ab']]
  np.testing.assert_array_equal(first[0], second[0])
  assert {k: x.tolist() for k, x in counts.items()} == {
      'sentences': [1, 1, 1],
      'fallbacks': [0, 0, 0],
  }


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(host, 'CACHE_SIZE', 2)
  termination = termination_of(parser='toy:count')
  rows = batch(ABCD, DCBA, [3, 4], [4, 5])
  starts, _ = termination(*rows)
  assert len(termination._kept) == 2
  np.testing.assert_array_equal(termination(*rows)[0], starts)


@pytest.mark.parametrize(
    'fields,error,message',
    [
        ({'parser': ''}, ValueError, "macro.parser=''"),
        ({'parser': 'toy'}, ValueError, "macro.parser='toy'"),
        ({'parser': 'command: '}, ValueError, "macro.parser='command: '"),
        ({'parser': 'command: "x'}, ValueError, 'macro.parser='),
        ({'parser': 'command: no-such-x'}, ValueError, "program 'no-such-x'"),
        ({'parser': 'no_such_x:f'}, ImportError, "macro.parser='no_such_x:f'"),
        ({'parser': 'toy:missing'}, ValueError, "macro.parser='toy:missing'"),
        ({'parser': 'toy:not_callable'}, ValueError, 'macro.parser='),
        ({'parser': '/no/trees.jsonl'}, OSError, "macro.parser='/no/trees"),
    ],
)
def test_what_is_wrong_is_said_at_the_start(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
  with pytest.raises(error, match='^macro.*') as raised:
    termination_of(**{'parser': 'toy:count'} | fields)
  assert message in str(raised.value)


def test_python_needs_no_parser(tmp_path_factory: Any) -> None:
  folder = str(tmp_path_factory.mktemp('trained'))
  tokenizer_lib.train_tokenizer(
      ['x = (1, 2); y = 3 for the win'] * 9, 290, folder
  )
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  settings = host.HostSettings(**SETTINGS | {'termination': 'python'})
  termination = host.HostTermination(settings, tokenizer)
  ids = tokenizer_lib.encode(tokenizer, 'x = (1,\n 2); y = 3\nfor')
  starts, counts = termination(*batch([*ids, tokenizer.eos_token_id]))
  at = [*np.flatnonzero(starts[0]).tolist(), len(ids)]
  parts = [tokenizer.decode(ids[a:b]) for a, b in zip(at, at[1:], strict=False)]
  assert [p.strip() for p in parts] == ['x = (1,\n 2);', 'y = 3', 'for']
  assert counts == {}


@needs_text
@pytest.mark.parametrize('rule', ['sentences', 'clauses'])
def test_text_rules_are_served(rule: str) -> None:
  starts, counts = termination_of(termination=rule)(*batch(ABCD, [1]))
  assert ones(starts) == [[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
  assert counts == {} and rule in host.NAMES
