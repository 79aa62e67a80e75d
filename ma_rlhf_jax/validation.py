"""Checks of a config before any device work: every problem in one message."""

from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import registry, switches
from ma_rlhf_jax.macro import aggregate, host, termination
from ma_rlhf_jax.models import gemma, kernels, presets, tensor_names
from ma_rlhf_jax.objective import (
    advantage,
    losses,
    preference,
    rewards,
    targets,
)
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.parallel.mesh import PRECISIONS
from ma_rlhf_jax.scorers import functions
from ma_rlhf_jax.training import optim, sft

_STAGES = ('sft', 'reward_model', 'ppo', 'evaluate')
_OPTIMS = ('sft.optim', 'reward_model.optim', 'ppo.optim', 'critic.optim')

_OF_REWARDS = ('sum', 'mean')  # the weights that pool no values

# Field -> the values it may have, from the tables of the functions themselves.
CHOICES: dict[str, tuple[Any, ...]] = {
    'model.dtype': ('float32', 'bfloat16', 'float64'),
    'model.param_dtype': ('float32', 'bfloat16', 'float64'),
    'model.matmul_precision': PRECISIONS,
    'model.remat': ('auto', *gemma.REMAT),
    'model.attention': kernels.CHOICES,
    'model.frozen_memory': tuple(partition.MEMORIES),
    'model.preset': ('', *presets.PRESETS),
    'model.family': tuple(tensor_names.WEIGHTS),
    'data.task': tuple(config_lib.TASK_LENGTHS),
    'sft.loss_on': tuple(sft.LOSS_ON),
    'reward_model.loss': tuple(preference.PAIR_LOSSES),
    'ppo.discount': tuple(advantage.DISCOUNTS),
    'ppo.advantage': tuple(advantage.ADVANTAGES),
    'ppo.baseline': tuple(targets.BASELINES),
    'ppo.ratio': tuple(losses.RATIOS),
    'ppo.loss_reduction': tuple(losses.REDUCTIONS),
    'ppo.one_pass': ('auto', 'joint', 'policy', 'off'),
    'critic.target': tuple(advantage.CRITIC_TARGETS),
    'macro.variant': tuple(switches.VARIANTS),
    'macro.termination': (*termination.RULES, *host.NAMES),
    'macro.random_leftover': ('one', 'cycle'),
    'macro.logprobs': ('ref', 'old'),
    'macro.parse_fallback': host.FALLBACKS,
    'macro.reward': ('sum', 'mean', 'position_reversed'),
    'macro.value': tuple(v for v in aggregate.WEIGHTS if v not in _OF_REWARDS),
    'export.which': ('last', 'best'),
    'profile.stage': _STAGES[:3],
    **{f'{o}.schedule': optim.SCHEDULES for o in _OPTIMS},
    **{f'{o}.moment_dtype': ('float32', 'bfloat16') for o in _OPTIMS},
    **{
        f'checkpoint.best_metric.{stage}': tuple(
            sign + f'eval/{name}' for name in names for sign in ('', '-')
        )
        for stage, names in (
            ('sft', ('loss',)),
            ('reward_model', ('accuracy', 'margin', 'loss')),
            ('ppo', ('score', 'kl', 'policy_kl', 'length', 'ended', 'gold')),
        )
    },
}

_AT_LEAST_1 = (
    'model.num_layers model.embed_dim model.mlp_dim model.num_heads'
    ' model.num_kv_heads model.head_dim'
    ' data.synthetic_rows sft.batch_size reward_model.batch_size'
    ' ppo.batch_size ppo.samples_per_prompt ppo.ppo_epochs ppo.minibatches'
    ' ppo.kl_horizon macro.random_repeats macro.cut_count macro.parse_cutoff'
    ' macro.min_len checkpoint.keep log.every'
).split()
# One number alone has no interval.
_AT_LEAST_2 = ['data.eval_rows', 'evaluate.prompts']
_AT_LEAST_0 = (
    'seed model.vocab_size model.query_pre_attn_scalar model.attn_softcap'
    ' model.final_softcap model.sliding_window model.logprob_chunk lora.rank'
    ' data.max_rows'
    ' data.max_prompt_len data.max_response_len sft.steps sft.micro_batch_size'
    ' sft.eval_every'
    ' reward_model.steps reward_model.micro_batch_size reward_model.eval_every'
    ' reward_model.num_padding_at_beginning ppo.steps ppo.micro_batch_size'
    ' ppo.length_buckets ppo.kl_coef ppo.kl_target ppo.score_clip'
    ' ppo.logprob_temperature'
    ' macro.parse_workers macro.max_len'
    ' ppo.critic_warmup_updates ppo.eval_every critic.clip_eps macro.ngram'
    ' data.split_seed rollout.temperature rollout.top_k rollout.min_new_tokens'
    ' rollout.batch_size rollout.tensor checkpoint.every log.samples'
    ' evaluate.temperature'
).split() + [f'{o}.{f}' for o in _OPTIMS for f in ('weight_decay', 'clip_norm')]
_ABOVE_0 = (
    'model.rope_theta model.norm_eps ppo.clip_eps rollout.top_p ppo.max_kl'
    ' sft.epochs reward_model.epochs ppo.epochs macro.cut_probability'
    ' lora.alpha'
).split() + [f'{o}.{f}' for o in _OPTIMS for f in ('lr', 'eps')]
_UP_TO_1 = (
    'ppo.gamma ppo.gae_lambda rollout.top_p data.label_noise'
    ' macro.cut_probability'
).split() + [
    f'{o}.{f}' for o in _OPTIMS for f in ('warmup_ratio', 'final_lr_ratio')
]
_BELOW_1 = [f'{o}.{f}' for o in _OPTIMS for f in ('b1', 'b2')]
_BELOW_2_32 = ['seed', 'data.split_seed']  # what random generators take
_UP_TO_A_MILLION = (
    'ppo.kl_coef ppo.kl_target ppo.score_clip ppo.max_kl rollout.temperature'
    ' evaluate.temperature ppo.logprob_temperature lora.alpha sft.epochs'
    ' reward_model.epochs ppo.epochs'
).split()
# Below it float32 divides log-probs to infinity; 0 is greedy, or another field.
_TEMPERATURES = [
    'rollout.temperature',
    'evaluate.temperature',
    'ppo.logprob_temperature',
]
# Far above what anyone runs; beyond them a typing error is refused before
# anything of its size is made.
_LARGEST = {
    'model.vocab_size': 2**20,
    'model.num_layers': 200,
    'model.embed_dim': 2**15,
    'model.mlp_dim': 2**18,
    'model.num_heads': 2**10,
    'model.num_kv_heads': 2**10,
    'model.head_dim': 2**12,
    'lora.rank': 2**12,
    'tokenizer.vocab_size': 2**20,
    'data.max_prompt_len': 2**20,
    'data.max_response_len': 2**20,
    'data.synthetic_rows': 10**8,
    'data.eval_rows': 10**8,
    'evaluate.prompts': 10**8,
    'sft.batch_size': 2**20,
    'reward_model.batch_size': 2**20,
    'ppo.batch_size': 2**20,
    'ppo.samples_per_prompt': 2**12,
    'ppo.ppo_epochs': 2**12,
    'ppo.length_buckets': 64,
    'macro.random_repeats': 2**12,
    'macro.parse_workers': 2**12,
}

_AT_LEAST_MINUS_1 = ['model.unroll']  # -1 = auto

# Fields, the bound they keep, and its name.
RANGES: tuple[tuple[list[str], Callable[[Any], bool], str], ...] = (
    (_AT_LEAST_1, lambda v: v >= 1, 'at least 1'),
    (_AT_LEAST_2, lambda v: v >= 2, 'at least 2'),
    (_AT_LEAST_0, lambda v: v >= 0, 'at least 0'),
    (_AT_LEAST_MINUS_1, lambda v: v >= -1, 'at least -1'),
    (_ABOVE_0, lambda v: v > 0, 'above 0'),
    (_UP_TO_1, lambda v: 0 <= v <= 1, 'between 0 and 1'),
    (_BELOW_1, lambda v: 0 <= v < 1, 'at least 0 and below 1'),
    (_BELOW_2_32, lambda v: v < 2**32, 'below 2**32'),
    (_UP_TO_A_MILLION, lambda v: v <= 1e6, 'at most 1e6'),
    (_TEMPERATURES, lambda v: not 0 < v < 1e-4, '0 or at least 1e-4'),
    (['rollout.top_p'], lambda v: not 0 < v < 1e-6, 'at least 1e-6'),
    *(
        ([name], lambda v, most=most: v <= most, f'at most {most}')
        for name, most in _LARGEST.items()
    ),
)


_GEMMA2_FIELDS = (
    'query_pre_attn_scalar',
    'attn_softcap',
    'final_softcap',
    'sliding_window',
)


class ConfigError(ValueError):
  """The config asks for something that cannot be done."""


# Tuples, what each entry must be, and its name.
ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    'data.parts': (
        lambda v: _is_number(v) and 0 <= v < 2**31,
        'numbers of at least 0 and below 2**31',
    ),
    'macro.random_lengths': (
        lambda v: type(v) is int and 1 <= v < 2**31,
        'whole numbers of at least 1 and below 2**31',
    ),
    'profile.steps': (
        lambda v: type(v) is int and v >= 1,
        'whole numbers of at least 1',
    ),
    **{
        name: (lambda v: type(v) is str, 'names')
        for name in ('lora.targets', 'log.sinks', 'stages')
    },
}


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and math.isfinite(value)


def _of_types(flat: dict[str, Any]) -> Iterator[str]:
  """Fields that hold no usable value at all."""
  for name, value in flat.items():
    if isinstance(value, float) and not math.isfinite(value):
      yield f'{name}={value!r} must be a finite number'
    elif isinstance(value, float) and abs(value) > 1e30:
      yield f'{name}={value!r} is too large; it must be at most 1e30 in size'
    elif type(value) is int and name not in _BELOW_2_32 and abs(value) >= 2**31:
      yield f'{name}={value!r} is too large; it must be below 2**31 in size'
  for name, (holds, words) in ENTRIES.items():
    if not all(map(holds, flat[name])):
      yield f'{name}={tuple(flat[name])} must hold {words}'


# Those that take a function of the user's own, `module:function`, too.
_OPEN = ('ppo.advantage', 'macro.termination')


def _of_values(flat: dict[str, Any]) -> Iterator[str]:
  """Fields whose own value is out of range."""
  for name in _OPEN:
    if problem := registry.problem(CHOICES[name], flat[name], name):
      yield problem
  for name, allowed in CHOICES.items():
    if name not in _OPEN and flat[name] not in allowed:
      words = ', '.join(map(str, allowed))
      yield f'{name}={flat[name]!r} must be one of {words}'
  for names, holds, words in RANGES:
    for name in names:
      if not holds(flat[name]):
        yield f'{name}={flat[name]!r} must be {words}'


def _of_model(c: ConfigDict) -> Iterator[str]:
  m = c.model
  if 'float64' in (m.dtype, m.param_dtype) and not jax.config.jax_enable_x64:
    yield 'model.dtype or param_dtype float64 needs JAX_ENABLE_X64=1 to be set'
  for name in _GEMMA2_FIELDS:
    if m.family == 'gemma' and m[name]:
      yield (
          f"model.{name}={m[name]} must be 0 with model.family='gemma': "
          "Gemma 1 has no such thing, 'gemma2' has"
      )
  if m.num_kv_heads > 0 and m.num_heads % m.num_kv_heads:
    yield (
        f'model.num_kv_heads={m.num_kv_heads} must divide '
        f'model.num_heads={m.num_heads}'
    )
  if m.family == 'gemma2' and m.num_heads and m.embed_dim % m.num_heads:
    yield (
        f'model.num_heads={m.num_heads} must divide model.embed_dim='
        f"{m.embed_dim} with model.family='gemma2': transformers refuses "
        'other files'
    )
  if m.head_dim % 2:
    yield f'model.head_dim={m.head_dim} must be even (rotary halves)'
  if '' == c.tokenizer.path and c.tokenizer.vocab_size < 300:
    yield (
        f'tokenizer.vocab_size={c.tokenizer.vocab_size} must be at least 300: '
        '4 special ids, 256 bytes and some pieces'
    )


def _of_kernel(c: ConfigDict, machine: partition.Machine) -> Iterator[str]:
  """The attention that is asked for; a shape in a folder is checked there."""
  shape = presets.from_config(c.model, 1)
  if c.sft.init and not c.model.preset:
    shape = dataclasses.replace(shape, attn_softcap=0, head_dim=128)
  shape = dataclasses.replace(shape, dtype=c.model.dtype)
  reason = kernels.refusal(c.model.attention, shape, machine)
  if reason:
    yield f"model.attention={c.model.attention!r}: {reason}; use 'auto'"
  if c.model.attention in ('auto', 'xla'):
    return
  for field, value in config_lib.LOSSES_ON_PADDING.items():
    stage, _, name = field.partition('.')
    if c[stage][name] == value:
      yield (
          f'model.attention={c.model.attention!r} with {field}={value!r}: this '
          "loss reads padding, where kernels differ; use 'xla', or 'auto', "
          'which takes xla for this loss alone'
      )


def _of_memory(c: ConfigDict) -> Iterator[str]:
  """What is kept small or elsewhere to fit a device."""
  for name in _OPTIMS:
    block = c[name.split('.')[0]].optim
    for rate in ('b1', 'b2'):
      if block.moment_dtype == 'bfloat16' and (
          block[rate] > optim.MAX_ROUNDED_DECAY
      ):
        yield (
            f'{name}.{rate}={block[rate]} must be at most '
            f"{optim.MAX_ROUNDED_DECAY} with {name}.moment_dtype='bfloat16': "
            'smaller changes of a moment are lost in its 8 bits'
        )
  if c.model.frozen_memory != 'host':
    return
  if c.lora.rank:
    yield (
        "model.frozen_memory='host' must be 'device' with lora.rank="
        f'{c.lora.rank}: what learns shares the weights of what does not'
    )
  if not partition.has_host_memory():
    yield (
        "model.frozen_memory='host': programs on this "
        f'{partition.platform()} cannot read the memory of the host (it has no '
        f"{partition.MEMORIES['host']!r} memory); use 'device'"
    )


def _of_lora(c: ConfigDict) -> Iterator[str]:
  unknown = set(c.lora.targets) - set(config_lib.KERNELS)
  if unknown or not c.lora.targets:
    yield (
        f'lora.targets={tuple(c.lora.targets)} must hold some of '
        f'{", ".join(config_lib.KERNELS)}'
    )


def _of_batches(c: ConfigDict, num_devices: int) -> Iterator[str]:
  """Batches must split evenly into micro-batches and over devices."""
  rows = c.ppo.batch_size * c.ppo.samples_per_prompt
  minibatch = rows // max(1, c.ppo.minibatches)
  if c.ppo.kl_target and rows >= rewards.most_responses(c.ppo.kl_horizon):
    yield (
        f'ppo.kl_horizon={c.ppo.kl_horizon} must be above '
        f'{rewards.MAX_KL_ERROR * rows:g}, a fifth of the {rows} responses of a'
        ' step (ppo.batch_size * ppo.samples_per_prompt), with ppo.kl_target='
        f'{c.ppo.kl_target}: one step of a small KL would make the coefficient '
        f'0, and it would stay 0; {10 * rows} changes it by at most 2 % a step'
    )
  if rows % max(1, c.ppo.minibatches):
    yield (
        f'ppo.minibatches={c.ppo.minibatches} must divide '
        f'ppo.batch_size * ppo.samples_per_prompt = {rows}'
    )
  for field, part, whole in (
      ('sft.micro_batch_size', c.sft.micro_batch_size, c.sft.batch_size),
      (
          'reward_model.micro_batch_size',
          c.reward_model.micro_batch_size,
          c.reward_model.batch_size,
      ),
      ('ppo.micro_batch_size', c.ppo.micro_batch_size, minibatch),
      ('rollout.batch_size', c.rollout.batch_size, rows),
  ):
    part = part or whole
    if part < 1 or whole % part:
      yield f'{field}={part} must divide the {whole} sequences it is a part of'
    elif part % num_devices:
      yield (
          f'{field}={part} (0 = all of them) must be a multiple of the '
          f'{num_devices} devices that share a batch (mesh.data * mesh.fsdp)'
      )
  if c.ppo.batch_size % num_devices:
    yield (
        f'ppo.batch_size={c.ppo.batch_size} must be a multiple of the '
        f'{num_devices} devices that share a batch'
    )


def _of_data(c: ConfigDict) -> Iterator[str]:
  d = c.data
  if d.task != 'synthetic' and not d.path:
    yield f'data.path is empty; data.task={d.task!r} needs a file or a hub name'
  if len(d.parts) != 3 or not sum(d.parts):
    yield f'data.parts={tuple(d.parts)} must be three shares, not all 0'
  if d.task not in ('synthetic',) and 'gold' in c.checkpoint.best_metric.ppo:
    yield (
        f'checkpoint.best_metric.ppo={c.checkpoint.best_metric.ppo!r}: no true '
        f'quality is known in data.task={d.task!r}'
    )
  if d.task in config_lib.TASK_LENGTHS:
    prompt, response = config_lib.lengths(c)
    if prompt < 2 or response < 2:
      yield 'data.max_prompt_len and data.max_response_len must be at least 2'
    if c.rollout.min_new_tokens >= response:
      yield (
          f'rollout.min_new_tokens={c.rollout.min_new_tokens} must be below '
          f'the response limit of {response} tokens'
      )


def _of_stages(c: ConfigDict) -> Iterator[str]:
  unknown = [s for s in c.stages if s not in _STAGES]
  in_order = sorted(set(c.stages) - set(unknown), key=_STAGES.index)
  if unknown or list(c.stages) != in_order:
    yield f'stages={tuple(c.stages)} must be some of {_STAGES}, in this order'
  if c.rollout.temperature < 0.01 and 'ppo' in c.stages:
    yield (
        f'rollout.temperature={c.rollout.temperature} draws (almost) greedily; '
        'PPO needs samples, at 0.01 or above'
    )
  if len(c.profile.steps) not in (0, 2) or list(c.profile.steps) != sorted(
      c.profile.steps
  ):
    yield f'profile.steps={tuple(c.profile.steps)} must be () or (first, last)'
  sinks = set(c.log.sinks) - {'jsonl', 'tensorboard', 'wandb'}
  if sinks:
    yield f'log.sinks has {sorted(sinks)}; known: jsonl, tensorboard, wandb'
  if not c.macro.random_lengths:
    yield 'macro.random_lengths is empty; it must hold lengths in tokens'
  if not (0 <= c.critic.gae_lambda <= 1 or c.critic.gae_lambda == -1):
    yield (
        f'critic.gae_lambda={c.critic.gae_lambda} must be between 0 and 1, or '
        '-1 for that of ppo'
    )


def problems(
    config: ConfigDict,
    num_devices: int = 1,
    machine: partition.Machine | None = None,
) -> list[str]:
  """Everything that is wrong with a config, one line each.

  Args:
    config: see `config.base`.
    num_devices: devices that share a batch.
    machine: to run on; None = this one.
  """
  flat = config_lib.flatten(config)
  found = list(_of_types(flat))
  if found:  # the other checks compute with the values
    return found
  found += _of_values(flat)
  found += _of_model(config)
  if config.model.preset in CHOICES['model.preset']:
    found += _of_kernel(config, machine or partition.machine())
  found += functions.problems(config)
  found += _of_lora(config)
  found += _of_memory(config)
  found += _of_data(config)
  found += _of_stages(config)
  found += switches.problems(flat)
  if all(config[s].batch_size > 0 for s in ('sft', 'reward_model', 'ppo')):
    found += _of_batches(config, num_devices)
  return found


def validate(
    config: ConfigDict,
    num_devices: int = 1,
    machine: partition.Machine | None = None,
) -> None:
  """Raises `ConfigError` with all `problems`, or returns."""
  found = problems(config, num_devices, machine)
  if found:
    raise ConfigError(
        f'{len(found)} problem(s) in the config:\n  ' + '\n  '.join(found)
    )


def warnings(config: ConfigDict) -> list[str]:
  """What is allowed but biases or weakens the training, one line each."""
  r, found = config.rollout, []
  if config.model.param_dtype == 'bfloat16':
    found.append(
        'model.param_dtype=bfloat16: a weight keeps 8 bits, so that updates '
        "below 0.4 % of it are lost; 'float32' with model.dtype=bfloat16 "
        'computes in bfloat16 as well'
    )
  if r.top_k or r.top_p < 1 or r.min_new_tokens:
    found.append(
        f'rollout.top_k={r.top_k}, top_p={r.top_p}, min_new_tokens='
        f'{r.min_new_tokens}: responses are drawn from a filtered distribution '
        'and trained as if drawn from the whole one, which biases the gradient;'
        ' watch sampler/kl and sampler/cut_mass. objective/kl and eval/kl are '
        'not the KL of the policies then, eval/policy_kl is'
    )
  if config.ppo.logprob_temperature not in (0, r.temperature):
    found.append(
        f'ppo.logprob_temperature={config.ppo.logprob_temperature} differs from'
        f' rollout.temperature={r.temperature}: the ratio is not that of the '
        'sampling distribution, which biases the gradient; watch sampler/kl'
    )
  machine, dtype = partition.machine(), config.model.dtype
  if dtype == 'bfloat16' and (9,) > (machine.capability or (9,)) < (8, 0):
    found.append(
        'model.dtype=bfloat16: this GPU (compute capability {}.{}) has no '
        'matmuls in bfloat16, which begin with 8.0; they are made in float32, '
        'so that memory is saved, but no time'.format(*machine.capability)
    )
  return found + switches.warnings(config)
