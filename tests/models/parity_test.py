"""Our folders and logits against those of transformers and PyTorch."""

from collections.abc import Callable
import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from ma_rlhf_jax import masking
from ma_rlhf_jax.models import exporting, gemma, heads, huggingface
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.models.tensor_names import SIZES
from ma_rlhf_jax.structs import Array, Params
from tests.models.drawn import UNUSUAL, assert_same_bits, draw, left_padded

torch = pytest.importorskip('torch')

# A prompt of 4 tokens and 64 more fill a row.
TOKENS, MASK = left_padded([68, 5, 9, 1], 68, seed=7)
both_kv_heads = pytest.mark.parametrize('pair', [1, 2], indirect=True)
two_kv_heads = pytest.mark.parametrize('pair', [2], indirect=True)


class Fault:
  """What a parity test must notice; each breaks our side in one way."""

  @staticmethod
  def none(params: Params) -> dict[str, Any]:
    return {}

  @staticmethod
  def rotated_positions(params: Params) -> dict[str, Any]:
    # A shift of all positions changes nothing, so they are turned around.
    return {'positions': np.asarray(masking.positions(MASK))[:, ::-1]}

  @staticmethod
  def shifted_mask(params: Params) -> dict[str, Any]:
    return {'attend': np.roll(masking.causal_mask(MASK), 1, axis=2)}

  @staticmethod
  def padding_seen(params: Params) -> dict[str, Any]:
    return {'attend': masking.causal_mask(np.ones_like(MASK))}

  @staticmethod
  def norm_without_one(params: Params) -> dict[str, Any]:
    fewer = lambda path, x: np.asarray(x) - ('scale' in str(path))
    return {'params': jax.tree_util.tree_map_with_path(fewer, params)}


class Pair(NamedTuple):
  """A model of ours, and what transformers makes of the folder of it."""

  config: GemmaConfig
  params: Params
  theirs: Any
  folder: pathlib.Path


@pytest.fixture(scope='module', autouse=True)
def _one_thread() -> None:
  torch.set_num_threads(1)  # the matrices are tiny


@pytest.fixture(scope='module')
def pair(
    request: pytest.FixtureRequest,
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
  import transformers

  config = dataclasses.replace(UNUSUAL, num_kv_heads=request.param)
  params = draw('policy', config, seed=0)  # its greedy text is diverse
  folder = tmp_path_factory.mktemp('pair') / 'hf'
  exporting.save(folder, params, config, 'policy', tokenizer)
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
      folder, output_loading_info=True, attn_implementation='eager'
  )
  assert not any(report.values()), report
  return Pair(config, params, theirs.eval(), folder)


def _apply(
    config: GemmaConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    attend: Array,
) -> Array:
  model = gemma.Gemma(config)
  hidden, _ = model.apply({'params': params}, tokens, positions, attend)
  return gemma.head_logits(
      hidden, params['embedding'], softcap=config.final_softcap
  )


_jitted = jax.jit(_apply, static_argnums=0)


def _our_logits(
    config: GemmaConfig,
    params: Params,
    tokens: np.ndarray = TOKENS,
    mask: np.ndarray = MASK,
    fault: Callable = Fault.none,
) -> np.ndarray:
  """Logits of four rows of 68 tokens, as in every test: one compilation."""
  inputs = {
      'params': params,
      'positions': masking.positions(mask),
      'attend': masking.causal_mask(mask),
      **fault(params),
  }
  return np.array(_jitted(config, tokens=tokens, **inputs))


def _difference(
    config: GemmaConfig,
    params: Params,
    theirs: Any,
    fault: Callable = Fault.none,
) -> float:
  """The largest at a real token."""
  with torch.no_grad():
    want = theirs(
        torch.from_numpy(TOKENS).long(),
        attention_mask=torch.from_numpy(MASK).long(),
    ).logits.numpy()
  ours = _our_logits(config, params, fault=fault)
  return float(np.abs(ours - want)[MASK].max())


@both_kv_heads
def test_logits_equal_those_of_transformers(pair: Pair) -> None:
  assert _difference(pair.config, pair.params, pair.theirs) < 1e-4


@pytest.mark.parametrize(
    'fault',
    [
        Fault.rotated_positions,
        Fault.shifted_mask,
        Fault.padding_seen,
        Fault.norm_without_one,
    ],
)
@two_kv_heads
def test_parity_would_notice(fault: Callable, pair: Pair) -> None:
  assert _difference(pair.config, pair.params, pair.theirs, fault) > 1e-2


@both_kv_heads
def test_greedy_text_is_diverse_and_the_same(pair: Pair) -> None:
  with torch.no_grad():
    text = pair.theirs.generate(
        torch.tensor([[2, 30, 40, 50]]),
        attention_mask=torch.ones((1, 4), dtype=torch.long),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
    ).numpy()
  assert text.shape == (1, 68)
  assert len(set(text[0, 4:].tolist())) >= 20
  tokens = np.repeat(text.astype(np.int32), 4, axis=0)
  mask = np.ones_like(tokens, bool)
  logits = _our_logits(pair.config, pair.params, tokens, mask)[0]
  logits[:, 1] = -np.inf  # no eos within the minimum
  np.testing.assert_array_equal(logits[3:-1].argmax(-1), text[0, 4:])


@both_kv_heads
def test_folder_written_by_transformers_loads(
    pair: Pair, tmp_path: pathlib.Path
) -> None:
  pair.theirs.save_pretrained(tmp_path, max_shard_size='20KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  assert huggingface.read_shape(tmp_path) == pair.config
  params = huggingface.load_params(tmp_path, pair.config, 'policy')
  assert_same_bits(pair.params, params)


def test_fresh_model_of_transformers_gives_the_same_logits(
    tmp_path: pathlib.Path,
) -> None:
  import transformers

  shape = {their: getattr(UNUSUAL, our) for their, our in SIZES.items()}
  torch.manual_seed(0)
  theirs = transformers.GemmaForCausalLM(
      transformers.GemmaConfig(**shape, rope_theta=500.0, rms_norm_eps=1e-3)
  )
  with torch.no_grad():
    for name, weight in theirs.named_parameters():
      embedding = 'embed' in name
      weight.normal_(0, 0.3 if 'norm' in name else 0.05 if embedding else 0.25)
  theirs.save_pretrained(tmp_path)
  config = huggingface.read_shape(tmp_path)
  assert (config.rope_theta, config.norm_eps) == (500.0, 1e-3)
  params = huggingface.load_params(tmp_path, config, 'policy')
  assert _difference(config, params, theirs.eval()) < 1e-4


def test_classification_scores_equal_ours(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  import transformers

  params, folder = draw('scalar', UNUSUAL, seed=6), tmp_path / 'hf'
  exporting.save(folder, params, UNUSUAL, 'scalar', tokenizer)
  model = transformers.AutoModelForSequenceClassification
  theirs, report = model.from_pretrained(folder, output_loading_info=True)
  assert not any(report.values()), report
  assert theirs.num_labels == 1
  scores = jax.jit(heads.token_scores, static_argnums=0)
  for t, m in [(TOKENS, MASK), (TOKENS[:, ::-1], MASK[:, ::-1])]:
    t, m = np.ascontiguousarray(t), np.ascontiguousarray(m)
    with torch.no_grad():
      want = theirs(
          torch.from_numpy(t).long(), attention_mask=torch.from_numpy(m).long()
      ).logits[:, 0]
    ours = masking.end_scores(scores(UNUSUAL, params, t, m), m)
    np.testing.assert_allclose(ours, want, atol=1e-4)
  assert np.ptp(want.numpy()) > 0.1
  theirs.save_pretrained(tmp_path / 'back')
  found = huggingface.load_params(tmp_path / 'back', UNUSUAL, 'scalar')
  assert_same_bits(params, found)


@two_kv_heads
def test_tokenizer_and_generation_config_load(
    tokenizer: Any, pair: Pair
) -> None:
  import transformers

  found = transformers.AutoTokenizer.from_pretrained(pair.folder)
  # transformers 4 reads these names.
  config = json.loads((pair.folder / 'config.json').read_text())
  assert config['rope_theta'] == 500.0
  assert config['torch_dtype'] == 'float32'
  settings = json.loads((pair.folder / 'tokenizer_config.json').read_text())
  assert settings['tokenizer_class'] == 'PreTrainedTokenizerFast'
  text = 'the cat ran <eos> away\n'
  assert found(text)['input_ids'] == tokenizer(text)['input_ids']
  ids = (found.pad_token_id, found.eos_token_id, found.bos_token_id)
  assert ids == (0, 1, 2)
  generation = transformers.GenerationConfig.from_pretrained(pair.folder)
  assert generation.eos_token_id == pair.theirs.config.eos_token_id == 1
  assert (generation.pad_token_id, generation.bos_token_id) == (0, 2)
