"""Our folders and logits against those of transformers and PyTorch."""

from collections.abc import Callable, Iterator
import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ma_rlhf_jax import masking
from ma_rlhf_jax.models import exporting, gemma, heads, huggingface, vocabulary
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.models.tensor_names import CAPS, SIZES
from ma_rlhf_jax.structs import Array, Params
from tests import tolerance
from tests.models.drawn import (
    UNUSUAL,
    UNUSUAL_2,
    assert_same_bits,
    draw,
    left_padded,
)

torch = pytest.importorskip('torch')

# A prompt of 4 tokens and 64 more fill a row; the last row is all padding.
TOKENS, MASK = left_padded([68, 5, 9, 0], 68, seed=7)
SHAPES = {'gemma': UNUSUAL, 'gemma2': UNUSUAL_2}
both_families = pytest.mark.parametrize('family', SHAPES)
# (family, kv heads): one, some and all of the four heads.
every_pair = pytest.mark.parametrize(
    'pair', [(f, n) for f in SHAPES for n in (1, 2, 4)], indirect=True, ids=str
)
one_pair_a_family = pytest.mark.parametrize(
    'pair', [(f, 2) for f in SHAPES], indirect=True, ids=str
)
gemma_2 = pytest.mark.parametrize(
    'pair', [('gemma2', 2)], indirect=True, ids=str
)


class Pair(NamedTuple):
  """A model of ours, and what transformers makes of the folder of it."""

  config: GemmaConfig
  params: Params
  theirs: Any
  folder: pathlib.Path


Fault = Callable[[Pair], dict[str, Any]]


def _no_fault(pair: Pair) -> dict[str, Any]:
  return {}


def _norm_without_one(pair: Pair) -> dict[str, Any]:
  fewer = lambda path, x: np.asarray(x) - ('scale' in str(path))
  return {'params': jax.tree_util.tree_map_with_path(fewer, pair.params)}


def _other(**fields: Any) -> Fault:
  """The config is another one."""
  return lambda pair: {'config': dataclasses.replace(pair.config, **fields)}


# What a parity test must notice; each breaks our side in one way.
FAULTS: dict[str, Fault] = {
    # A shift of all positions changes nothing, so they are turned around.
    'rotated positions': lambda _: {
        'positions': np.asarray(masking.positions(MASK))[:, ::-1]
    },
    'shifted mask': lambda _: {
        'attend': np.roll(masking.causal_mask(MASK), 1, axis=2)
    },
    'padding seen': lambda _: {
        'attend': masking.causal_mask(np.ones_like(MASK))
    },
    'norm without one': _norm_without_one,
}
FAULTS_2: dict[str, Fault] = {
    'window one longer': _other(sliding_window=UNUSUAL_2.sliding_window + 1),
    'window one shorter': _other(sliding_window=UNUSUAL_2.sliding_window - 1),
    'no window': _other(sliding_layers=()),
    'sliding layers shifted': _other(sliding_layers=(False, True, False)),
    'no cap of scores': _other(attn_softcap=0.0),
    'no cap of logits': _other(final_softcap=0.0),
    'scale by the size of a head': _other(query_pre_attn_scalar=0),
    'no norms after blocks': _other(family='gemma'),
}


@pytest.fixture(scope='module', autouse=True)
def _one_thread() -> Iterator[None]:
  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # the matrices are tiny
  yield
  torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def pair(
    request: pytest.FixtureRequest,
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
  family, kv_heads = request.param
  config = dataclasses.replace(SHAPES[family], num_kv_heads=kv_heads)
  params = draw('policy', config, seed=0)  # its greedy text is diverse
  folder = tmp_path_factory.mktemp('pair') / 'hf'
  exporting.save(folder, params, config, 'policy', tokenizer)
  return Pair(config, params, _theirs(folder, 'policy'), folder)


def _theirs(folder: pathlib.Path, kind: str) -> Any:
  """The folder as transformers reads it, in the type that it says."""
  import transformers

  model = {
      'policy': transformers.AutoModelForCausalLM,
      'scalar': transformers.AutoModelForSequenceClassification,
  }[kind]
  theirs, report = model.from_pretrained(
      folder,
      dtype='auto',
      output_loading_info=True,
      attn_implementation='eager',
  )
  assert not any(report.values()), report
  return theirs.eval()


def _fresh(kind: str, shape: GemmaConfig, seed: int) -> Any:
  """A model made by transformers, of weights that let errors show."""
  import transformers

  family = {'gemma': 'Gemma', 'gemma2': 'Gemma2'}[shape.family]
  end = {'policy': 'ForCausalLM', 'scalar': 'ForSequenceClassification'}[kind]
  fields = {their: getattr(shape, our) for their, our in SIZES.items()}
  fields |= {'rope_theta': shape.rope_theta, 'rms_norm_eps': shape.norm_eps}
  if shape.family == 'gemma2':
    fields |= {their: getattr(shape, our) for their, our in CAPS.items()}
    fields['query_pre_attn_scalar'] = shape.query_pre_attn_scalar
    fields['sliding_window'] = shape.sliding_window
  if kind == 'scalar':
    fields |= {'num_labels': 1, 'pad_token_id': 0}
  config = getattr(transformers, f'{family}Config')(**fields)
  model = getattr(transformers, family + end)(config)
  torch.manual_seed(seed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      embedding = 'embed' in name
      weight.normal_(0, 0.3 if 'norm' in name else 0.05 if embedding else 0.25)
  return model.eval()


def _apply(
    config: GemmaConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    attend: Array,
) -> Array:
  model = gemma.Gemma(config)
  hidden, _ = model.apply({'params': params}, tokens, positions, attend)
  return vocabulary.head_logits(
      hidden, params['embedding'], softcap=config.final_softcap
  )


_jitted = jax.jit(_apply, static_argnums=0)


def _our_logits(
    pair: Pair,
    tokens: np.ndarray = TOKENS,
    mask: np.ndarray = MASK,
    fault: Fault = _no_fault,
) -> np.ndarray:
  """Logits of four rows of 68 tokens, as in every test: one compilation."""
  inputs = {
      'config': pair.config,
      'params': pair.params,
      'positions': masking.positions(mask),
      'attend': masking.causal_mask(mask),
      **fault(pair),
  }
  config = inputs.pop('config')
  return np.array(_jitted(config, tokens=tokens, **inputs))


def _rounding(pair: Pair) -> float:
  """How far two float32 computations of the logits may be apart."""
  real = lambda params: _our_logits(pair._replace(params=params))[MASK]
  longest = max(pair.config.mlp_dim, TOKENS.shape[1])
  (bound,) = tolerance.of_sums(real, (pair.params,), longest)
  assert bound < 1e-3  # a tenth of what a fault makes, see below
  return bound


def _difference(pair: Pair, fault: Fault = _no_fault) -> float:
  """The largest at a real token."""
  with torch.no_grad():
    want = pair.theirs(
        torch.from_numpy(TOKENS).long(),
        attention_mask=torch.from_numpy(MASK).long(),
    ).logits.numpy()
  ours = _our_logits(pair, fault=fault)
  assert np.isfinite(ours).all()  # in the row of padding too
  return float(np.abs(ours - want)[MASK].max())


@every_pair
def test_logits_equal_those_of_transformers(pair: Pair) -> None:
  assert not MASK[3].any() and MASK[0].all()
  assert _difference(pair) < _rounding(pair)


@pytest.mark.parametrize('fault', FAULTS)
@one_pair_a_family
def test_parity_would_notice(fault: str, pair: Pair) -> None:
  assert _difference(pair, FAULTS[fault]) > 1e-2


@pytest.mark.parametrize('fault', FAULTS_2)
@gemma_2
def test_parity_of_gemma_2_would_notice(fault: str, pair: Pair) -> None:
  assert _difference(pair, FAULTS_2[fault]) > 1e-2


@one_pair_a_family
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
  logits = _our_logits(pair, tokens, np.ones_like(tokens, bool))[0]
  logits[:, 1] = -np.inf  # no eos within the minimum
  np.testing.assert_array_equal(logits[3:-1].argmax(-1), text[0, 4:])


@both_families
def test_fresh_model_of_transformers_gives_the_same_logits(
    family: str, tmp_path: pathlib.Path
) -> None:
  theirs = _fresh('policy', SHAPES[family], seed=0)
  theirs.save_pretrained(tmp_path)
  config = huggingface.read_shape(tmp_path)
  assert config == SHAPES[family]
  params = huggingface.load_params(tmp_path, config, 'policy')
  pair = Pair(config, params, theirs, tmp_path)
  assert _difference(pair) < _rounding(pair)


def _tensors(model: Any) -> dict[str, np.ndarray]:
  """Their tensors, as bits."""
  bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
  return {
      name: x.view(bits[x.dtype]).numpy()
      for name, x in model.state_dict().items()
  }


def _files(folder: pathlib.Path) -> int:
  return len(list(folder.glob('*.safetensors')))


# Every two of the choices meet; sharded is what we read first.
@pytest.mark.parametrize(
    ('family', 'kind', 'dtype', 'sharded'),
    [
        (family, kind, dtype, (i + j + k) % 2 == 0)
        for i, family in enumerate(SHAPES)
        for j, kind in enumerate(heads.MODELS)
        for k, dtype in enumerate(['float32', 'bfloat16'])
    ],
)
def test_round_trips_change_no_bit(
    family: str,
    kind: str,
    dtype: str,
    sharded: bool,
    tokenizer: Any,
    tmp_path: pathlib.Path,
) -> None:
  small, whole = 20_000, 10**9  # bytes a file
  first, second = (small, whole) if sharded else (whole, small)
  theirs = _fresh(kind, SHAPES[family], seed=3).to(getattr(torch, dtype))
  theirs.save_pretrained(tmp_path / 'a', max_shard_size=first)
  shape = huggingface.read_shape(tmp_path / 'a')
  assert shape == SHAPES[family]
  config = dataclasses.replace(shape, param_dtype=dtype)
  ours = huggingface.load_params(tmp_path / 'a', config, kind)
  assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.dtype(dtype)}
  exporting.save(
      tmp_path / 'b', ours, config, kind, tokenizer, max_shard_bytes=second
  )
  back = _theirs(tmp_path / 'b', kind)
  want, found = _tensors(theirs), _tensors(back)
  assert want.keys() == found.keys()
  for name, bits in want.items():
    np.testing.assert_array_equal(found[name], bits)
  back.save_pretrained(tmp_path / 'c', max_shard_size=first)
  assert huggingface.read_shape(tmp_path / 'c') == shape
  again = huggingface.load_params(tmp_path / 'c', config, kind)
  assert_same_bits(ours, again)
  counts = [_files(tmp_path / name) for name in 'abc']
  assert (np.array(counts) > 1).tolist() == [sharded, not sharded, sharded]


@both_families
def test_classification_scores_equal_ours(
    family: str, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
  config, folder = SHAPES[family], tmp_path / 'hf'
  params = draw('scalar', config, seed=6)
  exporting.save(folder, params, config, 'scalar', tokenizer)
  theirs = _theirs(folder, 'scalar')
  assert theirs.num_labels == 1
  scores = jax.jit(heads.token_scores, static_argnums=0)
  for tokens, mask in [(TOKENS, MASK), (TOKENS[:, ::-1], MASK[:, ::-1])]:
    t, m = np.ascontiguousarray(tokens), np.ascontiguousarray(mask)
    with torch.no_grad():
      want = theirs(
          torch.from_numpy(t).long(), attention_mask=torch.from_numpy(m).long()
      ).logits[:, 0]
    ends = lambda p, t=t, m=m: masking.end_scores(scores(config, p, t, m), m)
    ours = ends(params)
    assert np.isfinite(ours).all()
    longest = max(config.mlp_dim, TOKENS.shape[1])
    bounds = tolerance.of_sums(
        lambda p, ends=ends: ends(p)[:3], (params,), longest
    )
    tolerance.assert_close(ours[:3], want[:3].numpy(), bounds)
  assert np.ptp(want[:3].numpy()) > 0.1


@one_pair_a_family
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
