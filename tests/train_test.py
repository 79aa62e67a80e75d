"""The command line: flags, what is checked at the start, and its messages."""

from collections.abc import Iterator
import dataclasses
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

from absl import flags
import jax
from ml_collections import ConfigDict
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import manifest, recipe_flag, train, workdir_lock
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.data import batch_sizes
from ma_rlhf_jax.models.presets import Lora
from ma_rlhf_jax.validation import ConfigError
from tests import tiny
from tests.models.drawn import draw

_ROOT = pathlib.Path(__file__).parents[1]
_TINY = f'--config={_ROOT / "configs" / "tiny.py"}'


@pytest.fixture(autouse=True)
def clean_flags() -> Iterator[None]:
  """Flags of fields belong to one command line."""
  yield
  for name in [name for name in flags.FLAGS if name.startswith('config.')]:
    delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()


def _parsed(*arguments: str) -> ConfigDict:
  recipe_flag.parse(['train', *arguments])
  return recipe_flag.CONFIG.value


def _message(*arguments: str) -> str:
  """What a start that cannot go on ends with."""
  with pytest.raises(SystemExit) as caught:
    train.main(recipe_flag.parse(['train', *arguments]))
  assert isinstance(caught.value.code, str)
  assert 'Traceback' not in caught.value.code
  return caught.value.code


def test_all_problems_are_told_before_a_workdir_is_made(
    tmp_path: pathlib.Path,
) -> None:
  message = _message(
      _TINY,
      f'--workdir={tmp_path / "run"}',
      '--config.ppo.kl_coef=-1.0',
      '--config.ppo.batch_size=0',
  )
  assert 'ppo.kl_coef=-1.0 must be between 0 and 1e6' in message
  assert 'ppo.batch_size=0 must be between 1 and 1048576' in message
  message = _message(
      _TINY, f'--workdir={tmp_path / "run"}', '--config.mesh.data=3'
  )
  assert 'does not cover the 8 devices' in message
  assert not (tmp_path / 'run').exists()


def test_batches_must_split_over_the_devices_there_are(
    tmp_path: pathlib.Path,
) -> None:
  message = _message(
      _TINY, f'--workdir={tmp_path / "run"}', '--config.sft.batch_size=12'
  )
  assert 'sft.micro_batch_size=12 (0 = all of them)' in message
  assert '8 devices' in message


def test_a_workdir_of_another_config_is_refused_with_the_fields(
    tmp_path: pathlib.Path,
) -> None:
  config = _parsed(_TINY)
  workdir_lib.open_workdir(tmp_path / 'run', config)
  flags.FLAGS.unparse_flags()
  message = _message(_TINY, f'--workdir={tmp_path / "run"}', '--config.seed=41')
  assert f'{tmp_path / "run"} was started with another config' in message
  assert f'seed: stored {config.seed}, now 41' in message


def test_a_folder_of_something_else_is_no_workdir(
    tmp_path: pathlib.Path,
) -> None:
  (tmp_path / 'thesis.tex').write_text('x')
  message = _message(_TINY, f'--workdir={tmp_path}')
  assert 'is no workdir (found thesis.tex)' in message


def test_data_and_models_that_are_not_there_are_named(
    tmp_path: pathlib.Path,
) -> None:
  missing = tmp_path / 'rows.jsonl'
  message = _message(
      _TINY,
      f'--workdir={tmp_path / "a"}',
      '--config.data.task=hh',
      f'--config.data.path={missing}',
  )
  assert f"data.path='{missing}': there is no such file" in message
  for field, reason in (
      ('ppo.from', 'must be the workdir of a run'),
      ('tokenizer.path', 'is not a folder'),
  ):
    message = _message(
        _TINY, f'--workdir={tmp_path / "b"}', f'--config.{field}={missing}'
    )
    assert f'{field}={missing}' in message and reason in message


def test_rows_that_cannot_be_read_and_what_stages_need_are_one_message(
    tmp_path: pathlib.Path,
) -> None:
  recipe = _ROOT / 'configs' / 'apps_2b.py'
  devices = ['--config.mesh.fsdp=1', '--config.mesh.data=-1']
  message = _message(
      f'--config={recipe}', f'--workdir={tmp_path / "run"}', *devices
  )
  cannot_read, *missing = message.splitlines()[1:]
  assert "data.task='apps'" in cannot_read
  assert len(missing) == 2
  assert all("needs the product of 'reward_model'" in m for m in missing)
  assert not (tmp_path / 'run').exists()


def test_a_missing_login_is_told_before_anything_is_made(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  online = types.SimpleNamespace(settings=types.SimpleNamespace(mode='online'))
  fake = types.SimpleNamespace(
      __spec__='installed',
      setup=lambda: online,
      login=lambda: False,
      errors=types.SimpleNamespace(Error=RuntimeError),
  )
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  message = _message(
      _TINY, f'--workdir={tmp_path / "run"}', "--config.log.sinks=('wandb',)"
  )
  assert 'WANDB_API_KEY' in message and 'log.sinks' in message
  assert '\n' not in message and not (tmp_path / 'run').exists()


def _with_smaller_batches(rows: int) -> list[str]:
  """The notes of a run on 2 x 2 devices that share a batch."""
  config = tiny.config(sft__batch_size=8)
  num_rows = {'sft': rows, 'reward_model': 64, 'ppo': 64}
  run = types.SimpleNamespace(
      config=batch_sizes.fitted(config, num_rows),
      data=types.SimpleNamespace(num_rows=num_rows),
      mesh=types.SimpleNamespace(shape={'data': 2, 'fsdp': 2, 'tensor': 1}),
  )
  return train._smaller(config, run, ['sft', 'reward_model', 'ppo'])


def test_smaller_batches_are_told_and_must_split_over_the_devices() -> None:
  assert _with_smaller_batches(8) == []
  (note,) = _with_smaller_batches(7)
  assert note == 'sft.batch_size=4 in place of 8: the sft part has 7 rows'
  with pytest.raises(ConfigError, match='the sft part has 3 rows') as caught:
    _with_smaller_batches(3)
  assert 'the 4 devices' in str(caught.value)


def test_the_command_itself_ends_in_one_line(tmp_path: pathlib.Path) -> None:
  done = subprocess.run(
      [sys.executable, '-m', 'ma_rlhf_jax.train', f'{_TINY}:ngram=x'],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=120,
  )
  assert done.returncode == 1 and done.stdout == ''
  assert done.stderr.splitlines() == [
      "error: recipe argument 'ngram=x': 'x' is not of type int; write for "
      'example ngram=5'
  ]


def test_stages_run_in_order_unless_done_or_given(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
  ran = []
  for name in train.STAGES:
    monkeypatch.setitem(
        train.STAGES, name, lambda run, name=name: ran.append(name)
    )
  train.train(tiny.run(tmp_path, tiny.config()))
  assert ran == ['sft', 'reward_model', 'ppo', 'evaluate']
  ran.clear()
  for name in ('reward_model', 'evaluate'):
    workdir_lib.mark_done(tmp_path, name, {'step': 1})
  capsys.readouterr()
  train.train(tiny.run(tmp_path, tiny.config(ppo__policy_init='folder')))
  # A comparison is made anew: its prompts may have changed.
  assert ran == ['ppo', 'evaluate']
  printed = capsys.readouterr().out
  assert 'sft: skipped, ppo.policy_init gives folder\n' in printed
  done = tmp_path / 'reward_model'
  assert f'reward_model: done before, in {done}\n' in printed


def test_a_product_is_written_over_what_a_killed_start_left(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  saved = []
  monkeypatch.setattr(
      train.exporting,
      'save',
      lambda folder, *_, overwrite=False: saved.append((folder, overwrite)),
  )
  run = tiny.run(tmp_path, tiny.config())
  exports = {'sft': ('policy', tiny.SHAPE, tiny.params('policy', 0))}
  (tmp_path / 'sft' / 'hf').mkdir(parents=True)
  digest = manifest.write(tmp_path / 'sft' / 'hf')
  train._finish(run, 'sft', 5, exports, note='x')
  assert saved == [(f'{tmp_path}/sft/hf', True)]
  assert workdir_lib.read_done(tmp_path, 'sft') == {
      'step': 5,
      'products': {'sft/hf': digest},
      'batch_size': 64,
      'note': 'x',
  }


def test_adapters_are_written_before_the_marker(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  saved = []

  def save(folder: str, *unused: Any, **more: Any) -> None:
    assert not (tmp_path / 'ppo' / 'done.json').exists()
    assert more.pop('overwrite')
    saved.append((folder.removeprefix(f'{tmp_path}/'), more))

  monkeypatch.setattr(train.exporting, 'save', save)
  monkeypatch.setattr(train.peft_folder, 'save', save)
  config = tiny.config(ppo__policy_init='google/gemma-2b', lora__rank=2)
  adapted = dataclasses.replace(tiny.SHAPE, lora=Lora(2, 4.0, ('up',)))
  exports = {
      'ppo': ('policy', adapted, draw('policy', adapted, 0)),
      'critic': ('scalar', adapted, draw('scalar', adapted, 0)),
  }
  train._finish(tiny.run(tmp_path, config), 'ppo', 5, exports)
  assert [folder for folder, _ in saved] == [
      'ppo/hf',
      'ppo/adapter',
      'ppo/critic',
      'ppo/critic_adapter',
  ]
  (_, _), (_, policy), (_, _), (_, critic) = saved
  assert policy['base'] == 'google/gemma-2b'
  assert critic['base'] == f'{tmp_path}/reward_model/hf'
  assert '5 updates of 4 rows' in policy['card']
  assert 'base_path = "google/gemma-2b"' in policy['card']


def test_a_start_that_cannot_run_leaves_the_folder_free(
    tmp_path: pathlib.Path,
) -> None:
  config = config_lib.base()
  config.data.task, config.data.path = 'hh', str(tmp_path / 'no.jsonl')
  with pytest.raises(FileNotFoundError, match='no.jsonl'):
    train.set_up(config, 'tiny.py', str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_the_end_names_the_workdir_and_a_command(
    tmp_path: pathlib.Path,
) -> None:
  run = tiny.run(tmp_path / "it's", tiny.config())
  assert train._try_it(run) == f"workdir: {tmp_path}/it's"
  workdir_lib.mark_done(run.workdir, 'sft', {'step': 1})
  workdir, command = train._try_it(run).splitlines()
  echo = command.removeprefix('try it: ').replace(sys.executable, 'echo', 1)
  ran = subprocess.run(
      ['bash', '-c', echo], capture_output=True, text=True, check=True
  )
  said = f"-m ma_rlhf_jax.generate --model={tmp_path}/it's --prompt="
  assert ran.stdout.startswith(said)
  prompt = ran.stdout.removeprefix(said).removesuffix('\n')
  rows = [run.text(ids) for ids in run.data.eval.prompt]
  assert prompt in rows and len(prompt) == min(map(len, filter(None, rows)))


@pytest.mark.parametrize(
    'text', ["it's\nTL;DR:", '\\n $x `y` "z"', 'a\tb\x1b[2Jc\r', 'é €', '']
)
def test_a_prompt_is_one_word_of_the_shell(text: str) -> None:
  quoted = train._shell_quoted(text)
  assert quoted.isprintable()
  ran = subprocess.run(
      ['bash', '-c', f'printf %s {quoted}'],
      capture_output=True,
      env={'LC_ALL': 'C.UTF-8'},
      check=True,
  )
  assert ran.stdout.decode() == text


def test_too_little_memory_is_one_line_with_the_step() -> None:
  error = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 GB\nand so on')
  error.add_note('ppo stopped at step 3')
  said = train._out_of_memory(error)
  assert 'too little memory (ppo stopped at step 3); make micro_batch' in said
  assert said.endswith('RESOURCE_EXHAUSTED: 9 GB') and '\n' not in said


def test_a_start_in_the_workdir_of_a_live_run_changes_nothing(
    tmp_path: pathlib.Path,
) -> None:
  with workdir_lock.hold(tmp_path / 'run'):
    before = sorted((tmp_path / 'run').iterdir())
    message = _message(_TINY, f'--workdir={tmp_path / "run"}')
    assert sorted((tmp_path / 'run').iterdir()) == before
  assert f'--workdir={tmp_path / "run"} is held by process' in message
  assert f'kill {os.getpid()}' in message and '\n' not in message


def test_a_start_that_cannot_run_leaves_no_folder_behind(
    tmp_path: pathlib.Path,
) -> None:
  workdir = tmp_path / 'runs' / 'a'
  assert 'no.jsonl' in _message(
      _TINY,
      f'--workdir={workdir}',
      '--config.data.task=hh',
      '--config.data.path=no.jsonl',
  )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('precision', ['default', 'highest'])
def test_programs_are_traced_with_the_precision_of_the_config(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
  config = tiny.config(model__matmul_precision=precision)
  run = types.SimpleNamespace(mesh=tiny.mesh(1, 1, 1), config=config)
  seen = []
  monkeypatch.setattr(train, '_try_it', lambda _: '')
  monkeypatch.setattr(
      train, 'train', lambda _: seen.append(tiny.matmuls_are_exact())
  )
  train._train(run)
  assert seen == [precision == 'highest']
  assert not tiny.matmuls_are_exact()
