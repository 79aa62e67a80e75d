"""Which prompts an export is checked with."""

import json
import pathlib
from typing import Any

import pytest

from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.publishing import check_rows
from ma_rlhf_jax.publishing.check_rows import PromptsError
from tests import products


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
  return products.tokenizer(tmp_path_factory.mktemp('tokenizer'))


def test_held_out_prompts_of_the_run_are_taken(tokenizer: Any) -> None:
  config = products.config()
  prompts = check_rows.held_out(config, tokenizer, 'policy')
  scored = check_rows.held_out(config, tokenizer, 'scalar')
  assert len(prompts) == len(scored) == 8
  texts = [tokenizer_lib.decode(tokenizer, row[1:]) for row in prompts]
  assert len(set(texts)) > 4 and all(t.endswith('TL;DR:') for t in texts)
  for prompt, whole in zip(prompts, scored, strict=True):
    assert prompt[0] == 2 and whole[: len(prompt)] == prompt
    assert whole[-1] == 1 and len(whole) > len(prompt) + 3
  few = products.config(data__eval_rows=5)
  assert len(check_rows.held_out(few, tokenizer, 'policy')) == 5


def test_prompts_that_do_not_fit_are_told(tokenizer: Any) -> None:
  config = products.config(data__max_prompt_len=2)
  with pytest.raises(PromptsError, match='fits 2 tokens; give others by'):
    check_rows.held_out(config, tokenizer, 'policy')


def test_rows_that_have_gone_are_told(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  gone = str(tmp_path / 'rows.jsonl')
  config = products.config(data__task='hh', data__path=gone)
  with pytest.raises(PromptsError) as caught:
    check_rows.held_out(config, tokenizer, 'policy')
  message = str(caught.value)
  assert message.startswith(f"data.path='{gone}': there is no such file")
  assert message.endswith('or give prompts by --prompts=FILE')


def test_prompts_of_a_file(tokenizer: Any, tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'prompts.jsonl'
  rows = [{'prompt': f'the {i}', 'response': ' cat'} for i in range(10)]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  encode = lambda text: tokenizer_lib.encode(tokenizer, text)
  found = check_rows.of_file(str(path), tokenizer, 'policy')
  assert found == [[2, *encode(f'the {i}')] for i in range(8)]
  found = check_rows.of_file(str(path), tokenizer, 'scalar')
  assert found[3] == [2, *encode('the 3'), *encode(' cat'), 1]


@pytest.mark.parametrize(
    'text, words',
    [
        (None, 'cannot be read'),
        ('', 'holds no rows'),
        ('{"prompt": "a", "response": "b"}\n{"prompt"\n', 'line 2: needs'),
        (
            '{"prompt": "a"}\n',
            'line 1: needs a JSON object with the texts prom',
        ),
        ('{"prompt": 3, "response": "b"}\n', 'line 1: needs'),
        ('[1]\n', 'line 1: needs'),
    ],
)
def test_a_file_of_something_else_is_told(
    tokenizer: Any, tmp_path: pathlib.Path, text: str | None, words: str
) -> None:
  path = tmp_path / 'prompts.jsonl'
  if text is not None:
    path.write_text(text)
  with pytest.raises(PromptsError) as caught:
    check_rows.of_file(str(path), tokenizer, 'scalar')
  assert words in str(caught.value)
  assert str(caught.value).startswith(f'--prompts={path}')
