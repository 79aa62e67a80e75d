"""Checkpoints come back bit for bit, and damaged ones are noticed."""

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

from absl import logging as absl_logging
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from ma_rlhf_jax.structs import TrainState
from ma_rlhf_jax.training import checkpoint
from ma_rlhf_jax.training.checkpoint import Checkpoints, abstract_of

ROOT = pathlib.Path(__file__).parents[2]


def _state(seed: int = 0) -> dict[str, TrainState]:
  w = jax.random.normal(jax.random.key(seed), (6, 4))
  w = w.at[0, :3].set(jnp.array([jnp.nan, -0.0, 1e-40]))  # odd bits on purpose
  params = {'w': w, 'b': (w[1] / 3).astype(jnp.bfloat16)}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  opt_state = tx.init(params)
  return {
      'policy': TrainState(jnp.int32(7), params, opt_state),
      'critic': TrainState(jnp.int32(8), {'h': w[:, :1]}, opt_state),
  }


def _open(
    folder: pathlib.Path, keep: int = 1, best: str = 'eval/score'
) -> Checkpoints:
  return Checkpoints(folder, keep=keep, best_metric=best)


def _bits(tree: Any) -> list[bytes]:
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_restored_bits_dtypes_and_types_are_those_saved(tmp_path):
  state = _state()
  key = jax.random.key_data(jax.random.fold_in(jax.random.key(3), 41))
  meta = {'data': {'epoch': 2, 'row': 5}, 'key': [int(k) for k in key]}
  with _open(tmp_path) as saved:
    saved.save(12, state, meta, metric=0.1)
  with _open(tmp_path) as opened:
    step, restored, got = opened.restore_latest(abstract_of(state))
  assert step == 12
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert [x.dtype for x in jax.tree.leaves(restored)] == [
      x.dtype for x in jax.tree.leaves(state)
  ]
  assert _bits(restored) == _bits(state)
  assert got == meta | {
      'step': 12,
      'metric_name': 'eval/score',
      'metric': 0.1,
  }
  again = jnp.array(got['key'], jnp.uint32)
  assert _bits(again) == _bits(key)


def test_sharded_arrays_come_back_onto_the_asked_sharding(tmp_path):
  mesh = jax.make_mesh((len(jax.devices()),), ('data',))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  n = 3 * len(jax.devices())
  state = {'policy': {'w': jax.device_put(jnp.arange(2.0 * n) / 3, rows)}}
  with jax.set_mesh(mesh), _open(tmp_path) as checkpoints:
    checkpoints.save(1, state, {}, metric=None)
    same = checkpoints.restore_latest(abstract_of(state)).state
    copies = jax.ShapeDtypeStruct(
        (2 * n,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    other = checkpoints.restore_latest({'policy': {'w': copies}}).state
  assert _bits(same) == _bits(other) == _bits(state)
  assert same['policy']['w'].sharding.is_equivalent_to(rows, 1)
  assert other['policy']['w'].sharding.is_equivalent_to(copies.sharding, 1)


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = add(jnp.zeros((512, 512)))
  abstract = abstract_of({'x': x})
  with _open(tmp_path) as checkpoints:
    for step in range(1, 4):
      checkpoints.save(step, {'x': x}, {}, metric=None)
      x = add(add(x))
      restored = checkpoints.restore_latest(abstract)
      want = np.full((512, 512), 2 * step - 1, np.float32)
      np.testing.assert_array_equal(restored.state['x'], want)


@pytest.mark.parametrize('best', ['eval/score', '-eval/loss'])
def test_the_newest_and_the_best_stay(tmp_path, best):
  sign = -1 if best[0] == '-' else 1
  state = {'x': jnp.float32(0)}
  metrics = [None, 3.0, 5.0, float('nan'), 4.0, None, float('inf')]
  left = []
  with _open(tmp_path, best=best) as checkpoints:
    for step, metric in enumerate(metrics, start=1):
      metric = metric if metric is None else sign * metric
      checkpoints.save(step, {'x': jnp.float32(step)}, {}, metric=metric)
      checkpoints.finish()
      left.append(checkpoints.steps())
  assert left == [[1], [2], [3], [3, 4], [3, 5], [3, 6], [3, 7]]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['3', '7']
  with _open(tmp_path, keep=2, best=best) as opened:  # also after a restart
    assert opened.best_step() == 3
    assert opened.restore_best(abstract_of(state)).state['x'] == 3.0
    assert opened.restore_latest(abstract_of(state)).meta['metric'] is None
    opened.save(8, state, {}, metric=sign * 1.0)
    assert opened.steps() == [3, 7, 8]
    opened.save(9, state, {}, metric=sign * 5.0)  # the newest of equals
    assert opened.best_step() == 9
    assert opened.steps() == [8, 9]


def test_values_of_another_metric_are_not_compared(tmp_path):
  state = {'x': jnp.float32(0)}
  with _open(tmp_path, best='-eval/loss') as checkpoints:
    checkpoints.save(1, state, {}, metric=9.0)
  with _open(tmp_path, best='eval/score') as opened:
    assert opened.best_step() is None
    assert opened.restore_best(abstract_of(state)) is None
    opened.save(2, state, {}, metric=-2.0)
    assert opened.best_step() == 2


def test_an_empty_folder_restores_nothing_and_bad_calls_are_refused(tmp_path):
  state = {'x': jnp.float32(0)}
  with _open(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(abstract_of(state)) is None
    assert checkpoints.restore_best(abstract_of(state)) is None
    assert checkpoints.describe_latest() == 'none yet'
    checkpoints.save(5, state, {}, metric=None)
    assert str(tmp_path / '5') in checkpoints.describe_latest()
    for step in (5, 4):
      with pytest.raises(ValueError, match=f'cannot save step {step}'):
        checkpoints.save(step, state, {}, metric=None)


def _largest(folder: pathlib.Path) -> pathlib.Path:
  files = [p for p in folder.rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def _cut(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    'empty folder': lambda f: [p.unlink() for p in f.rglob('*') if p.is_file()],
    'cut data': lambda f: _cut(_largest(f)),
    'data gone': lambda f: _largest(f).unlink(),
    'cut meta': lambda f: _cut(f / 'meta' / 'metadata'),
    'meta gone': lambda f: (f / 'meta' / 'metadata').unlink(),
    'cut manifest': lambda f: _cut(f / 'state' / 'manifest.ocdbt'),
    'cut tree': lambda f: _cut(f / 'state' / '_METADATA'),
    'no text': lambda f: (f / 'state' / '_METADATA').write_bytes(b'\xff\xfe'),
    'tree of another form': lambda f: (f / 'state' / '_METADATA').write_text(
        json.dumps({'tree_metadata': {'x': {}}})
    ),
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_damaged_newest_step_is_named_and_the_one_before_is_used(
    tmp_path, caplog, damage
):
  x = jax.random.normal(jax.random.key(0), (50, 40))
  abstract = abstract_of({'x': x})
  with _open(tmp_path, keep=2) as checkpoints:
    checkpoints.save(30, {'x': x}, {}, metric=None)
    checkpoints.save(40, {'x': x + 1}, {}, metric=1.0)
  DAMAGES[damage](tmp_path / '40')
  with _open(tmp_path, keep=2) as opened, caplog.at_level(logging.WARNING):
    restored = opened.restore_latest(abstract)
    assert restored.step == 30
    assert _bits(restored.state) == _bits(x)
    assert f'{tmp_path / "40"} cannot be restored' in caplog.text
    assert (tmp_path / 'damaged-40').is_dir()
    assert opened.best_step() is None
    opened.save(40, {'x': x + 2}, {}, metric=None)  # its step is free again
    again = opened.restore_latest(abstract)
    assert opened.best_step() is None
  assert (again.step, _bits(again.state)) == (40, _bits(x + 2))


def test_steps_that_all_fail_are_an_error_and_stay_where_they_are(tmp_path):
  with _open(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, {'x': jnp.zeros(3)}, {}, metric=1.0)
    checkpoints.save(2, {'x': jnp.zeros(3)}, {}, metric=None)
  wanted = {
      'shape': {'x': jnp.zeros(4)},
      'saved as float32 and is wanted as bfloat16': {
          'x': jnp.zeros(3, jnp.bfloat16)
      },
      'structure': {'x': jnp.zeros(3), 'y': jnp.zeros(3)},
  }
  with _open(tmp_path, keep=2) as opened:
    for message, state in wanted.items():
      with pytest.raises(checkpoint.CheckpointError, match=message) as error:
        opened.restore_latest(abstract_of(state))
      assert 'step 2: ValueError' in str(error.value)
      assert 'step 1: ValueError' in str(error.value)
    with pytest.raises(checkpoint.CheckpointError, match='step 1: ValueError'):
      opened.restore_best(abstract_of(wanted['shape']))
    assert opened.steps() == [1, 2]


def test_errors_that_are_no_damage_are_raised(tmp_path, monkeypatch):
  state = {'x': jnp.zeros(3)}
  with _open(tmp_path) as checkpoints:
    checkpoints.save(1, state, {}, metric=None)
    checkpoints.finish()

    def denied(*unused, **also_unused):
      raise PermissionError('denied')

    monkeypatch.setattr(checkpoints._manager, 'restore', denied)
    with pytest.raises(PermissionError):
      checkpoints.restore_latest(abstract_of(state))
    assert checkpoints.steps() == [1]


SAVER = """
    import sys
    import jax.numpy as jnp
    from ma_rlhf_jax.training.checkpoint import abstract_of, Checkpoints

    checkpoints = Checkpoints(sys.argv[1], keep=1, best_metric='m')
    state = {'x': jnp.zeros((1024, 1024)), 'y': jnp.zeros(3)}
    found = checkpoints.restore_latest(abstract_of(state))
    step = found.step if found else 0
    while True:
      step += 1
      state = {k: jnp.full_like(v, step) for k, v in state.items()}
      checkpoints.save(step, state, {'row': 10 * step}, metric=None)
      checkpoints.finish() if step == 1 else None
"""


def _kill_while_saving(folder: pathlib.Path, after: int) -> None:
  """Runs SAVER and kills it once it writes a step beyond `after` + 1."""
  run = subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(SAVER), str(folder)],
      cwd=ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      stderr=subprocess.DEVNULL,
  )
  try:
    for _ in range(120_000):  # of 1 ms; only a child that hangs uses them up
      names = [p.name for p in folder.glob('*tmp*')]
      if run.poll() is not None or any(
          int(n.split('.')[0]) > after + 1 for n in names
      ):
        break
      time.sleep(0.001)
  finally:
    run.send_signal(signal.SIGKILL)
  assert run.wait() == -signal.SIGKILL


def test_kill_during_a_save_leaves_an_earlier_step(tmp_path):
  state = {'x': jnp.zeros((1024, 1024)), 'y': jnp.zeros(3)}
  step = 0
  for _ in range(3):
    _kill_while_saving(tmp_path, step)
    with _open(tmp_path) as opened:
      restored = opened.restore_latest(abstract_of(state))
    assert restored.step > step
    step = restored.step
    assert restored.meta['step'] == step
    assert restored.meta['row'] == 10 * step
    for leaf in jax.tree.leaves(restored.state):
      np.testing.assert_array_equal(leaf, np.full(leaf.shape, step))
    assert not list(tmp_path.glob('damaged*'))
  with _open(tmp_path) as opened:
    opened.save(step + 2, state, {}, metric=None)
  assert [p.name for p in tmp_path.iterdir()] == [str(step + 2)]


def test_quiet_logging_hides_only_the_chatter_of_orbax(tmp_path, caplog):
  absl_logger = logging.getLogger('absl')
  before, level = list(absl_logger.filters), absl_logger.level
  absl_logger.addHandler(caplog.handler)
  try:
    absl_logger.filters.clear()  # another test may have called it
    absl_logger.setLevel(logging.INFO)
    checkpoint.quiet_logging()
    checkpoint.quiet_logging()
    assert len(absl_logger.filters) == 1
    with _open(tmp_path) as checkpoints:
      checkpoints.save(1, {'x': jnp.zeros(3)}, {}, metric=None)
    assert not [r for r in caplog.records if 'orbax' in r.pathname]
    place = ('absl', logging.WARNING, '/lib/orbax/x.py', 1)
    absl_logger.handle(logging.LogRecord(*place, 'theirs', (), None))
    assert 'theirs' in caplog.text
    absl_logging.info('ours')
    assert 'ours' in caplog.text
  finally:
    absl_logger.removeHandler(caplog.handler)
    absl_logger.setLevel(level)
    absl_logger.filters[:] = before
