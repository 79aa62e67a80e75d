"""The command as a user gives it: what comes out, and what it refuses."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from ma_rlhf_jax import export
from ma_rlhf_jax import workdir as workdir_lib
from ma_rlhf_jax.export import ExportError, Request
from ma_rlhf_jax.models import export_check, hub, huggingface
from ma_rlhf_jax.models.presets import Lora
from ma_rlhf_jax.publishing import publish
from tests import products
from tests.models.drawn import assert_same_bits

_ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> products.Made:
  return products.make(tmp_path_factory.mktemp('made'))


@pytest.fixture(scope='module')
def exported(
    made: products.Made, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, str]:
  """The folder of a whole export, and what was printed."""
  output = tmp_path_factory.mktemp('exported') / 'policy'
  return output, export.export(Request(str(made.workdir), str(output)))


def _refused(made: products.Made, output: Any, **fields: Any) -> str:
  """The message of an export that cannot be made, and leaves nothing."""
  output = pathlib.Path(output)
  before = sorted(output.parent.rglob('*'))
  with pytest.raises((ValueError, OSError)) as caught:
    export.export(Request(str(made.workdir), str(output), **fields))
  assert sorted(output.parent.rglob('*')) == before
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_a_finished_stage_comes_out_whole(
    made: products.Made, exported: tuple[pathlib.Path, str]
) -> None:
  output, told = exported
  assert told.startswith(f'{output}: ppo in float32, read back on 8 prompts by')
  assert 'ma_rlhf_jax max logit difference 0, top1 agreement 1' in told
  assert {p.name for p in output.iterdir()} == {
      'README.md',
      'config.json',
      'export_check.json',
      'generation_config.json',
      'ma_rlhf_manifest.json',
      'model.safetensors',
      'tokenizer.json',
      'tokenizer_config.json',
  }
  assert [p.name for p in output.parent.iterdir()] == ['policy']
  found = huggingface.load_params(output, products.SHAPE)
  assert_same_bits(made.params['ppo'], found)


def _snippet(folder: pathlib.Path) -> str:
  readme = (folder / 'README.md').read_text()
  (code,) = re.findall(r'^```python\n(.*?)^```$', readme, re.M | re.S)
  assert code.count('model_path = "policy"\n') == 1
  return code.replace('"policy"', repr(str(folder)))


def test_the_snippet_of_the_card_runs(
    exported: tuple[pathlib.Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
  pytest.importorskip('torch')
  found: dict[str, Any] = {}
  exec(_snippet(exported[0]), found)  # only model_path is changed
  prompt, text = found['inputs']['input_ids'][0], found['outputs'][0]
  assert prompt[0] == 2 and len(prompt) > 10
  assert len(prompt) < len(text) <= len(prompt) + 20
  assert text[: len(prompt)].tolist() == prompt.tolist()
  assert str(found['model'].dtype) == 'torch.float32'
  assert capsys.readouterr().out.startswith('My boss was late today.\nTL;DR:')


def test_the_snippet_of_the_published_cards_runs(
    exported: tuple[pathlib.Path, str],
) -> None:
  # As the cards at baidu/ have it: device_map needs accelerate.
  pytest.importorskip('torch')
  pytest.importorskip('accelerate')
  from transformers import AutoModelForCausalLM, AutoTokenizer

  model_path = str(exported[0])
  tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=True)
  model = AutoModelForCausalLM.from_pretrained(
      model_path,
      device_map='auto',
      torch_dtype='auto',
      trust_remote_code=True,
  )
  input_text = '\nMy boss was late.\nTL;DR:\n'
  inputs = tokenizer(input_text, return_tensors='pt').to(model.device)
  outputs = model.generate(**inputs, max_new_tokens=20)
  length = inputs['input_ids'].shape[1]
  assert tokenizer.decode(outputs[0, 1:length]) == input_text
  assert length < outputs.shape[1] <= length + 20


def test_shards_dtype_and_prompts_are_chosen(
    made: products.Made, tmp_path: pathlib.Path
) -> None:
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text('{"prompt": "My boss", "response": " good"}\n')
  told = export.export(
      Request(
          str(made.workdir),
          str(tmp_path / 'out'),
          stage='critic',
          dtype='bfloat16',
          max_shard_size='9KB',
          prompts=str(prompts),
      )
  )
  assert 'critic in bfloat16, read back on 1 prompts' in told
  sizes = [p.stat().st_size for p in (tmp_path / 'out').glob('*.safetensors')]
  assert len(sizes) > 1
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['dtype'] == 'bfloat16'
  assert config['architectures'] == ['GemmaForSequenceClassification']


@pytest.mark.slow
def test_adapters_come_out_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('HF_TOKEN', 'hf_secret')
  monkeypatch.setattr(hub, 'upload', lambda folder, repo: f'https://hub/{repo}')
  adapters = Lora(2, 3.0, ('query',))
  made = products.make(tmp_path / 'made', products.SHAPE, adapters)
  output = tmp_path / 'out'
  request = Request(str(made.workdir), str(output), adapter=True)
  pushed = dataclasses.replace(request, push_to_hub='me/it')
  with pytest.raises(ExportError, match='which others lack; publish that and'):
    export.export(pushed)
  assert not output.exists()
  first, note = export.export(request).split('\n')
  assert first.startswith(f'{output}: ppo in float32')
  assert 'the base is a local folder, called PATH_OF_THE_BASE in' in note
  card = (output / 'README.md').read_text()
  settings = (output / 'adapter_config.json').read_text()
  assert 'base_path = "PATH_OF_THE_BASE"' in card and 'that very model' in card
  assert '"base_model_name_or_path": "PATH_OF_THE_BASE"' in settings
  assert str(tmp_path) not in card + settings
  named = dataclasses.replace(pushed, base='me/sft', overwrite=True)
  first, last = export.export(named).split('\n')
  assert last == 'uploaded to https://hub/me/it'
  assert 'base_model: me/sft\n' in (output / 'README.md').read_text()
  settings = json.loads((output / 'adapter_config.json').read_text())
  assert settings['base_model_name_or_path'] == 'me/sft'
  assert (output / 'adapter_config.json').is_file()
  assert not (output / 'model.safetensors').exists()


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'stage': 'rm'}, '--stage=rm: choose one of sft, reward_model, ppo,'),
        ({'dtype': 'int8'}, '--dtype=int8: choose one of float32, bfloat16'),
        ({'max_shard_size': '5'}, '--max_shard_size=5: write for example 5GB'),
        ({'max_shard_size': '0GB'}, '--max_shard_size=0GB: write'),
        ({'base': 'me/sft'}, '--base=me/sft needs --adapter'),
        ({'base': '/x', 'adapter': True}, '--base=/x: a model of the hub is'),
        ({'adapter': True}, "stage 'ppo' of .* has no adapters .lora.rank=0"),
        (
            {'adapter': True, 'dtype': 'float32'},
            'adapters are always float32; leave it out',
        ),
        ({'prompts': '/no/such'}, '--prompts=/no/such cannot be read'),
        ({'push_to_hub': 'name'}, '--push_to_hub=name: a repository is named'),
    ],
)
def test_a_wrong_flag_is_told_and_leaves_nothing(
    made: products.Made,
    tmp_path: pathlib.Path,
    fields: dict[str, Any],
    words: str,
) -> None:
  assert re.search(words, _refused(made, tmp_path / 'out', **fields))


def test_a_folder_that_is_no_workdir_is_told(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match=f'--workdir={tmp_path}/no is no workd'):
    export.export(Request(f'{tmp_path}/no', f'{tmp_path}/out'))
  assert not any(tmp_path.iterdir())


def test_a_stage_that_is_not_done_names_the_command(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(
      sys, 'argv', ['train.py', '--config=a b.py:ngram=1', '--workdir=w']
  )
  config = products.config()
  workdir = workdir_lib.open_workdir(tmp_path / 'run', config)
  unfinished = products.Made(workdir, config, None, products.SHAPE, {})
  for stage, missing in (('ppo', 'ppo'), ('critic', 'ppo'), ('sft', 'sft')):
    message = _refused(unfinished, tmp_path / 'out', stage=stage)
    assert message == (
        f"stage '{missing}' of {workdir} is not done; run it to its end: "
        "python -m ma_rlhf_jax.train '--config=a b.py:ngram=1' --workdir=w"
    )


def test_a_stage_of_another_run_is_not_exported_from_this_one(
    tmp_path: pathlib.Path,
) -> None:
  config = products.config(ppo__policy_init='me/sft', ppo__baseline='rloo')
  workdir = workdir_lib.open_workdir(tmp_path / 'run', config)
  workdir_lib.mark_done(workdir, 'ppo', {'step': 1})
  other = products.Made(workdir, config, None, products.SHAPE, {})
  message = _refused(other, tmp_path / 'out', stage='sft')
  assert 'was not trained in' in message
  assert 'ppo.policy_init gives me/sft; export that' in message
  message = _refused(other, tmp_path / 'out', stage='critic')
  assert "has no critic: it was trained with ppo.baseline='rloo'" in message


def test_only_an_earlier_export_is_overwritten(
    made: products.Made, exported: tuple[pathlib.Path, str], tmp_path: Any
) -> None:
  output, _ = exported
  message = _refused(made, output)
  assert f'--output={output} is there and not empty' in message
  (tmp_path / 'mine').write_text('thesis')
  message = _refused(made, tmp_path, overwrite=True)
  assert 'holds no export_check.json, so it is no export' in message
  message = _refused(made, tmp_path / 'mine', overwrite=True)
  assert f'--output={tmp_path}/mine is a file' in message
  assert (tmp_path / 'mine').read_text() == 'thesis'


def test_an_export_is_replaced_or_stays_as_it_was(
    made: products.Made, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
  output = tmp_path / 'out'
  output.mkdir()
  (output / publish.RECEIPT).write_text('old')
  (output / 'old').write_text('')
  _without_torch(monkeypatch)
  with monkeypatch.context() as broken:
    nan = lambda *_, **__: {
        'max_logit_difference': float('nan'),
        'max_logit_difference_allowed': 1.0,
    }
    broken.setattr(export_check, 'difference', nan)
    message = _refused(made, output, overwrite=True)
    assert 'what ma_rlhf_jax reads back differs' in message
  assert (output / publish.RECEIPT).read_text() == 'old'
  export.export(Request(str(made.workdir), str(output), overwrite=True))
  assert not (output / 'old').exists() and (output / 'config.json').exists()
  assert [p.name for p in tmp_path.iterdir()] == ['out']


def _without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
  find = importlib.util.find_spec
  none = lambda name: None if name == 'torch' else find(name)
  monkeypatch.setattr(importlib.util, 'find_spec', none)


def test_a_full_disk_leaves_nothing(
    made: products.Made, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
  def full(*_: Any, **__: Any) -> None:
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('ma_rlhf_jax.models.exporting.save_file', full)
  message = _refused(made, tmp_path / 'out')
  assert message.startswith(f'{tmp_path}/out: no space left on device, on the')


def test_what_is_whole_is_uploaded(
    made: products.Made, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
  monkeypatch.setenv('HF_TOKEN', 'hf_secret')
  _without_torch(monkeypatch)
  seen = []

  def upload(folder: Any, repo: str) -> str:
    seen.append(repo)
    assert (folder / publish.RECEIPT).exists()
    assert f'model_path = "{repo}"' in (folder / 'README.md').read_text()
    return f'https://hub/{repo}'

  monkeypatch.setattr(hub, 'upload', upload)
  request = Request(
      str(made.workdir), str(tmp_path / 'out'), push_to_hub='me/it'
  )
  told = export.export(request)
  assert told.endswith('\nuploaded to https://hub/me/it') and seen == ['me/it']
  assert 'hf_secret' not in told
  bucket = dataclasses.replace(request, output='gs://bucket/out')
  with pytest.raises(ExportError, match='upload starts from a local folder'):
    export.export(bucket)


def test_without_a_token_nothing_is_made(
    made: products.Made, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
  monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
  message = _refused(made, tmp_path / 'out', push_to_hub='me/it')
  assert 'needs a token that may write' in message


@pytest.mark.slow
def test_the_command_itself_ends_in_one_line(tmp_path: pathlib.Path) -> None:
  run = lambda *arguments: subprocess.run(
      [sys.executable, '-m', 'ma_rlhf_jax.export', *arguments],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=120,
  )
  done = run(f'--workdir={tmp_path}', f'--output={tmp_path}/out')
  assert done.returncode == 1 and done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert line.startswith(f'error: --workdir={tmp_path} is no workdir')
  assert run().stderr.startswith('error: usage: python -m ma_rl')
