"""What PPO optimises: the numbers and choices in its equations."""

import dataclasses
from typing import Any, Self

from ml_collections import ConfigDict


def _field(name: str) -> Any:
  return dataclasses.field(metadata={'config': name})


@dataclasses.dataclass(frozen=True)
class Objective:
  """The settings of rewards, estimation and losses; hashable.

  `config.base()` says what each is, with unit and source. A setting of a new
  estimator is a line there and a line here.

  Example:
    paper = Objective.from_config(config.base())
    undiscounted = dataclasses.replace(paper, gamma=1.0, gae_lambda=1.0)
  """

  gamma: float = _field('ppo.gamma')
  gae_lambda: float = _field('ppo.gae_lambda')
  critic_lambda: float = _field('critic.gae_lambda')  # < 0: gae_lambda
  discount: str = _field('ppo.discount')
  pool_rewards: str = _field('macro.reward')
  pool_values: str = _field('macro.value')
  advantage: str = _field('ppo.advantage')
  critic_target: str = _field('critic.target')
  baseline: str = _field('ppo.baseline')
  samples_per_prompt: int = _field('ppo.samples_per_prompt')
  whiten_advantages: bool = _field('ppo.whiten_advantages')
  score_clip: float = _field('ppo.score_clip')
  ratio: str = _field('ppo.ratio')
  loss_reduction: str = _field('ppo.loss_reduction')
  clip_eps: float = _field('ppo.clip_eps')
  value_clip_eps: float = _field('critic.clip_eps')

  @classmethod
  def from_config(cls, config: ConfigDict) -> Self:
    """The settings that a whole config holds."""
    values = {}
    for field in dataclasses.fields(cls):
      block, name = field.metadata['config'].split('.')
      values[field.name] = config[block][name]
    return cls(**values)

  @property
  def of_critic(self) -> Self:
    """The same with the critic's lambda as `gae_lambda`."""
    own = self.critic_lambda >= 0
    gae_lambda = self.critic_lambda if own else self.gae_lambda
    return dataclasses.replace(self, gae_lambda=gae_lambda)
