"""Files of comparisons: the run's own, and those of other settings."""

import json
import pathlib

from etils import epath
import pytest

from ma_rlhf_jax import manifest
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.evaluation import comparison
from tests import tiny

_ROWS = {'kl': {'sft': [0.0, -1.0, 1.0]}}


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> epath.Path:
  """Of a run that compares on 7 prompts, at temperature 1."""
  return workdir_lib.open_workdir(
      tmp_path / 'run', tiny.config(evaluate__prompts=7)
  )


def _made(prompts: int, temperature: float = 1.0) -> comparison.Comparison:
  config = tiny.config(
      evaluate__prompts=prompts, evaluate__temperature=temperature
  )
  used = comparison.settings(config)
  return comparison.Comparison(_ROWS, min(prompts, 8), used)


def _files(workdir: epath.Path) -> list[str]:
  return sorted(p.name for p in (workdir / 'evaluate').iterdir())


def test_settings_are_the_fields_of_the_evaluation() -> None:
  config = tiny.config(evaluate__prompts=7, evaluate__temperature=0.5)
  found = comparison.settings(config)
  assert found['evaluate.prompts'] == 7
  assert found['evaluate.temperature'] == 0.5
  assert all(name.startswith('evaluate.') for name in found)


def test_the_own_result_is_marked_done(workdir: epath.Path) -> None:
  path = comparison.write(workdir, _made(7))
  assert path == workdir / 'evaluate' / 'comparison.json'
  record = manifest.read_sealed(path)
  assert record['rows'] == _ROWS and record['prompts'] == 7
  assert record['settings']['evaluate.prompts'] == 7
  done = workdir_lib.read_done(workdir, 'evaluate')
  assert done == {'comparison': record}
  assert comparison.read(workdir) == [_made(7)]


def test_other_settings_stand_beside_the_own_result(
    workdir: epath.Path,
) -> None:
  own = comparison.write(workdir, _made(7), ['kl_above_max']).read_bytes()
  done = (workdir / 'evaluate' / 'done.json').read_bytes()
  few = comparison.write(workdir, _made(3))
  greedy = comparison.write(workdir, _made(7, temperature=0.0))
  both = comparison.write(workdir, _made(3, temperature=0.0))
  assert few.name == 'comparison-prompts=3.json'
  assert greedy.name == 'comparison-temperature=0.0.json'
  assert both.name == 'comparison-prompts=3,temperature=0.0.json'
  assert (workdir / 'evaluate' / 'comparison.json').read_bytes() == own
  assert (workdir / 'evaluate' / 'done.json').read_bytes() == done
  assert len(_files(workdir)) == 6
  # The same settings again replace their own file alone.
  comparison.write(workdir, _made(3))
  assert len(_files(workdir)) == 6
  assert comparison.read(workdir) == [_made(7)]
  verdict = (workdir / 'evaluate' / 'verdict.json').read_text()
  assert json.loads(verdict) == ['kl_above_max']  # that of the run itself


def test_a_number_that_was_changed_reaches_no_card(
    workdir: epath.Path,
) -> None:
  path = comparison.write(workdir, _made(7))
  path.write_text(path.read_text().replace('7', '9', 1))
  with pytest.raises(manifest.DamagedError, match='comparison.json'):
    comparison.read(workdir)


def test_without_an_own_result_the_others_are_read(workdir: epath.Path) -> None:
  assert comparison.read(workdir) == []
  comparison.write(workdir, _made(3))
  assert _files(workdir) == ['comparison-prompts=3.json']
  assert workdir_lib.read_done(workdir, 'evaluate') is None
  assert comparison.read(workdir) == [_made(3)]


def test_files_of_an_earlier_version_tell_no_number(
    workdir: epath.Path,
) -> None:
  (workdir / 'evaluate').mkdir()
  (workdir / 'evaluate' / 'comparison.json').write_text(json.dumps(_ROWS))
  assert comparison.read(workdir) == [comparison.Comparison(_ROWS, None, {})]
