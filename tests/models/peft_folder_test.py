"""Adapter folders: what they hold, and what peft makes of them."""

from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ma_rlhf_jax import masking
from ma_rlhf_jax.config_fields import KERNELS
from ma_rlhf_jax.models import (
    exporting,
    folders,
    heads,
    lora,
    peft_folder,
    vocabulary,
)
from ma_rlhf_jax.models.presets import GemmaConfig, Lora
from ma_rlhf_jax.structs import Params
from tests import tolerance
from tests.models.drawn import (
    UNUSUAL,
    UNUSUAL_2,
    assert_same_bits,
    draw,
    left_padded,
    states,
)

TOKENS, MASK = left_padded([9, 4, 6, 1], 9)
ALL = dataclasses.replace(UNUSUAL, lora=Lora(2, 3.0, KERNELS))
SOME = Lora(4, 6.5, ('key', 'out', 'down'))
GEMMA2 = dataclasses.replace(UNUSUAL_2, lora=SOME)
ONE = dataclasses.replace(UNUSUAL, lora=Lora(3, 3.0, ('up',)))
_A = 'base_model.model.model.layers.{}.{}.lora_A.weight'
_B = 'base_model.model.model.layers.{}.{}.lora_B.weight'


def _save(
    folder: pathlib.Path, params: Params, config: GemmaConfig, kind: str
) -> pathlib.Path:
  base = str(folder.parent / 'base')
  peft_folder.save(folder, params, config, kind, base=base, card='# Card\n')
  return folder


def test_a_folder_holds_the_factors_and_how_they_are_used(
    tmp_path: pathlib.Path,
) -> None:
  params = draw('policy', GEMMA2, seed=3)
  folder = _save(tmp_path / 'adapter', params, GEMMA2, 'policy')
  assert {p.name for p in folder.iterdir()} == {
      'README.md',
      'adapter_config.json',
      'adapter_model.safetensors',
      'ma_rlhf_manifest.json',
  }
  assert (folder / 'README.md').read_text() == '# Card\n'
  config = json.loads((folder / 'adapter_config.json').read_text())
  assert config['target_modules'] == ['down_proj', 'k_proj', 'o_proj']
  assert (config['r'], config['lora_alpha']) == (4, 6.5)
  assert (config['peft_type'], config['task_type']) == ('LORA', 'CAUSAL_LM')
  assert config['modules_to_save'] is None
  assert peft_folder.read_base(folder) == str(tmp_path / 'base')
  tensors = load_file(folder / 'adapter_model.safetensors')
  # key: 24 -> 2 heads of 10; out: 4 heads of 10 -> 24; down: 36 -> 24
  shapes = {
      'self_attn.k_proj': ((4, 24), (20, 4)),
      'self_attn.o_proj': ((4, 40), (24, 4)),
      'mlp.down_proj': ((4, 36), (24, 4)),
  }
  assert {name: x.shape for name, x in tensors.items()} == {
      pattern.format(layer, module): shape
      for module, both in shapes.items()
      for layer in range(3)
      for pattern, shape in zip((_A, _B), both, strict=True)
  }
  # The input (head 3, place 7) of `out` is their column 3 * 10 + 7.
  ours = lora.flatten(params)['layers/attention/out_lora_a']
  theirs = tensors[_A.format(1, 'self_attn.o_proj')]
  assert theirs[2, 37] == ours[1, 3, 7, 2] != 0


def test_a_scalar_model_brings_its_head_in_float32(
    tmp_path: pathlib.Path,
) -> None:
  config = dataclasses.replace(ONE, param_dtype='bfloat16')
  params = draw('scalar', config, seed=3)
  folder = _save(tmp_path / 'adapter', params, config, 'scalar')
  settings = json.loads((folder / 'adapter_config.json').read_text())
  assert settings['modules_to_save'] == ['score']
  assert settings['task_type'] == 'SEQ_CLS'
  tensors = load_file(folder / 'adapter_model.safetensors')
  assert len(tensors) == 2 * 3 + 1
  assert {x.dtype.name for x in tensors.values()} == {'float32'}
  head = tensors['base_model.model.score.weight']
  np.testing.assert_array_equal(head, np.float32(params['head'])[None])


@pytest.mark.parametrize(
    ('kind', 'config'), [('policy', GEMMA2), ('scalar', ALL)]
)
def test_what_is_written_is_read_back(
    kind: str, config: GemmaConfig, tmp_path: pathlib.Path
) -> None:
  params = draw(kind, config, seed=3)
  folder = _save(tmp_path / 'adapter', params, config, kind)
  base = lora.without_adapters(params)
  base.pop('head', None)  # a reward model starts from a policy
  plain = dataclasses.replace(config, lora=None)
  found, joined = peft_folder.load(folder, plain, kind, base)
  assert found == config
  assert_same_bits(params, joined)
  assert joined.get('backbone', joined)['embedding'] is (
      base.get('backbone', base)['embedding']
  )


def test_a_disk_that_is_full_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def full(*_: Any, **__: Any) -> None:
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(peft_folder, 'save_file', full)
  with pytest.raises(folders.NoSpaceError, match='adapter: no space left'):
    _save(tmp_path / 'adapter', draw('policy', ONE, 3), ONE, 'policy')
  assert not any(tmp_path.iterdir())


def _rounding(
    function: Callable[[Params], np.ndarray], params: Params
) -> list[float]:
  """How far what `function` makes of `params` may be off."""
  longest = max(ALL.mlp_dim, TOKENS.shape[1])
  return tolerance.of_sums(function, (params,), longest)


def _our_logits(config: GemmaConfig, params: Params) -> np.ndarray:
  hidden = states(config, params, TOKENS, MASK)
  logits = vocabulary.head_logits(
      hidden, params['embedding'], softcap=config.final_softcap
  )
  return np.asarray(logits)[MASK]


def _with_peft(
    tmp_path: pathlib.Path,
    tokenizer: Any,
    kind: str,
    config: GemmaConfig,
    params: Params,
) -> Any:
  """What peft makes of a base folder and an adapter folder of ours."""
  peft = pytest.importorskip('peft')
  import transformers

  plain = dataclasses.replace(config, lora=None)
  base = lora.without_adapters(params)
  exporting.save(tmp_path / 'base', base, plain, kind, tokenizer)
  _save(tmp_path / 'adapter', params, config, kind)
  auto = transformers.AutoModelForCausalLM
  if kind == 'scalar':
    auto = transformers.AutoModelForSequenceClassification
  model = auto.from_pretrained(tmp_path / 'base', attn_implementation='eager')
  return peft.PeftModel.from_pretrained(model, tmp_path / 'adapter').eval()


def _their_logits(model: Any) -> np.ndarray:
  import torch

  with torch.no_grad():
    return model(
        torch.from_numpy(TOKENS).long(),
        attention_mask=torch.from_numpy(MASK).long(),
    ).logits.numpy()


@pytest.mark.parametrize(
    'config', [ALL, GEMMA2, pytest.param(ONE, marks=pytest.mark.slow)]
)
def test_peft_gives_our_logits_and_merges_as_we_do(
    config: GemmaConfig, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  params = draw('policy', config, seed=3)
  model = _with_peft(tmp_path, tokenizer, 'policy', config, params)
  ours = _our_logits(config, params)
  theirs = _their_logits(model)[MASK]
  bounds = _rounding(functools.partial(_our_logits, config), params)
  tolerance.assert_close(ours, theirs, bounds)
  with model.disable_adapter():
    plain = _their_logits(model)[MASK]
  assert np.abs(ours - plain).max() > 1e-2  # the adapters count
  exporting.save(tmp_path / 'merged', params, config, 'policy', tokenizer)
  merged = load_file(tmp_path / 'merged' / 'model.safetensors')
  state = model.merge_and_unload().state_dict()
  # Each of the two rounds a sum of the kernel and of `rank` scaled products.
  sizes = jax.tree.map(jnp.abs, params)
  exporting.save(tmp_path / 'sizes', sizes, config, 'policy', tokenizer)
  sizes = load_file(tmp_path / 'sizes' / 'model.safetensors')
  step = (config.lora.rank + 2) * np.finfo(np.float32).eps
  for name, ours in merged.items():
    bound = step * sizes[name].max()
    np.testing.assert_allclose(
        ours, state[name].numpy(), rtol=0, atol=bound, err_msg=name
    )
  assert len(merged) == 2 + 3 * (11 if config.family == 'gemma2' else 9)


@pytest.fixture(scope='module')
def scalar(
    tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, Params, Any]:
  """A folder with base and adapter, their parameters, and peft's model."""
  folder = tmp_path_factory.mktemp('scalar')
  params = draw('scalar', ALL, seed=3)
  model = _with_peft(folder, tokenizer, 'scalar', ALL, params)
  return folder, params, model


_scores = jax.jit(heads.token_scores, static_argnums=0)


def _our_scores(params: Params) -> np.ndarray:
  scores = _scores(ALL, params, TOKENS, MASK)
  return np.asarray(masking.end_scores(scores, jnp.asarray(MASK)))


def test_peft_writes_the_same_names(
    scalar: tuple[pathlib.Path, Params, Any], tmp_path: pathlib.Path
) -> None:
  folder, _, model = scalar
  model.save_pretrained(tmp_path, selected_adapters=['default'])
  ours, theirs = (
      load_file(path / 'adapter_model.safetensors')
      for path in (folder / 'adapter', tmp_path)
  )
  assert ours.keys() == theirs.keys()
  for name, x in ours.items():
    np.testing.assert_array_equal(x, theirs[name], err_msg=name)


def test_peft_gives_our_scores_by_the_head_of_the_folder(
    scalar: tuple[pathlib.Path, Params, Any], tmp_path: pathlib.Path
) -> None:
  _, params, model = scalar
  ours = _our_scores(params)
  bounds = _rounding(_our_scores, params)
  tolerance.assert_close(ours, _their_logits(model)[:, 0], bounds)
  assert np.ptp(ours) > 0.1
  # The head of the base is not the one that counts.
  other = params | {'head': params['head'] + 0.5}
  _save(tmp_path / 'other', other, ALL, 'scalar')
  model.load_adapter(tmp_path / 'other', adapter_name='other')
  model.set_adapter('other')
  theirs = _their_logits(model)[:, 0]
  bounds = _rounding(_our_scores, other)
  tolerance.assert_close(_our_scores(other), theirs, bounds)
  assert np.abs(theirs - ours).max() > 0.01
