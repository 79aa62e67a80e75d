"""The third stage: policy and critic against a reward model."""

from typing import Any

from ma_rlhf_jax.ppo import step
from ma_rlhf_jax.ppo.host import Host
from ma_rlhf_jax.ppo.programs import Programs
from ma_rlhf_jax.structs import Models
from ma_rlhf_jax.training import judge
from ma_rlhf_jax.training.loop import Stage
from ma_rlhf_jax.training.run import Run


class PPO(Stage):
  """MA-PPO; what it does in a step: `ppo.step`.

  Attributes:
    configs: `GemmaConfig` of the four models.
    programs: of a step.
  """

  def __init__(self, run: Run, configs: Models, params: Models):
    super().__init__(run, 'ppo', run.config.ppo, run.data.ppo)
    self.shown = ('objective/score', 'objective/kl', 'response/length')
    self.configs = configs
    self.programs = Programs(
        run.spec,
        configs,
        params,
        self.num_steps,
        Host(run.host_termination(), run.text_reward(run.data.ppo)),
    )
    self.states = self.programs.init_states(params)

  def params(self, states: dict) -> Models:
    """The parameters of the four models."""
    return self.programs.models(states)

  def step(self, states: dict, index: int) -> tuple[dict, dict[str, Any]]:
    prompts = judge.prompt_batch(
        self.run, self.data, self.rows(index), self.config.samples_per_prompt
    )
    return step.take(self.programs, states, prompts, index)

  def _judge(self, states: dict, num_prompts: int) -> judge.Judged:
    params = self.params(states)

    def model(name: str) -> judge.Model | None:
      of_name = getattr(params, name)
      config = getattr(self.configs, name)
      return None if of_name is None else judge.Model(config, of_name)

    return judge.judge(
        self.run,
        model('policy'),
        num_prompts=num_prompts,
        stream='evaluate',
        temperature=self.run.config.rollout.temperature,
        ref_policy=model('ref_policy'),
        reward_model=model('reward_model'),
    )

  def evaluate(self, states: dict) -> dict[str, float]:
    self._judged = self._judge(states, self.run.spec.rows)  # one rollout
    means = self._judged.means()
    return {f'eval/{name}': value for name, value in means.items()}

  def samples(self, states: dict) -> str:
    del states  # those of the evaluation just before
    return self._judged.table(self.run.config.log.samples)

  def best_value(self, metrics: dict[str, float]) -> float | None:
    if metrics['eval/kl'] > self.config.max_kl:
      return None
    return super().best_value(metrics)
