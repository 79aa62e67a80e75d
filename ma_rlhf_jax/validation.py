"""Checks of a config before any device work: every problem in one message."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from ma_rlhf_jax import config as config_lib
from ma_rlhf_jax import switches
from ma_rlhf_jax.config_fields import FIELDS
from ma_rlhf_jax.data import tasks
from ma_rlhf_jax.models import kernels, presets
from ma_rlhf_jax.objective import rewards
from ma_rlhf_jax.parallel import mesh, partition
from ma_rlhf_jax.scorers import functions
from ma_rlhf_jax.training import metrics, optim, sources

_OPTIMS = ('sft.optim', 'reward_model.optim', 'ppo.optim', 'critic.optim')
_GEMMA2_FIELDS = (
    'query_pre_attn_scalar attn_softcap final_softcap sliding_window'.split()
)


class ConfigError(ValueError):
  """The config asks for something that cannot be done."""


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
  if c.rollout.temperature < 0.01 and 'ppo' in c.stages:
    yield (
        f'rollout.temperature={c.rollout.temperature} draws (almost) greedily; '
        'PPO needs samples, at 0.01 or above'
    )
  if d.task != 'synthetic' and not d.path:
    yield f'data.path is empty; data.task={d.task!r} needs a file or a hub name'
  if d.task != 'synthetic' and 'gold' in c.checkpoint.best_metric.ppo:
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
  found = [field.problem(name, flat[name]) for name, field in FIELDS.items()]
  found = [line for line in found if line]
  found += _of_model(config)
  if not FIELDS['model.preset'].problem('', config.model.preset):
    found += _of_kernel(config, machine or partition.machine())
  found += functions.problems(config)
  found += _of_memory(config)
  found += _of_data(config)
  found += switches.problems(flat)
  if all(config[s].batch_size > 0 for s in ('sft', 'reward_model', 'ppo')):
    found += _of_batches(config, num_devices)
  return found


def problems_here(config: ConfigDict) -> list[str]:
  """`problems` on the devices there are, and what keeps a run from starting.

  Everything that the config alone decides; no file is read.
  """
  shape, uncovered = _outcome(mesh.shape_here, config.mesh)
  data, fsdp, tensor = shape or (1, 1, 1)
  found = problems(config, data * fsdp) + uncovered
  if shape and config.rollout.tensor:
    found += _outcome(mesh.check_decode, shape, config.rollout.tensor)[1]
  found += _outcome(metrics.check_sinks, config.log.sinks)[1]
  return found + unreadable(config)


def unreadable(config: ConfigDict) -> list[str]:
  """A line where the rows of the task cannot be read; plans need none."""
  if FIELDS['data.task'].problem('', config.data.task):
    return []  # no task at all
  return _outcome(tasks.check_task, config.data.task)[1]


def missing_products(config: ConfigDict, done: Sequence[str] = ()) -> list[str]:
  """A line for each product that a stage needs and that nothing gives.

  Args:
    config: see `config.base`.
    done: stages of the run that are done.
  """
  have = [*sources.named_stages(config), *config.stages, *done]
  needs = {
      'reward_model': () if config.reward_model.init else ('sft',),
      'ppo': ('sft', 'reward_model'),
      'evaluate': ('sft', 'reward_model', 'ppo'),
  }
  return [
      f'stage {stage!r} needs the product of {need!r}: list it in stages, or '
      'give ppo.from, ppo.policy_init or ppo.reward_model'
      for stage, needed in needs.items()
      for need in needed
      if stage in config.stages and need not in have
  ]


def _outcome(check: Callable[..., Any], *args: Any) -> tuple[Any, list[str]]:
  """What a check gives, and what it raises, as lines."""
  try:
    return check(*args), []
  except (ValueError, ImportError) as error:
    return None, [str(error)]


def refuse(found: list[str]) -> None:
  """Raises `ConfigError` with all of these problems, or returns."""
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
