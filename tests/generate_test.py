"""The verb as a user runs it: files, one prompt, a conversation, errors."""

import dataclasses
import gzip
import io
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from absl import flags
import pytest

from ma_rlhf_jax import generate, interrupts
from ma_rlhf_jax.commands import absl_flags, verbs
from ma_rlhf_jax.data import tokenizer as tokenizer_lib
from ma_rlhf_jax.generation import chat
from ma_rlhf_jax.generation import session as session_lib
from ma_rlhf_jax.generation.request import Request
from tests import served

_ROOT = pathlib.Path(__file__).parents[1]
# An empty one, one that comes twice, and all of one width: few programs.
PROMPTS = [
    'the cat sat',
    '',
    'né 😀 <eos> ',
    'the mat',
    'on the mat and ran, ' * 2,
    'the mat',
    'said so.',
    'and',
    'ran, ran',
]
ANSWER = ' né,😀!'


@dataclasses.dataclass(frozen=True)
class Place:
  """Models and a file of prompts.

  Attributes:
    store: the models.
    scripted: a policy that answers a human with `ANSWER`.
    input: rows of `PROMPTS` with an `id`.
  """

  store: served.Store
  scripted: str
  input: str


@pytest.fixture(scope='module')
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
  root = tmp_path_factory.mktemp('place')
  store = served.store(root)
  scripted = served.scripted(root, store.tokenizer, chat.ASSISTANT, ANSWER)
  return Place(store, scripted, _write(root / 'in.jsonl', PROMPTS))


def _write(path: pathlib.Path, texts: list[str]) -> str:
  rows = [{'id': i, 'prompt': text} for i, text in enumerate(texts)]
  opener = gzip.open if path.suffix == '.gz' else open
  with opener(path, 'wt', encoding='utf-8') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)
  return str(path)


def _run(
    place: Place, folder: pathlib.Path, source: str | None = None, **fields: Any
) -> list[dict[str, Any]]:
  """The rows that a run of all prompts writes."""
  target = folder / 'out.jsonl'
  defaults = {
      'model': place.store.policy,
      'input': source or place.input,
      'output': str(target),
      'overwrite': True,
      'max_new_tokens': 12,
      'batch_size': 16,
  }
  generate.run(Request(**{**defaults, **fields}))
  assert not target.with_name('out.jsonl.partial').exists()
  return [json.loads(line) for line in target.read_text().splitlines()]


def test_rows_come_in_order_with_their_fields(
    place: Place, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
):
  rows = _run(place, tmp_path)
  assert [row['prompt'] for row in rows] == PROMPTS
  assert [row['id'] for row in rows] == list(range(len(PROMPTS)))
  for row in rows:
    ids = row['response_ids']
    assert list(row) == [
        'id',
        'prompt',
        'response',
        'response_ids',
        'num_tokens',
        'logprob',
    ]
    assert row['num_tokens'] == len(ids) <= 12
    assert len(ids) == 12 or ids[-1] == 1
    plain = [i for i in ids if i > 2]
    spelt = tokenizer_lib.decode(place.store.tokenizer, plain)
    assert row['response'] == spelt
    # 320 ids that are about as likely as each other: 5.8 nats each.
    assert row['logprob'] == pytest.approx(-5.8 * len(ids), rel=0.2)
  assert len({tuple(r['response_ids']) for r in rows}) == len(PROMPTS)
  told = capsys.readouterr()
  assert told.out == '' and 'rows 9/9' in told.err and 'written: ' in told.err


@pytest.mark.slow
def test_text_depends_on_the_prompt_alone(place: Place, tmp_path: pathlib.Path):
  base = [row['response_ids'] for row in _run(place, tmp_path)]
  other = [PROMPTS[i] for i in (8, 5, 4, 2, 0)]
  source = _write(tmp_path / 'other.jsonl.gz', other)
  rows = _run(place, tmp_path, source, batch_size=8)
  found = [row['response_ids'] for row in rows]
  assert found == [base[i] for i in (8, 3, 4, 2, 0)]


def test_another_seed_gives_other_text(place: Place, tmp_path: pathlib.Path):
  text = lambda **f: [r['response_ids'] for r in _run(place, tmp_path, **f)]
  assert text(seed=1) == text(seed=1) != text(seed=2)


def test_samples_without_a_reward_model_are_rows(
    place: Place, tmp_path: pathlib.Path
):
  rows = _run(place, tmp_path, num_samples=2)
  assert [(row['id'], row['sample']) for row in rows] == [
      (i, sample) for i in range(len(PROMPTS)) for sample in (0, 1)
  ]
  first = [row['response_ids'] for row in rows if row['sample'] == 0]
  assert first == [r['response_ids'] for r in _run(place, tmp_path)]
  assert rows[0]['response_ids'] != rows[1]['response_ids']


def test_the_best_of_n_by_the_reward_model_is_written(
    place: Place, tmp_path: pathlib.Path
):
  samples = _run(place, tmp_path, num_samples=2)
  rows = _run(place, tmp_path, num_samples=2, reward_model=place.store.scalar)
  second = 0
  for row in rows:
    assert row['score'] == max(row['scores']) and len(row['scores']) == 2
    best = row['scores'].index(row['score'])
    of_prompt = [s for s in samples if s['id'] == row['id']]
    assert row['response_ids'] == of_prompt[best]['response_ids']
    assert 'sample' not in row
    second += best
  assert [row['id'] for row in rows] == list(range(len(PROMPTS)))
  assert 0 < second < len(PROMPTS)  # neither always the first nor the last
  single = _run(place, tmp_path, reward_model=place.store.scalar)
  assert [r['score'] for r in single] == pytest.approx(
      [row['scores'][0] for row in rows], abs=1e-4
  )


@pytest.mark.slow
def test_weights_may_be_split_over_devices(
    place: Place, tmp_path: pathlib.Path
):
  text = lambda **f: [r['response_ids'] for r in _run(place, tmp_path, **f)]
  assert text(tensor=2) == text()


def test_one_prompt_is_printed(
    place: Place, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
):
  rows = _run(place, tmp_path, num_samples=2)[:2]
  capsys.readouterr()
  request = Request(place.store.policy, prompt=PROMPTS[0], max_new_tokens=12)
  generate.run(request)
  told = capsys.readouterr()
  assert told.out == rows[0]['response'] + '\n'
  assert f'({rows[0]["num_tokens"]} tokens, ' in told.err
  generate.run(dataclasses.replace(request, num_samples=2))
  lines = capsys.readouterr().out
  for row in rows:
    title = f'--- sample {row["sample"]}: {row["num_tokens"]} tokens, '
    assert title in lines and row['response'] in lines
  scored = dataclasses.replace(request, reward_model=place.store.workdir)
  generate.run(scored)
  assert ' nats, score ' in capsys.readouterr().err


def test_a_conversation_streams_whole_characters(place: Place):
  lines, shown, notes = iter(['the cat', '/reset', 'the cat']), [], []
  terminal = chat.Terminal(
      lambda: next(lines, None), shown.append, notes.append
  )
  request = Request(place.scripted, temperature=0.0, max_new_tokens=16)
  generate.converse(request, terminal)
  assert ''.join(shown) == 'né,😀!\n' * 2
  assert len(shown) > 6  # in pieces
  assert notes[1] == '(compiling for prompts of up to 32 tokens)'
  assert notes[0].startswith('a conversation') and notes[2:] == ['forgotten']


def test_a_pipe_gets_the_answers_alone(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
  # Bytes that are no text do no harm, and /reset keeps prompts short.
  lines = 'Où?\n\n/what\n/reset\n'.encode() + b'\xff\n/quit\nnever read\n'
  stdin = io.TextIOWrapper(io.BytesIO(lines), 'utf-8')
  monkeypatch.setattr(sys, 'stdin', stdin)
  generate.run(Request(place.scripted, temperature=0.0, max_new_tokens=16))
  told = capsys.readouterr()
  assert told.out == 'né,😀!\n' * 2
  assert 'there is no /what; /reset forgets' in told.err
  assert stdin.read() == 'never read\n'


@pytest.mark.slow
def test_a_conversation_in_a_process_of_its_own(place: Place):
  one_device = ' --xla_force_host_platform_device_count=1'
  ran = subprocess.run(
      [
          sys.executable,
          '-m',
          'ma_rlhf_jax.generate',
          f'--model={place.scripted}',
          '--temperature=0',
          '--max_new_tokens=16',
      ],
      input='Où?\n\n/what\nthe cat\n/quit\nnever read\n'.encode(),
      capture_output=True,
      cwd=_ROOT,
      env={
          **os.environ,
          'PYTHONPATH': str(_ROOT),
          'XLA_FLAGS': os.environ['XLA_FLAGS'] + one_device,
      },
      timeout=300,
      check=False,
  )
  assert ran.returncode == 0, ran.stderr.decode()
  assert ran.stdout.decode() == 'né,😀!\n' * 2
  assert 'there is no /what; /reset forgets' in ran.stderr.decode()


def _parse(*arguments: str) -> Request:
  values = flags.FlagValues()
  absl_flags.define(verbs.GENERATE.flags, values)
  values(['generate', *arguments])
  return generate.request_of(values)


def test_flags_are_the_fields_of_a_request():
  assert _parse('--model=m') == Request('m')
  assert _parse('--model=m', '--prompt=', '--nooverwrite') == Request(
      'm', prompt=''
  )
  assert _parse(
      '--model=m',
      '--reward_model=r',
      '--input=a',
      '--output=b',
      '--overwrite',
      '--temperature=0.5',
      '--top_k=5',
      '--top_p=0.25',
      '--max_new_tokens=7',
      '--num_samples=3',
      '--max_prompt_len=9',
      '--batch_size=11',
      '--seed=13',
      '--dtype=bfloat16',
      '--matmul_precision=high',
      '--tensor=2',
  ) == Request(
      *('m', 'r', None, 'a', 'b', True, 0.5, 5, 0.25, 7, 3, 9, 11, 13),
      *('bfloat16', 'high', 2),
  )


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ([], 'error: --model is missing: give a folder, a hub id or a workdir'),
        (['--model=m', '--top_p=2'], 'error: --top_p=2.0 must be from 1e-06'),
        (
            ['--model=m', '--prompt=a', 'b'],
            "error: unexpected arguments: ['b']",
        ),
        (
            ['--model=/none', '--prompt=a'],
            "error: --model=/none: '/none' is no",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
):
  values = flags.FlagValues()
  absl_flags.define(verbs.GENERATE.flags, values)
  monkeypatch.setattr(flags, 'FLAGS', values)
  with pytest.raises(SystemExit) as ended:
    generate.main(absl_flags.parse(['generate', *arguments]))
  assert str(ended.value).startswith(words)
  assert '\n' not in str(ended.value)


@pytest.mark.parametrize(
    ('argument', 'words'),
    [
        (
            '--temperature=warm',
            'error: flag --temperature=warm: could not conv',
        ),
        ('--nothing=1', "error: Unknown command line flag 'nothing'"),
    ],
)
def test_flags_that_cannot_be_read_are_said_in_a_line(
    argument: str, words: str, monkeypatch: pytest.MonkeyPatch
):
  values = flags.FlagValues()
  absl_flags.define(verbs.GENERATE.flags, values)
  monkeypatch.setattr(flags, 'FLAGS', values)
  with pytest.raises(SystemExit) as ended:
    absl_flags.parse(['generate', argument])
  assert str(ended.value).startswith(words)


def test_rows_and_output_are_checked_before_a_model_is_looked_for(
    place: Place, tmp_path: pathlib.Path
):
  bad = tmp_path / 'bad.jsonl'
  bad.write_text('{"prompt": "fine"}\n{"prompt": 3}\n')
  target = tmp_path / 'out.jsonl'
  request = Request('/none', input=str(bad), output=str(target))
  with pytest.raises(ValueError, match=r"bad.jsonl: line 2 'prompt' is 3, no"):
    generate.run(request)
  target.write_text('before')
  with pytest.raises(FileExistsError, match='out.jsonl is there already'):
    generate.run(dataclasses.replace(request, input=place.input))
  assert target.read_text() == 'before' and len(list(tmp_path.iterdir())) == 2


def test_prompts_are_measured_before_a_weight_is_read(
    place: Place, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.delattr(session_lib, 'opened')  # nothing may be loaded
  with pytest.raises(ValueError, match='line 3 has 1. tokens'):
    _run(place, tmp_path, max_prompt_len=12)
  assert list(tmp_path.iterdir()) == []


def test_ctrl_c_stops_one_answer_before_its_next_piece():
  pieces = generate._until_ctrl_c(iter(['a', 'b', 'c']))
  assert next(pieces) == 'a'
  interrupts._answer(1)  # what the handler calls
  with pytest.raises(KeyboardInterrupt):
    next(pieces)
  assert ''.join(generate._until_ctrl_c(iter(['a', 'b']))) == 'ab'


def test_an_early_end_keeps_what_is_done(
    place: Place,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
  respond = session_lib.Session.respond

  def interrupted(session: Any, prompts: Any) -> Any:
    yield next(respond(session, prompts))
    raise KeyboardInterrupt

  monkeypatch.setattr(session_lib.Session, 'respond', interrupted)
  with pytest.raises(KeyboardInterrupt):
    _run(place, tmp_path, batch_size=8)
  assert [p.name for p in tmp_path.iterdir()] == ['out.jsonl.partial']
  lines = (tmp_path / 'out.jsonl.partial').read_text().splitlines()
  done = {json.loads(line)['id'] for line in lines}
  assert done == {0, 2, 3, 4, 5, 6, 7, 8}  # the longest; 1 is empty
  assert 'what is done of it (8 rows of' in capsys.readouterr().err


def test_fields_of_an_earlier_output_are_not_kept(
    place: Place, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
):
  source = tmp_path / 'again.jsonl'
  source.write_text('{"prompt": "the cat sat", "score": 9, "id": 0}\n')
  (row,) = _run(place, tmp_path, str(source))
  assert 'score' not in row
  assert 'note: score of the input are not kept' in capsys.readouterr().err
