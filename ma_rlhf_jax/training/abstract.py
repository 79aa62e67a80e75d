"""The stages of a run without weights: for tracing, compiling and planning."""

from ma_rlhf_jax.models import heads, lora, presets
from ma_rlhf_jax.structs import Params
from ma_rlhf_jax.training.experience import Models
from ma_rlhf_jax.training.loop import Stage
from ma_rlhf_jax.training.ppo import PPO
from ma_rlhf_jax.training.reward_model import RewardModel
from ma_rlhf_jax.training.run import Run
from ma_rlhf_jax.training.sft import SFT


def _model(
    kind: str, shape: presets.GemmaConfig
) -> tuple[presets.GemmaConfig, Params]:
  return shape, heads.abstract_params(kind, shape)


def _learning(
    kind: str, shape: presets.GemmaConfig, frozen: Params | None
) -> tuple[presets.GemmaConfig, Params]:
  """A model that learns; its adapters share the weights of `frozen`."""
  _, params = _model(kind, shape)
  if shape.lora is not None and frozen is not None:
    _, adapters = lora.split(shape, params)
    params = lora.join(frozen, adapters)
  return shape, params


def _ppo(
    run: Run, learns: presets.GemmaConfig, frozen: presets.GemmaConfig
) -> PPO:
  ref_policy, reward_model = (
      _model(kind, frozen) for kind in ('policy', 'scalar')
  )
  critic = (None, None)
  if run.config.ppo.baseline == 'critic':
    apart = run.config.ppo.critic_init
    critic = _learning('scalar', learns, None if apart else reward_model[1])
  models = Models(
      policy=_learning('policy', learns, ref_policy[1]),
      ref_policy=ref_policy,
      critic=critic,
      reward_model=reward_model,
  )
  shapes, params = zip(*models, strict=True)
  return PPO(run, Models(*shapes), Models(*params))


def abstract_stages(run: Run) -> dict[str, Stage]:
  """The stages of the config with `jax.ShapeDtypeStruct` for parameters.

  They can give their `programs`, and nothing else. All models have the shape of
  `config.model`; shardings are those of the mesh of `jax.set_mesh`.
  """
  config = run.config
  shape = presets.from_fields(config.model, len(run.tokenizer))
  learns = presets.trained(shape, config)
  frozen = presets.frozen(shape, config.model)
  start = (
      learns if config.sft.init else presets.trained_whole(shape, config.model)
  )
  makers = {
      'sft': lambda: SFT(run, *_model('policy', start)),
      'reward_model': lambda: RewardModel(run, *_model('scalar', learns)),
      'ppo': lambda: _ppo(run, learns, frozen),
  }
  return {n: make() for n, make in makers.items() if n in config.stages}
