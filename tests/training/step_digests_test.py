"""A step has its digests, and no flipped bit of it is restored in silence."""

import hashlib
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import manifest
from ma_rlhf_jax.training.checkpoint import Checkpoints, abstract_of

X = jax.random.normal(jax.random.key(0), (50, 40))
ABSTRACT = abstract_of({'x': X})


def _open(folder: pathlib.Path) -> Checkpoints:
  return Checkpoints(folder, keep=2, best_metric='m')


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Step 30 with X, step 40 with X + 1."""
  folder = tmp_path_factory.mktemp('saved')
  with _open(folder) as checkpoints:
    checkpoints.save(30, {'x': X}, {'row': 3}, metric=1.0)
    checkpoints.save(40, {'x': X + 1}, {'row': 4}, metric=0.5)
  return folder


@pytest.fixture
def folder(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of it, which may be damaged."""
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'a'))


def test_every_file_of_a_step_has_its_sha256(saved: pathlib.Path) -> None:
  step = saved / '40'
  want = {
      str(path.relative_to(step)): hashlib.sha256(path.read_bytes()).hexdigest()
      for path in step.rglob('*')
      if path.is_file()
      and path.name
      not in ('_CHECKPOINT_METADATA', 'commit_success.txt', manifest.NAME)
  }
  assert len(want) > 5
  found = {name: x['sha256'] for name, x in manifest.read(step).items()}
  assert found == want


def _flip(path: pathlib.Path, seed: int) -> None:
  content = bytearray(path.read_bytes())
  bit = int(np.random.default_rng(seed).integers(8 * len(content)))
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_flipped_bit_of_any_file_is_found_or_changes_nothing(
    saved: pathlib.Path,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
  files = [p.relative_to(saved) for p in (saved / '40').rglob('*')]
  files = [p for p in files if (saved / p).is_file()]
  steps = {}
  for seed, file in enumerate(files):
    folder = tmp_path / str(seed)
    shutil.copytree(saved, folder)
    _flip(folder / file, seed)
    caplog.clear()
    with _open(folder) as opened, caplog.at_level(logging.WARNING):
      step, state, meta = opened.restore_latest(ABSTRACT)
      assert opened.best_step() == 30
    np.testing.assert_array_equal(state['x'], X if step == 30 else X + 1)
    assert meta['row'] == step // 10
    assert ('damaged' in caplog.text) == (step == 30), file
    assert (folder / 'damaged-40').exists() == (step == 30)
    steps[file.name] = step
  whole = {name for name, step in steps.items() if step == 40}
  assert whole <= {'_CHECKPOINT_METADATA', 'commit_success.txt', manifest.NAME}
  assert len(steps) - len(whole) >= 8


def test_the_best_is_not_chosen_by_a_damaged_number(
    folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  meta = folder / '40' / 'meta' / 'metadata'
  meta.write_text(meta.read_text().replace('0.5', '4.5'))  # one bit of 0
  with caplog.at_level(logging.WARNING), _open(folder) as opened:
    assert opened.best_step() == 30
  assert f'{meta} is damaged' in caplog.text


def test_a_step_appears_with_its_digests_or_not_at_all(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def killed(*unused: object) -> None:
    raise RuntimeError('here')

  with _open(tmp_path) as checkpoints:
    checkpoints.save(1, {'x': X}, {}, metric=None)
    checkpoints.finish()
    monkeypatch.setattr(manifest, 'write', killed)
    checkpoints.save(2, {'x': X}, {}, metric=None)
    with pytest.raises(RuntimeError, match='here'):
      checkpoints.finish()
  monkeypatch.undo()
  with _open(tmp_path) as opened:
    assert opened.restore_latest(ABSTRACT).step == 1
    opened.save(2, {'x': X + 1}, {}, metric=None)
  assert manifest.verify(tmp_path / '2')


def test_a_step_without_digests_is_used_with_a_line(
    folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  for step in folder.iterdir():
    (step / manifest.NAME).unlink(missing_ok=True)
  with _open(folder) as opened, caplog.at_level(logging.WARNING):
    restored = opened.restore_latest(ABSTRACT)
  assert restored.step == 40
  np.testing.assert_array_equal(restored.state['x'], jnp.asarray(X + 1))
  assert f'{folder / "40"} holds no {manifest.NAME}' in caplog.text


def test_a_step_that_lost_its_digests_is_damaged(folder: pathlib.Path) -> None:
  (folder / '40' / manifest.NAME).unlink()
  with _open(folder) as opened:
    assert opened.restore_latest(ABSTRACT).step < 40
  assert (folder / 'damaged-40').exists()
