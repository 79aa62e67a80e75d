"""The model card: metadata that the hub reads, and text for people."""

import ast
import dataclasses
import pathlib
import re
from typing import Any

from etils import epath
import pytest
import yaml

from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.models.presets import PRESETS
from ma_rlhf_jax.publishing import card
from tests import tiny
from tests.products import GEMMA2

_ODD = 'me/x"\n---\nlicense: mit\n```\n<b>[a](b)|😀'


def _text(tmp_path: pathlib.Path, stage: str = 'ppo', **fields: Any) -> str:
  own = {f.name for f in dataclasses.fields(card.Subject)}
  config = tiny.config(**{k: v for k, v in fields.items() if k not in own})
  subject = {
      'config': config,
      'workdir': epath.Path(tmp_path),
      'stage': stage,
      'shape': tiny.SHAPE,
      'model_path': 'me/it',
      **{k: v for k, v in fields.items() if k in own},
  }
  return card.text(card.Subject(**subject))


def _metadata(text: str) -> dict[str, Any]:
  start, metadata, _ = text.split('---\n', 2)
  assert start == ''
  return yaml.safe_load(metadata)


def _code(text: str) -> str:
  (code,) = re.findall(r'^```python\n(.*?)^```$', text, re.M | re.S)
  return code


def test_a_tuned_gemma_names_base_rows_and_licence(
    tmp_path: pathlib.Path,
) -> None:
  for stage, step in (('sft', 30), ('reward_model', 40), ('ppo', 50)):
    workdir_lib.mark_done(tmp_path, stage, {'step': step})
  text = _text(
      tmp_path,
      sft__init='google/gemma-2b',
      data__task='hh',
      data__path='Dahoas/full-hh-rlhf',
      shape=PRESETS['gemma-2b'],
  )
  assert _metadata(text) == {
      'base_model': 'google/gemma-2b',
      'datasets': ['Dahoas/full-hh-rlhf'],
      'license': 'gemma',
      'library_name': 'transformers',
      'pipeline_tag': 'text-generation',
      'tags': ['rlhf', 'ma-rlhf', 'macro-actions', 'ppo'],
  }
  lines = text.split('\n')
  start = lines.index('## How it was made') + 2
  assert lines[start : start + 5] == [
      '- Start: [google/gemma-2b](https://huggingface.co/google/gemma-2b)',
      '- Rows: task hh, [Dahoas/full-hh-rlhf]'
      '(https://huggingface.co/datasets/Dahoas/full-hh-rlhf)',
      '- Supervised fine-tuning: 30 updates of 64 rows',
      '- Reward model: 40 updates of 64 rows',
      '- MA-PPO (variant ours, macro actions of 5 tokens): '
      '50 updates of 4 rows',
  ]
  assert f'> {card.GEMMA_NOTICE}.' in lines
  assert 'The weights were modified' in text


def test_random_weights_claim_neither_base_nor_licence(
    tmp_path: pathlib.Path,
) -> None:
  text = _text(tmp_path, data__path='rows/mine.jsonl', data__task='columns')
  metadata = _metadata(text)
  assert metadata.keys() == {'library_name', 'pipeline_tag', 'tags'}
  assert '- Start: random weights' in text
  assert '- Rows: task columns, the local mine.jsonl' in text
  assert 'whoever publishes it chooses the licence' in text
  assert 'Gemma Terms' not in text


def test_folders_of_the_author_are_not_told(tmp_path: pathlib.Path) -> None:
  text = _text(
      tmp_path,
      sft__init='/home/me/secret/small-one',
      data__task='columns',
      data__path='/home/me/secret/rows.jsonl',
  )
  assert '/home/me' not in text
  assert '- Start: the local small-one' in text
  assert 'base_model' not in _metadata(text)
  assert 'license' not in _metadata(text)
  assert 'That of the model it started from' in text


@pytest.mark.parametrize(
    'field', ['data__path', 'sft__init', 'model_path', 'base']
)
def test_odd_names_stay_where_they_are(
    tmp_path: pathlib.Path, field: str
) -> None:
  text = _text(
      tmp_path, **{'data__task': 'columns', 'data__path': 'x', field: _ODD}
  )
  assert 'license' not in _metadata(text)
  ast.parse(_code(text))
  outside = text.split('---\n', 2)[2].replace(_code(text), '')
  assert '\n---\n' not in outside and '<b>' not in outside
  assert '[a](b)' not in outside
  assert outside.count('```') == 2
  assigned = {
      target.id: ast.literal_eval(node.value)
      for node in ast.parse(_code(text)).body
      if isinstance(node, ast.Assign)
      and isinstance(target := node.targets[0], ast.Name)
      and isinstance(node.value, ast.Constant)
  }
  if field == 'model_path':
    assert assigned['model_path'] == _ODD
  if field == 'base':
    assert assigned['base_path'] == _ODD


@pytest.mark.parametrize(
    'stage, first, lines',
    [
        ('sft', 'A policy after supervised fine-tuning', 3),
        ('reward_model', 'A reward model', 4),
        ('ppo', 'A policy after MA-PPO', 5),
        ('critic', 'The critic of MA-PPO', 5),
    ],
)
def test_each_stage_tells_of_those_before_it(
    tmp_path: pathlib.Path, stage: str, first: str, lines: int
) -> None:
  for name in ('sft', 'reward_model', 'ppo'):
    workdir_lib.mark_done(tmp_path, name, {'step': 7})
  text = _text(tmp_path, stage)
  assert f'\n{first}' in text
  history = text.split('## How it was made\n\n')[1].split('\n\n')[0]
  assert len(history.split('\n')) == lines
  scores = stage in ('reward_model', 'critic')
  kind = 'text-classification' if scores else 'text-generation'
  assert _metadata(text)['pipeline_tag'] == kind
  assert ('SequenceClassification' in _code(text)) == scores
  assert ('read at the last token' in text) == scores


def test_a_stage_that_is_being_finished_gives_its_own_updates(
    tmp_path: pathlib.Path,
) -> None:
  text = _text(tmp_path, 'sft', step=12)
  assert '- Supervised fine-tuning: 12 updates of 64 rows' in text


def test_stages_of_other_runs_are_not_claimed(tmp_path: pathlib.Path) -> None:
  text = _text(tmp_path, ppo__policy_init='me/sft', ppo__reward_model='me/rm')
  assert '- Supervised fine-tuning: taken from another run or model' in text
  assert '- Reward model: taken from another run or model' in text


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'macro__ngram': 1}, 'PPO (variant ours, one token per macro action)'),
        (
            {'macro__ngram': 0},
            'MA-PPO (variant ours, one macro action per response)',
        ),
        (
            {'macro__termination': 'ppl', 'macro__variant': 'paper'},
            'MA-PPO (variant paper, macro actions by the rule ppl)',
        ),
    ],
)
def test_the_algorithm_is_named(
    tmp_path: pathlib.Path, fields: dict[str, Any], words: str
) -> None:
  assert f'A policy after {words}, made with' in _text(tmp_path, **fields)


def test_adapters_are_put_on_their_base(tmp_path: pathlib.Path) -> None:
  text = _text(
      tmp_path, 'sft', base='google/gemma-2b', sft__init='google/gemma-2b'
  )
  metadata = _metadata(text)
  assert metadata['library_name'] == 'peft' and 'lora' in metadata['tags']
  assert metadata['base_model'] == 'google/gemma-2b'
  code = _code(text)
  assert 'from peft import PeftModel' in code
  assert 'PeftModel.from_pretrained(model, model_path)' in code
  assert '\nLow-rank adapters of a policy' in text
  # The base of these is no model of the hub, whatever that goes back to.
  local = _text(tmp_path, base='/runs/a/sft/hf', sft__init='google/gemma-2b')
  assert 'base_model' not in _metadata(local)
  scores = _code(_text(tmp_path, 'reward_model', base='google/gemma-2b'))
  assert 'num_labels=1' in scores


def test_the_snippet_has_the_form_of_the_published_ones(
    tmp_path: pathlib.Path,
) -> None:
  code = _code(_text(tmp_path))
  for call in (
      'AutoTokenizer.from_pretrained(model_path)',
      "AutoModelForCausalLM.from_pretrained(model_path, torch_dtype='auto')",
      'model.generate(**inputs, max_new_tokens=20)',
      'tokenizer.decode(outputs[0]',
  ):
    assert call in code
  assert 'trust_remote_code' not in code
  hh = _code(_text(tmp_path, data__task='hh', data__path='x/y'))
  assert 'Human: ' in hh and 'Assistant:' in hh


def test_bounds_of_gemma2_are_pointed_out(tmp_path: pathlib.Path) -> None:
  assert 'attn_implementation' not in _text(tmp_path)
  assert 'attn_implementation="eager"' in _text(tmp_path, shape=GEMMA2)


def test_measurements_appear_where_there_are_some(
    tmp_path: pathlib.Path,
) -> None:
  assert '## Metrics' not in _text(tmp_path)
  assert '## Check' not in _text(tmp_path)
  (tmp_path / 'ppo' / 'metrics').mkdir(parents=True)
  (tmp_path / 'ppo' / 'metrics' / '0001-0001.jsonl').write_text(
      '{"step": 4, "stage": "ppo", "eval/score": 1.5}\n'
  )
  found = {'max_logit_difference': 0.5, 'top1_agreement': 1.0}
  receipt = {'rows': 6, 'readers': {'ma_rlhf_jax': found}}
  text = _text(tmp_path, receipt=receipt)
  assert (
      '## Metrics\n\nAfter update 4, on at most 4 held-out prompts:\n\n' in text
  )
  assert 'Read back on 6 prompts' in text
  assert '| ma\\_rlhf\\_jax | 0.5 | 1 |' in text
