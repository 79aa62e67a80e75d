"""What a config may hold; every problem is named with field, value and need."""

import math
from typing import Any

from ml_collections import ConfigDict
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import validation
from ma_rlhf_jax.training import symptoms
from ma_rlhf_jax.validation import ConfigError, problems, validate, warnings


def _config(fields: dict[str, Any] | None = None) -> ConfigDict:
  config = config_lib.base()
  config.update_from_flattened_dict(fields or {})
  return config


# Names, paths and switches, of which every value is allowed.
_FREE = set(
    'data.cache_dir data.chosen_column'
    ' data.drop_truncated data.eval_path data.eval_split data.path'
    ' data.prompt_column data.rejected_column data.shuffle_labels data.split'
    ' data.subset ppo.critic_init ppo.from_run ppo.policy_init'
    ' ppo.reward_model ppo.whiten_advantages reward_model.init sft.init'
    ' tokenizer.path macro.parser macro.last_token_alone'
    ' macro.empty_step rollout.int8_cache'.split()
) | {f'stop.{code}' for code in symptoms.CODES}
# Checked together with other fields, or by `parallel.mesh`.
_RULES = set(
    'critic.gae_lambda data.parts log.sinks macro.random_lengths mesh.data'
    ' ppo.kl_estimator lora.targets reward'
    ' mesh.fsdp mesh.tensor profile.steps stages tokenizer.vocab_size'.split()
)


def test_base_has_no_problem_and_no_warning() -> None:
  assert problems(_config()) == []
  assert warnings(_config()) == []
  validate(_config(), 8)


def test_every_field_is_checked_and_every_check_has_its_field() -> None:
  ranged = {name for names, _, _ in validation.RANGES for name in names}
  checked = ranged | validation.CHOICES.keys() | _RULES
  fields = config_lib.flatten(_config()).keys()
  assert sorted(checked - fields) == []
  assert sorted(fields - checked) == sorted(_FREE)


@pytest.mark.parametrize('name', sorted(validation.CHOICES))
def test_a_word_that_is_no_choice_is_refused(name: str) -> None:
  assert f"{name}='other' must be one of {validation.CHOICES[name][0]}" in (
      '\n'.join(problems(_config({name: 'other'})))
  )


@pytest.mark.parametrize(
    'need, outside, inside',
    [
        ('at least 1', (0, -3), (1, 2)),
        ('at least 2', (0, 1), (2, 3)),
        ('at least 0', (-1,), (0, 1)),
        ('above 0', (0, -1), (1,)),
        ('between 0 and 1', (-1, 2), (0, 1)),
    ],
)
def test_numbers_out_of_range_are_refused(
    need: str, outside: tuple[int, ...], inside: tuple[int, ...]
) -> None:
  names, holds, words = next(r for r in validation.RANGES if r[2] == need)
  assert words == need and names
  assert not any(map(holds, outside)) and all(map(holds, inside))
  for name in names:
    found = problems(_config({name: outside[0]}))
    assert any(
        line.startswith(f'{name}={outside[0]}') and line.endswith(need)
        for line in found
    ), f'{name}: {found}'


# Fields that are set, and what the only message must hold.
_REFUSED = [
    ({'model.num_kv_heads': 3}, 'num_kv_heads=3 must divide model.num_heads=4'),
    (
        {'model.family': 'gemma2', 'model.embed_dim': 126},
        'num_heads=4 must divide model.embed_dim=126',
    ),
    ({'model.head_dim': 33}, 'model.head_dim=33 must be even'),
    ({'tokenizer.vocab_size': 287}, 'tokenizer.vocab_size=287 must be at'),
    ({'ppo.minibatches': 3}, 'ppo.minibatches=3 must divide ppo.batch_size'),
    (
        {'sft.micro_batch_size': 24},
        'sft.micro_batch_size=24 must divide the 64',
    ),
    (
        {'reward_model.micro_batch_size': 65},
        'reward_model.micro_batch_size=65 must divide the 64 sequences',
    ),
    # 256 prompts * 2 samples in 4 minibatches of 128
    (
        {
            'ppo.samples_per_prompt': 2,
            'ppo.minibatches': 4,
            'ppo.micro_batch_size': 256,
        },
        'ppo.micro_batch_size=256 must divide the 128 sequences',
    ),
    ({'rollout.batch_size': 100}, 'rollout.batch_size=100 must divide the 256'),
    ({'data.task': 'hh'}, "data.path is empty; data.task='hh' needs a file"),
    ({'data.parts': (1, 2)}, 'data.parts=(1, 2) must be three shares'),
    ({'data.parts': (0, 0, 0)}, 'data.parts=(0, 0, 0) must be three shares'),
    ({'data.parts': (2, -1, 4)}, 'data.parts=(2, -1, 4) must hold numbers'),
    ({'data.max_prompt_len': 1}, 'must be at least 2'),
    (
        {'rollout.min_new_tokens': 24, 'data.max_response_len': 24},
        'rollout.min_new_tokens=24 must be below the response limit of 24',
    ),
    ({'stages': ('ppo', 'sft')}, "stages=('ppo', 'sft') must be some of"),
    ({'stages': ('sft', 'rm')}, "stages=('sft', 'rm') must be some of"),
    ({'stages': ('sft', 'sft')}, "stages=('sft', 'sft') must be some of"),
    ({'data.parts': ('a', 'b', 'c')}, 'must hold numbers of at least 0'),
    ({'data.parts': (math.nan, 5, 5)}, 'must hold numbers of at least 0'),
    ({'rollout.temperature': 0.0}, 'rollout.temperature=0.0 draws'),
    ({'rollout.temperature': 0.005}, 'rollout.temperature=0.005 draws'),
    (
        {'rollout.temperature': 1e-20, 'stages': ('sft',)},
        'rollout.temperature=1e-20 must be 0 or at least 1e-4',
    ),
    ({'evaluate.temperature': 1e-40}, 'evaluate.temperature=1e-40 must be 0'),
    ({'rollout.top_p': 1e-300}, 'rollout.top_p=1e-300 must be at least 1e-6'),
    ({'lora.targets': ([1],)}, 'lora.targets=([1],) must hold names'),
    ({'log.sinks': ([],)}, 'log.sinks=([],) must hold names'),
    ({'stages': ([],)}, 'stages=([],) must hold names'),
    ({'data.max_response_len': 10**9}, 'data.max_response_len=1000000000 must'),
    ({'data.max_response_len': 10**12}, '1000000000000 is too large; it must'),
    ({'lora.rank': 10**9}, 'lora.rank=1000000000 must be at most 4096'),
    ({'data.synthetic_rows': 10**9}, 'data.synthetic_rows=1000000000 must be'),
    ({'data.synthetic_rows': 10**14}, 'data.synthetic_rows=100000000000000 is'),
    ({'model.num_layers': 10**9}, 'model.num_layers=1000000000 must be at mos'),
    ({'model.embed_dim': 10**12}, 'model.embed_dim=1000000000000 is too large'),
    ({'model.vocab_size': 10**13}, 'model.vocab_size=10000000000000 is too'),
    ({'macro.random_repeats': 2 * 10**9}, 'macro.random_repeats=2000000000 mu'),
    ({'ppo.kl_coef': 1e300}, 'ppo.kl_coef=1e+300 is too large; it must be at'),
    ({'ppo.kl_coef': 1e7}, 'ppo.kl_coef=10000000.0 must be at most 1e6'),
    ({'ppo.optim.lr': math.inf}, 'ppo.optim.lr=inf must be a finite number'),
    ({'seed': 2**40}, 'seed=1099511627776 must be below 2**32'),
    ({'macro.ngram': 3 * 10**9}, 'macro.ngram=3000000000 is too large'),
    ({'sft.optim.b1': 1.0}, 'sft.optim.b1=1.0 must be at least 0 and below 1'),
    ({'model.dtype': 'float64'}, 'float64 needs JAX_ENABLE_X64=1'),
    ({'profile.steps': (5, 2)}, 'profile.steps=(5, 2) must be () or (first'),
    ({'profile.steps': ('a', 'b')}, 'must hold whole numbers of at least 1'),
    ({'profile.steps': (1,)}, 'profile.steps=(1,) must be () or (first, last)'),
    ({'log.sinks': ('jsonl', 'csv')}, "log.sinks has ['csv']; known: jsonl"),
    ({'macro.random_lengths': ()}, 'macro.random_lengths is empty'),
    ({'macro.random_lengths': (2, 0)}, 'must hold whole numbers of at least 1'),
    ({'macro.random_lengths': (2.5,)}, 'must hold whole numbers of at least 1'),
    (
        {
            'checkpoint.best_metric.ppo': 'eval/gold',
            'data.task': 'hh',
            'data.path': 'rows.jsonl',
        },
        "no true quality is known in data.task='hh'",
    ),
    ({'macro.reward': 'mean'}, "use critic.target='macro'"),
    ({'critic.gae_lambda': -0.5}, 'critic.gae_lambda=-0.5 must be between'),
    ({'critic.gae_lambda': 1.5}, 'or -1 for that of ppo'),
]


@pytest.mark.parametrize('fields, words', _REFUSED)
def test_each_rule_refuses_with_field_value_and_need(
    fields: dict[str, Any], words: str
) -> None:
  found = problems(_config(fields))
  assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(
    'fields',
    [
        {'model.num_kv_heads': 2},
        {'tokenizer.vocab_size': 100, 'tokenizer.path': 'folder'},
        {'sft.micro_batch_size': 16, 'rollout.batch_size': 128},
        {'data.task': 'hh', 'data.path': 'rows.jsonl'},
        {'data.parts': (1, 0, 2)},
        {'rollout.min_new_tokens': 23, 'data.max_response_len': 24},
        {'stages': ('sft', 'evaluate')},
        {'rollout.temperature': 0.0, 'stages': ('sft',)},
        {'macro.reward': 'mean', 'critic.target': 'macro'},
        {'profile.steps': (10, 13), 'log.sinks': ()},
    ],
)
def test_what_is_only_unusual_is_allowed(fields: dict[str, Any]) -> None:
  assert problems(_config(fields)) == []


def test_all_problems_stand_in_one_message() -> None:
  wrong = {'ppo.kl_coef': -0.5, 'seed': -1, 'data.task': 'hh', 'stages': ('a',)}
  with pytest.raises(ConfigError) as caught:
    validate(_config(wrong))
  message = str(caught.value)
  assert message.startswith('4 problem(s) in the config:\n  ')
  for words in (
      'ppo.kl_coef=-0.5 must be at least 0',
      'seed=-1 must be at least 0',
      'data.path is empty',
      "stages=('a',)",
  ):
    assert words in message


def test_each_part_of_a_batch_is_split_over_the_devices() -> None:
  fields = {'sft.micro_batch_size': 4, 'reward_model.batch_size': 20}
  assert problems(_config(fields), 4) == []
  found = problems(_config(fields), 8)
  assert len(found) == 2
  assert 'sft.micro_batch_size=4' in found[0] and '8 devices' in found[0]
  assert 'reward_model.micro_batch_size=20 (0 = all' in found[1]


def test_prompts_alone_are_split_over_the_devices_too() -> None:
  fields = {'ppo.batch_size': 12, 'ppo.samples_per_prompt': 2}
  found = problems(_config(fields), 8)  # 24 rows would fit
  assert found == [
      'ppo.batch_size=12 must be a multiple of the 8 devices that share a batch'
  ]


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'rollout.top_k': 40}, 'rollout.top_k=40, top_p=1.0'),
        ({'rollout.top_p': 0.9}, 'top_p=0.9, min_new_tokens=0'),
        ({'rollout.min_new_tokens': 2}, 'min_new_tokens=2'),
        (
            {'ppo.logprob_temperature': 0.7},
            'ppo.logprob_temperature=0.7 differs',
        ),
    ],
)
def test_sampling_that_biases_the_gradient_warns(
    fields: dict[str, Any], words: str
) -> None:
  found = warnings(_config(fields))
  assert len(found) == 1 and words in found[0]
  assert 'biases the gradient' in found[0]


def test_an_equal_temperature_is_no_warning() -> None:
  equal = {'ppo.logprob_temperature': 0.7, 'rollout.temperature': 0.7}
  assert warnings(_config(equal)) == []


@pytest.mark.parametrize(
    ('fields', 'line'),
    [
        (
            {'model.attention': 'splash'},
            "model.attention='splash': splash attention runs on TPUs",
        ),
        (
            {'model.attention': 'cudnn'},
            "model.attention='cudnn': cuDNN runs on NVIDIA GPUs",
        ),
        (
            {'critic.optim.moment_dtype': 'bfloat16', 'critic.optim.b2': 0.999},
            'critic.optim.b2=0.999 must be at most 0.98',
        ),
        (
            {'model.frozen_memory': 'host', 'lora.rank': 4},
            "model.frozen_memory='host' must be 'device' with lora.rank=4",
        ),
    ],
)
def test_what_a_platform_or_a_dtype_cannot_do_is_refused(
    fields: dict[str, Any], line: str
) -> None:
  (found,) = problems(_config(fields))
  assert found.startswith(line)


def test_a_kl_coefficient_that_could_fall_to_0_for_ever_is_refused() -> None:
  fields = {'ppo.batch_size': 100, 'ppo.samples_per_prompt': 3}
  fields |= {'ppo.kl_target': 6.0, 'ppo.kl_horizon': 60}
  (found,) = problems(_config(fields))  # a fifth of 300
  words = ('ppo.kl_horizon=60', 'above 60', '300', 'ppo.kl_target=6.0', '3000')
  assert all(word in found for word in words), found
  assert problems(_config(fields | {'ppo.kl_horizon': 61})) == []
  assert problems(_config(fields | {'ppo.kl_target': 0.0})) == []


def test_attention_of_a_shape_is_checked_for_the_platform(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  gpu = validation.partition.Machine('gpu', (9, 0))
  monkeypatch.setattr(validation.partition, 'machine', lambda: gpu)
  fields = {'model.attention': 'cudnn', 'model.dtype': 'bfloat16'}
  named = lambda preset: problems(_config(fields | {'model.preset': preset}))
  assert named('gemma-7b') == []
  (found,) = named('gemma-2-27b')
  assert 'no bound of attention scores' in found
  # A folder decides, and is checked when it is read.
  assert problems(_config(fields | {'sft.init': 'folder'})) == []


@pytest.mark.parametrize('kernel', ['splash', 'cudnn'])
@pytest.mark.parametrize(
    'fields',
    [{'reward_model.loss': 'authors'}, {'sft.loss_on': 'everything'}],
)
def test_a_loss_over_padding_takes_plain_attention_alone(
    kernel: str, fields: dict[str, Any]
) -> None:
  platform = {'splash': ('tpu', None), 'cudnn': ('gpu', (9, 0))}[kernel]
  machine = validation.partition.Machine(*platform)
  named = lambda attention: problems(
      _config(
          {
              'model.attention': attention,
              'model.preset': 'gemma-7b',
              'model.dtype': 'bfloat16',
              **fields,
          }
      ),
      machine=machine,
  )
  (found,) = named(kernel)
  (name, value), *_ = fields.items()
  for words in (f'model.attention={kernel!r}', f'{name}={value!r}', "'xla'"):
    assert words in found
  assert named('auto') == named('xla') == []


@pytest.mark.parametrize(
    ('capability', 'told'), [((7, 5), True), ((8, 0), False), (None, False)]
)
def test_bfloat16_where_no_matmul_has_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    told: bool,
) -> None:
  machine = validation.partition.Machine('gpu', capability)
  monkeypatch.setattr(validation.partition, 'machine', lambda: machine)
  found = warnings(_config({'model.dtype': 'bfloat16'}))
  assert [('7.5' in w and 'model.dtype=bfloat16' in w) for w in found] == (
      [True] if told else []
  )
  assert warnings(_config()) == []


def test_memory_of_the_host_must_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
  fields = {'model.frozen_memory': 'host'}
  assert problems(_config(fields)) == []
  monkeypatch.setattr(validation.partition, 'has_host_memory', lambda: False)
  (found,) = problems(_config(fields))
  assert 'this cpu cannot read the memory of the host' in found
