"""What a config may hold; every problem is named with field, value and need."""

import math
from typing import Any

from ml_collections import ConfigDict
import pytest

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import validation
from ma_rlhf_jax.config_fields import FIELDS
from ma_rlhf_jax.validation import ConfigError, problems, refuse, warnings


def _config(fields: dict[str, Any] | None = None) -> ConfigDict:
  config = config_lib.base()
  config.update_from_flattened_dict(fields or {})
  return config


def test_base_has_no_problem_and_no_warning() -> None:
  assert problems(_config()) == []
  assert warnings(_config()) == []
  assert problems(_config(), 8) == []
  refuse([])


_CHOSEN = [n for n, f in FIELDS.items() if f.check.entries]


@pytest.mark.parametrize('name', _CHOSEN)
def test_a_word_that_is_no_choice_is_refused(name: str) -> None:
  first = next(filter(None, FIELDS[name].choices))
  assert f"{name}='other' must be one of {first}" in (
      '\n'.join(problems(_config({name: 'other'})))
  )


@pytest.mark.parametrize(
    ('name', 'value', 'need'),
    [
        ('ppo.batch_size', 0, 'between 1 and 1048576'),
        ('macro.min_len', -3, 'at least 1'),
        ('evaluate.prompts', 1, 'between 2 and 100000000'),
        ('ppo.optim.lr', 0.0, 'above 0'),
        ('ppo.gamma', 2.0, 'between 0 and 1'),
        ('mesh.fsdp', 0, 'at least 1, or -1'),
        ('model.unroll', -2, 'at least -1'),
    ],
)
def test_numbers_out_of_range_are_refused(
    name: str, value: float, need: str
) -> None:
  found = problems(_config({name: value}))
  assert f'{name}={value!r} must be {need}' in found


def test_no_number_breaks_the_rules_that_compute_with_it() -> None:
  for name, field in FIELDS.items():
    whole = [0, -1, 10**30, -(10**30)]
    wild = {int: whole, float: [math.nan, math.inf, -math.inf, -1e308, 0.0]}
    for value in wild.get(type(field.default), []):
      problems(_config({name: value}))


def test_all_of_a_start_stands_in_one_message() -> None:
  fields = {'data.task': 'tldr', 'data.path': 'x', 'ppo.gamma': 2.0}
  fields |= {'mesh.data': 3, 'stages': ('ppo',)}
  found = validation.problems_here(_config(fields))
  assert len(found) == 3
  for line, words in zip(
      found,
      ('ppo.gamma=2.0', 'does not cover the 8 devices', "data.task='tldr'"),
      strict=True,
  ):
    assert words in line
  found = validation.problems_here(_config({'rollout.tensor': 3}))
  assert len(found) == 1 and 'rollout.tensor=3 must divide' in found[0]
  assert validation.problems_here(_config()) == []


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
    ({'data.parts': (1, 2)}, 'data.parts=(1, 2) must be three numbers'),
    ({'data.parts': (0, 0, 0)}, 'data.parts=(0, 0, 0) must be three numbers'),
    ({'data.parts': (2, -1, 4)}, 'data.parts=(2, -1, 4) must be three numbers'),
    ({'data.max_prompt_len': 1}, 'must be at least 2'),
    (
        {'rollout.min_new_tokens': 24, 'data.max_response_len': 24},
        'rollout.min_new_tokens=24 must be below the response limit of 24',
    ),
    (
        {'stages': ('ppo', 'sft')},
        "stages=('ppo', 'sft') must be a tuple of some of",
    ),
    (
        {'stages': ('sft', 'rm')},
        "stages=('sft', 'rm') must be a tuple of some of",
    ),
    (
        {'stages': ('sft', 'sft')},
        "stages=('sft', 'sft') must be a tuple of some of",
    ),
    (
        {'data.parts': ('a', 'b', 'c')},
        'must be three numbers of at least 0, not all 0',
    ),
    (
        {'data.parts': (math.nan, 5, 5)},
        'must be three numbers of at least 0, not all 0',
    ),
    ({'rollout.temperature': 0.0}, 'rollout.temperature=0.0 draws'),
    ({'rollout.temperature': 0.005}, 'rollout.temperature=0.005 draws'),
    (
        {'rollout.temperature': 1e-20, 'stages': ('sft',)},
        'rollout.temperature=1e-20 must be between 0.0001 and 1e6, or 0',
    ),
    (
        {'evaluate.temperature': 1e-40},
        'evaluate.temperature=1e-40 must be between',
    ),
    (
        {'rollout.top_p': 1e-300},
        'rollout.top_p=1e-300 must be between 1e-6 and 1',
    ),
    (
        {'lora.targets': ([1],)},
        'lora.targets=([1],) must be a tuple of some of query',
    ),
    ({'log.sinks': ([],)}, 'log.sinks=([],) must be a tuple of some of jsonl'),
    ({'stages': ([],)}, 'stages=([],) must be a tuple of some of sft'),
    (
        {'data.max_response_len': 10**9},
        'data.max_response_len=1000000000 must be between',
    ),
    (
        {'data.max_response_len': 10**12},
        '1000000000000 must be between 0 and 1048576',
    ),
    ({'lora.rank': 10**9}, 'lora.rank=1000000000 must be between 0 and 4096'),
    ({'data.synthetic_rows': 10**9}, 'data.synthetic_rows=1000000000 must be'),
    ({'data.synthetic_rows': 10**14}, 'data.synthetic_rows=100000000000000 mu'),
    ({'model.num_layers': 10**9}, 'model.num_layers=1000000000 must be bet'),
    ({'model.embed_dim': 10**12}, 'model.embed_dim=1000000000000 must be b'),
    ({'model.vocab_size': 10**13}, 'model.vocab_size=10000000000000 must'),
    ({'macro.random_repeats': 2 * 10**9}, 'macro.random_repeats=2000000000 mu'),
    ({'ppo.kl_coef': 1e300}, 'ppo.kl_coef=1e+300 must be between 0 and 1e6'),
    ({'ppo.kl_coef': 1e7}, 'ppo.kl_coef=10000000.0 must be between 0 and'),
    ({'ppo.optim.lr': math.inf}, 'ppo.optim.lr=inf must be a finite number'),
    ({'seed': 2**40}, 'seed=1099511627776 must be between 0 and 4294967295'),
    (
        {'macro.ngram': 3 * 10**9},
        'macro.ngram=3000000000 must be at most 2147483647 in',
    ),
    ({'sft.optim.b1': 1.0}, 'sft.optim.b1=1.0 must be at least 0 and below 1'),
    ({'model.dtype': 'float64'}, 'float64 needs JAX_ENABLE_X64=1'),
    ({'profile.steps': (5, 2)}, 'profile.steps=(5, 2) must be () or (first'),
    ({'profile.steps': ('a', 'b')}, 'whole numbers of at least 1'),
    ({'profile.steps': (1,)}, 'profile.steps=(1,) must be () or (first, last)'),
    (
        {'log.sinks': ('jsonl', 'csv')},
        'must be a tuple of some of jsonl, tensorboard, wandb',
    ),
    (
        {'macro.random_lengths': ()},
        'macro.random_lengths=() must be some whole',
    ),
    ({'macro.random_lengths': (2, 0)}, 'whole numbers of at least 1'),
    ({'macro.random_lengths': (2.5,)}, 'whole numbers of at least 1'),
    (
        {
            'checkpoint.best_metric.ppo': 'eval/gold',
            'data.task': 'hh',
            'data.path': 'rows.jsonl',
        },
        "no true quality is known in data.task='hh'",
    ),
    ({'macro.reward': 'mean'}, "use critic.target='macro'"),
    ({'ppo.kl_estimator': 'k3'}, "ppo.kl_estimator='k3' must be one of k1"),
    ({'critic.gae_lambda': -0.5}, 'critic.gae_lambda=-0.5 must be between'),
    ({'critic.gae_lambda': 1.5}, 'or -1'),
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
    refuse(problems(_config(wrong)))
  message = str(caught.value)
  assert message.startswith('4 problem(s) in the config:\n  ')
  for words in (
      'ppo.kl_coef=-0.5 must be between 0 and 1e6',
      'seed=-1 must be between 0 and 4294967295',
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


def _missing(fields: dict[str, Any], done: tuple[str, ...] = ()) -> list[str]:
  return validation.missing_products(_config(fields), done)


@pytest.mark.parametrize(
    'fields',
    [
        {},
        {'stages': ('sft',)},
        {'stages': ('sft', 'reward_model')},
        {'stages': ('reward_model',), 'reward_model.init': 'folder'},
        {'stages': ('reward_model',), 'ppo.policy_init': 'folder'},
        {
            'stages': ('ppo',),
            'ppo.policy_init': 'folder',
            'ppo.reward_model': 'folder',
        },
        {'stages': ('ppo', 'evaluate'), 'ppo.from_run': 'workdir'},
        {'stages': ('sft', 'ppo'), 'reward': 'my_rewards:politeness'},
    ],
)
def test_every_product_is_given_or_to_be_made(fields: dict[str, Any]) -> None:
  assert _missing(fields) == []


@pytest.mark.parametrize(
    'fields, missing',
    [
        ({'stages': ('reward_model',)}, [('reward_model', 'sft')]),
        (
            {'stages': ('ppo',)},
            [('ppo', 'sft'), ('ppo', 'reward_model')],
        ),
        (
            {'stages': ('sft', 'evaluate')},
            [('evaluate', 'reward_model'), ('evaluate', 'ppo')],
        ),
        (
            {'stages': ('ppo',), 'ppo.reward_model': 'folder'},
            [('ppo', 'sft')],
        ),
    ],
)
def test_a_product_that_nobody_makes_is_named(
    fields: dict[str, Any], missing: list[tuple[str, str]]
) -> None:
  assert [line.split(':')[0] for line in _missing(fields)] == [
      f'stage {stage!r} needs the product of {need!r}'
      for stage, need in missing
  ]


def test_a_product_made_before_counts() -> None:
  done = ('sft', 'reward_model')
  assert _missing({'stages': ('ppo',)}, done) == []
  (line,) = _missing({'stages': ('evaluate',)}, done)
  assert "product of 'ppo'" in line
