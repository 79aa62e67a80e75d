"""What is written is read again, whatever a kill leaves on disk."""

import json
import math
import pathlib
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from ma_rlhf_jax.training import metrics
from ma_rlhf_jax.training.metrics import MetricsWriter, read_metrics


def _writer(folder: pathlib.Path, seconds: float = 1e6) -> MetricsWriter:
  return MetricsWriter(folder, 'ppo', sinks=('jsonl',), flush_seconds=seconds)


def _names(folder: pathlib.Path) -> list[str]:
  return sorted(p.name for p in (folder / 'metrics').iterdir())


def test_values_come_back_bit_for_bit(tmp_path):
  odd = np.float32(0.1)
  with _writer(tmp_path) as writer:
    writer.write(np.int64(3), {'objective/kl': odd, 'loss/policy': 1e-300})
  assert read_metrics(tmp_path) == [
      {
          'step': 3,
          'stage': 'ppo',
          'objective/kl': float(odd),
          'loss/policy': 1e-300,
      }
  ]


def test_non_finite_values_are_valid_json_and_read_as_floats(tmp_path):
  with _writer(tmp_path) as writer:
    writer.write(1, {'a': math.nan, 'b': math.inf, 'c': -math.inf})

  def refuse(name: str) -> None:
    raise AssertionError(f'{name} is no JSON')

  text = (tmp_path / 'metrics' / '0001-0001.jsonl').read_text()
  json.loads(text, parse_constant=refuse)
  (row,) = read_metrics(tmp_path)
  assert math.isnan(row['a'])
  assert (row['b'], row['c']) == (math.inf, -math.inf)


def test_lines_of_one_step_in_one_start_are_one_row(tmp_path):
  with _writer(tmp_path) as writer:
    writer.write(2, {'loss': 0.5, 'kl': 3.0})
    writer.seal()
    writer.write(2, {'eval/score': 1.5, 'loss': 0.25})
    writer.write(1, {'loss': 0.75})
  assert read_metrics(tmp_path) == [
      {'step': 1, 'stage': 'ppo', 'loss': 0.75},
      {'step': 2, 'stage': 'ppo', 'loss': 0.25, 'kl': 3.0, 'eval/score': 1.5},
  ]


def test_each_checkpoint_and_each_start_begins_a_file(tmp_path):
  for steps in (range(1, 5), range(3, 6)):
    writer = _writer(tmp_path)
    for step in steps:
      writer.write(step, {'loss': step})
      if step % 2 == 0:
        writer.seal()
        writer.seal()  # nothing new: no new part
    writer.close()
  assert _names(tmp_path) == [
      '0001-0001.jsonl',
      '0001-0002.jsonl',
      '0002-0001.jsonl',
      '0002-0002.jsonl',
  ]


def test_the_latest_start_wins_and_leaves_later_rows_alone(tmp_path):
  first = _writer(tmp_path)
  for step in (1, 2, 3, 4, 5):
    first.write(step, {'loss': step, 'only/first': 0})
  first.close()
  second = _writer(tmp_path)  # resumed from a checkpoint of step 2
  second.write(3, {'loss': 30})
  second.write(4, {'loss': 40})
  second.close()  # and killed before step 5
  rows = {row['step']: row for row in read_metrics(tmp_path)}
  assert sorted(rows) == [1, 2, 3, 4, 5]
  assert [rows[s]['loss'] for s in (1, 2, 3, 4, 5)] == [1, 2, 30, 40, 5]
  assert 'only/first' not in rows[3]
  assert 'only/first' in rows[5]


def test_starts_and_parts_are_ordered_as_numbers(tmp_path):
  folder = tmp_path / 'metrics'
  folder.mkdir()
  for start in (9999, 10000):  # '10000-...' sorts before '9999-...' as text
    line = json.dumps({'step': 1, 'stage': 'sft', 'loss': start})
    (folder / f'{start}-0001.jsonl').write_text(line + '\n')
  assert read_metrics(tmp_path)[0]['loss'] == 10000
  with _writer(tmp_path) as writer:
    writer.write(2, {'loss': 0})
  assert '10001-0001.jsonl' in _names(tmp_path)


def test_seal_writes_and_write_flushes_when_lines_grow_old(tmp_path):
  lazy = _writer(tmp_path / 'lazy')
  lazy.write(1, {'loss': 1})
  assert read_metrics(tmp_path / 'lazy') == []
  lazy.seal()
  assert len(read_metrics(tmp_path / 'lazy')) == 1
  lazy.write(2, {'loss': 1})
  assert len(read_metrics(tmp_path / 'lazy')) == 1
  eager = _writer(tmp_path / 'eager', seconds=0.0)
  for step in (1, 2, 3):
    eager.write(step, {'loss': 1})
    assert len(read_metrics(tmp_path / 'eager')) == step
  assert _names(tmp_path / 'eager') == ['0001-0001.jsonl']


def test_a_kill_at_any_byte_of_a_rewrite_loses_only_cut_lines(tmp_path):
  writer = _writer(tmp_path)
  writer.write(1, {'loss': 1})
  writer.seal()
  for step in (2, 3):
    writer.write(step, {'loss': step, 'eval/score': math.nan})
  writer.close()
  path = tmp_path / 'metrics' / '0001-0002.jsonl'
  whole = path.read_bytes()
  first = whole.index(b'\n') + 1
  for cut in range(len(whole) + 1):
    path.write_bytes(whole[:cut])
    # a line counts from its closing brace on
    want = 1 + (cut >= first - 1) + (cut >= len(whole) - 1)
    assert [r['step'] for r in read_metrics(tmp_path)] == [1, 2, 3][:want]


@pytest.mark.parametrize('line', ['{"step": 1', '[1]', '{"a": 1}', '\0'])
def test_a_broken_line_that_no_kill_explains_is_named(tmp_path, line):
  writer = _writer(tmp_path)
  writer.write(1, {'loss': 1})
  writer.close()
  path = tmp_path / 'metrics' / '0001-0001.jsonl'
  good = path.read_text()
  for text, n in ((f'{good}{line}\n', 2), (f'{line}\n{good[:-5]}', 1)):
    path.write_text(text)
    with pytest.raises(ValueError, match=f'0001-0001.jsonl line {n} is no'):
      read_metrics(tmp_path)


def test_nothing_written_is_no_row(tmp_path):
  assert read_metrics(tmp_path / 'absent') == []


def test_sinks_are_checked_and_imported_only_when_asked_for(
    tmp_path, monkeypatch
):
  for name, package in (('tensorboard', 'tensorboardX'), ('wandb', 'wandb')):
    monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    with pytest.raises(ImportError, match=f'pip install {package}'):
      metrics.check_sinks((name,))
  with MetricsWriter(tmp_path, 'sft', sinks=()) as writer:
    writer.write(1, {'loss': 1.0})
    writer.seal()
  assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_names_values_and_steps(tmp_path):
  for first in (1, 5):
    with MetricsWriter(
        tmp_path, 'ppo', sinks=('tensorboard',), first_step=first
    ) as writer:
      writer.write(first + 2, {'objective/kl': 0.5, 'policy/clipfrac': 0.25})
  found, purged = [], []
  for path in sorted((tmp_path / 'tensorboard').iterdir()):
    for event in _events(path.read_bytes()):
      for value in event.summary.value:
        found.append((value.tag, event.step, value.simple_value))
      if event.session_log.status:
        purged.append(event.step)
  assert sorted(found) == [
      ('objective/kl', 3, 0.5),
      ('objective/kl', 7, 0.5),
      ('policy/clipfrac', 3, 0.25),
      ('policy/clipfrac', 7, 0.25),
  ]
  assert sorted(purged) == [0, 5]  # steps hidden from there on


def _events(data: bytes) -> list[event_pb2.Event]:
  """Records of 8 bytes length, 4 checksum, the event, 4 checksum."""
  events = []
  while data:
    size = int.from_bytes(data[:8], 'little')
    events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  return events


def test_wandb_continues_the_run_of_the_folder(tmp_path, monkeypatch):
  calls = []

  class Run:

    def define_metric(self, name: str, step_metric: str) -> None:
      calls.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
      calls.append(row)

    def finish(self) -> None:
      calls.append('finish')

  def init(**arguments: str) -> Run:
    calls.append(arguments)
    return Run()

  monkeypatch.delenv('WANDB_DIR', raising=False)
  wandb = types.SimpleNamespace(init=init, __spec__='installed')
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  for folder in ('run/ppo', 'run/ppo', 'other/ppo'):
    with MetricsWriter(
        tmp_path / folder, 'ppo', sinks=('wandb',), config={'seed': 7}
    ) as writer:
      writer.write(3, {'objective/kl': 0.5})
  first, second, third = calls[0], calls[4], calls[8]
  assert first['id'] == second['id'] != third['id']
  assert (first['name'], first['resume']) == ('run/ppo', 'allow')
  assert first['config'] == {'seed': 7} and first['allow_val_change']
  assert first['dir'] == str(tmp_path / 'run' / 'ppo')
  assert calls[1:4] == [
      ('*', 'step'),
      {'step': 3, 'objective/kl': 0.5},
      'finish',
  ]


def test_check_finite_names_stage_step_metrics_and_checkpoint():
  fine = {'loss': 1.0, 'objective/kl': np.float32(0)}
  place = {'stage': 'ppo', 'last_checkpoint': 'step 30 in /runs/x/30'}
  metrics.check_finite(37, fine, **place)
  bad = fine | {'loss/value': math.nan, 'grad_norm': np.float32(np.inf)}
  with pytest.raises(metrics.NonFiniteError) as caught:
    metrics.check_finite(37, bad, **place)
  error = caught.value
  assert isinstance(error, FloatingPointError)
  assert (error.stage, error.step) == ('ppo', 37)
  assert error.names == ['grad_norm', 'loss/value']
  for part in ('ppo step 37', 'grad_norm = inf', 'loss/value = nan', 'step 30'):
    assert part in str(error)
  assert 'loss = ' not in str(error)
