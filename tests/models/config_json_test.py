"""Tests of `models.config_json`."""

import dataclasses
import json
import random
from typing import Any

import pytest

from ma_rlhf_jax.models import config_json
from ma_rlhf_jax.models.presets import PRESETS
from tests.models.drawn import UNUSUAL, UNUSUAL_2

_GEMMA = {
    'model_type': 'gemma',
    'vocab_size': 320,
    'num_hidden_layers': 3,
    'hidden_size': 24,
    'intermediate_size': 36,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 10,
}
_GEMMA_2 = {**_GEMMA, 'model_type': 'gemma2'}


@pytest.mark.parametrize(
    ('changes', 'theta', 'eps'),
    [
        ({}, 10_000.0, 1e-6),  # what a file that says nothing means
        ({'rope_theta': 500.0, 'rope_scaling': None}, 500.0, 1e-6),
        (
            {'rope_parameters': {'rope_type': 'default', 'rope_theta': 70.0}},
            70.0,
            1e-6,
        ),
        ({'rope_scaling': {'type': 'default'}, 'rope_theta': 5}, 5.0, 1e-6),
        (  # transformers 5: what is inside goes before what is beside
            {'rope_theta': 500.0, 'rope_parameters': {'rope_theta': 70.0}},
            70.0,
            1e-6,
        ),
        (
            {
                'hidden_act': 'gelu',
                'hidden_activation': None,
                'rms_norm_eps': 1,
            },
            10_000.0,
            1,
        ),
        ({'hidden_activation': 'gelu_pytorch_tanh'}, 10_000.0, 1e-6),
        ({'hidden_activation': 'gelu'}, 10_000.0, 1e-6),
        # Not ours to care about, and never run.
        ({'auto_map': {'AutoModel': 'code.Model'}}, 10_000.0, 1e-6),
    ],
)
def test_gemma_1(changes: dict, theta: float, eps: float) -> None:
  found = config_json.read_fields({**_GEMMA, **changes})
  plain = dataclasses.replace(UNUSUAL, rope_theta=theta, norm_eps=eps)
  assert found == plain


# Layers, width, MLP, heads, kv heads, head size and scale of the queries, as
# the files at google/ on the hub have them.
_SIZES = {
    'gemma-2b': (18, 2048, 16_384, 8, 1, 256, None),
    'gemma-7b': (28, 3072, 24_576, 16, 16, 256, None),
    'codegemma-2b': (18, 2048, 16_384, 8, 1, 256, None),
    'codegemma-7b-it': (28, 3072, 24_576, 16, 16, 256, None),
    'gemma-2-2b': (26, 2304, 9216, 8, 4, 256, 256),
    'gemma-2-9b': (42, 3584, 14_336, 16, 8, 256, 256),
    'gemma-2-27b': (46, 4608, 36_864, 32, 16, 128, 144),
}


def _published(name: str) -> dict[str, Any]:
  """A config.json as transformers 4 wrote it for google/<name>."""
  layers, width, mlp, heads, kv_heads, head_dim, scalar = _SIZES[name]
  fields = {
      'architectures': ['GemmaForCausalLM'],
      'attention_bias': False,
      'attention_dropout': 0.0,
      'bos_token_id': 2,
      'eos_token_id': 1,
      'head_dim': head_dim,
      'hidden_act': 'gelu',
      'hidden_size': width,
      'initializer_range': 0.02,
      'intermediate_size': mlp,
      'max_position_embeddings': 8192,
      'model_type': 'gemma',
      'num_attention_heads': heads,
      'num_hidden_layers': layers,
      'num_key_value_heads': kv_heads,
      'pad_token_id': 0,
      'rms_norm_eps': 1e-06,
      'rope_scaling': None,
      'rope_theta': 10000.0,
      'torch_dtype': 'bfloat16',
      'transformers_version': '4.38.0.dev0',
      'use_cache': True,
      'vocab_size': 256000,
  }
  if scalar:  # before the field layer_types
    fields |= {
        'architectures': ['Gemma2ForCausalLM'],
        'attn_logit_softcapping': 50.0,
        'cache_implementation': 'hybrid',
        'final_logit_softcapping': 30.0,
        'hidden_act': 'gelu_pytorch_tanh',
        'hidden_activation': 'gelu_pytorch_tanh',
        'model_type': 'gemma2',
        'query_pre_attn_scalar': scalar,
        'sliding_window': 4096,
        'transformers_version': '4.42.0.dev0',
    }
  return fields


def test_published_files_give_the_presets() -> None:
  assert _SIZES.keys() == PRESETS.keys()
  for name, shape in PRESETS.items():
    assert config_json.read_fields(_published(name)) == shape, name


@pytest.mark.parametrize(
    ('changes', 'want'),
    [
        ({'layer_types': None}, {}),
        (
            {'layer_types': ['full_attention'] + ['sliding_attention'] * 2},
            {'sliding_layers': (False, True, True)},
        ),
        (
            {'layer_types': ['full_attention'] * 3, 'sliding_window': None},
            {'sliding_layers': (), 'sliding_window': 0},
        ),
        (
            {'layer_types': ['full_attention'] * 3},
            {'sliding_layers': (), 'sliding_window': 0},
        ),
        ({'attn_logit_softcapping': None}, {'attn_softcap': 0.0}),
        ({'final_logit_softcapping': None}, {'final_softcap': 0.0}),
        ({'query_pre_attn_scalar': 7}, {'query_pre_attn_scalar': 7}),
    ],
)
def test_gemma_2(changes: dict, want: dict) -> None:
  # What a file means that leaves all of these fields out.
  plain = dataclasses.replace(
      UNUSUAL_2,
      rope_theta=10_000.0,
      norm_eps=1e-6,
      query_pre_attn_scalar=256,
      attn_softcap=50.0,
      final_softcap=30.0,
      sliding_window=4096,
      sliding_layers=(True, False, True),
  )
  assert config_json.read_fields(_GEMMA_2) == plain
  found = config_json.read_fields({**_GEMMA_2, **changes})
  assert found == dataclasses.replace(plain, **want)


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'model_type': 'gemma3'}, "model_type is 'gemma3'; implemented"),
        ({'model_type': ['gemma']}, r"model_type is \['gemma'\]"),
        ({'model_type': None, 'auto_map': {}}, 'auto_map .* never run'),
        ({'hidden_act': 'relu'}, "hidden_act is 'relu'"),
        ({'hidden_activation': 'silu'}, "hidden_activation is 'silu'"),
        ({'attention_bias': True}, 'attention_bias is True'),
        ({'tie_word_embeddings': False}, 'tie_word_embeddings is False'),
        ({'use_bidirectional_attention': True}, 'use_bidirectional_attention'),
        ({'quantization_config': {'bits': 4}}, 'quantization_config is {'),
        ({'rope_scaling': {'type': 'linear', 'factor': 2}}, "type 'linear'"),
        ({'rope_parameters': {'rope_type': 'yarn'}}, "type 'yarn'"),
        ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary'),
        ({'rope_parameters': {'full_attention': {}}}, 'full_attention'),
        ({'rope_parameters': [1]}, r'positions are \[1\]; they must be an obj'),
        ({'rope_theta': 'big'}, "rope_theta is 'big'; it must be a number"),
        ({'rope_theta': 10**400}, r'rope_theta is 1000.*above 0 and finite'),
        ({'rms_norm_eps': float('nan')}, 'rms_norm_eps is nan; it must be'),
        ({'rms_norm_eps': None}, 'rms_norm_eps is None; it must be a number'),
        ({'num_key_value_heads': 3}, 'num_key_value_heads=3 does not divide'),
        ({'head_dim': 7}, 'head_dim=7 is odd'),
        ({'hidden_size': None}, 'hidden_size is None'),
        ({'hidden_size': 24.0}, 'hidden_size is 24.0; it must be an integer'),
        ({'hidden_size': True}, 'hidden_size is True'),
        ({'num_hidden_layers': 201}, 'num_hidden_layers is 201.*1 to 200'),
        ({'vocab_size': 10**9}, 'vocab_size is 1000000000.*1 to 1048576'),
        ({'hidden_size': 10**5}, 'hidden_size is 100000.*1 to 32768'),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict, reason: str) -> None:
  with pytest.raises(ValueError, match=reason):
    config_json.read_fields({**_GEMMA, **changes})


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'query_pre_attn_scalar': None}, 'query_pre_attn_scalar is None'),
        ({'attn_logit_softcapping': -1}, 'attn_logit_softcapping is -1'),
        ({'final_logit_softcapping': '30'}, "final_logit_softcapping is '30'"),
        ({'sliding_window': 0}, 'sliding_window is 0; it must be an integer'),
        ({'sliding_window': None}, 'sliding_window is null; layers that slide'),
        ({'layer_types': ['full_attention']}, 'layer_types .* list 3 layers'),
        ({'layer_types': 3}, 'layer_types is 3; it must list 3 layers'),
        (
            {'layer_types': ['full_attention', 'mamba', {}]},
            r"layer_types holds \['mamba', '{}'\]; implemented: sliding",
        ),
        # The sizes are wrong as well; nothing of their size is made.
        ({'num_hidden_layers': 10**12}, 'num_hidden_layers is 1000000000000'),
    ],
)
def test_what_is_wrong_in_gemma_2_is_refused(
    changes: dict, reason: str
) -> None:
  with pytest.raises(ValueError, match=reason):
    config_json.read_fields({**_GEMMA_2, **changes})


def test_all_reasons_are_given_at_once() -> None:
  changes = {
      'hidden_act': 'relu',
      'attention_bias': True,
      'head_dim': 0,
      'rope_scaling': {'rope_type': 'yarn'},
      'layer_types': ['x'],
      'rms_norm_eps': 0,
  }
  with pytest.raises(ValueError) as error:
    config_json.read_fields({**_GEMMA_2, **changes})
  lines = str(error.value).split('\n')
  assert [line.split()[0] for line in lines] == [
      'head_dim',
      'hidden_act',
      'attention_bias',
      'rotary',
      'rms_norm_eps',
      'layer_types',
  ]


def test_no_junk_ends_in_another_error() -> None:
  junk = [None, True, -1, 0, 2.5, 1e999, 'x', [], ['gemma'], {}, {'a': [1]}]
  drawn = random.Random(0)
  names = [*_published('gemma-2-2b'), 'layer_types', 'rope_parameters']
  refused = 0
  for _ in range(500):
    fields = _published('gemma-2-2b')
    for name in drawn.sample(names, 2):
      fields[name] = drawn.choice(junk)
    fields = json.loads(json.dumps(fields))
    try:
      config_json.read_fields(fields)
    except ValueError:
      refused += 1
  assert 250 < refused < 500


@pytest.mark.parametrize(
    ('fields', 'noted'),
    [
        ({'model_type': 'gemma2', 'hidden_activation': 'gelu'}, True),
        ({'model_type': 'gemma2', 'hidden_act': 'gelu'}, True),
        ({'model_type': 'gemma2'}, False),
        ({'model_type': 'gemma', 'hidden_act': 'gelu'}, False),
    ],
)
def test_a_gelu_that_is_not_that_of_the_file_is_noted(
    fields: dict[str, str], noted: bool
) -> None:
  assert ('tanh form is used' in config_json.note(fields)) == noted
