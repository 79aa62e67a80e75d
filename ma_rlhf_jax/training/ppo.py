"""MA-PPO: rollouts, experience, and the updates of policy and critic."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from ma_rlhf_jax import masking
from ma_rlhf_jax.macro import host
from ma_rlhf_jax.models import lora
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.objective import losses, rewards, targets
from ma_rlhf_jax.parallel.mesh import abstract, own_part, place
from ma_rlhf_jax.rollout import sampling, scoring
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    LossWeights,
    Params,
    Rollout,
    TrainState,
)
from ma_rlhf_jax.training import checkpoint, judge, optim, update
from ma_rlhf_jax.training.experience import (
    Models,
    make_experience,
    score_sequences,
)
from ma_rlhf_jax.training.loop import Program, Stage
from ma_rlhf_jax.training.run import Run

Batch = tuple[Experience, LossWeights]


def policy_loss_fn(
    params: Params,
    batch: Batch,
    *,
    shape: GemmaConfig,
    clip_eps: float,
    ratio: str,
    temperature: float,
    chunk_tokens: int,
) -> tuple[Array, dict[str, Array]]:
  """The clipped surrogate on a (micro-)batch, and its metrics."""
  experience, weights = batch
  logprobs_BT, _ = scoring.response_logprobs(
      shape,
      params,
      experience.sequences,
      temperature=temperature,
      chunk_tokens=chunk_tokens,
  )
  return losses.policy_loss(
      logprobs_BT,
      experience.scored.logprobs_BT,
      experience.targets.advantages_BT,
      weights,
      experience.macro,
      clip_eps=clip_eps,
      ratio=ratio,
  )


def value_loss_fn(
    params: Params, batch: Batch, *, shape: GemmaConfig, config: ConfigDict
) -> tuple[Array, dict[str, Array]]:
  """The critic's loss on a (micro-)batch, and its metrics."""
  experience, weights = batch
  return losses.value_loss(
      scoring.response_values(shape, params, experience.sequences),
      experience.scored.values_BT,
      experience.targets.returns_BT,
      weights,
      targets.critic_mask(experience.macro, critic_target=config.target),
      clip_eps=config.clip_eps,
  )


_host_metrics = jax.jit(host.metrics)


def update_on(
    state: TrainState,
    frozen: Params,
    experience: Experience,
    key: Array,
    *,
    loss_fn: update.LossFn,
    weigh: Callable[[Experience], LossWeights],
    optimizer: optax.GradientTransformation,
    ppo: ConfigDict,
) -> tuple[TrainState, dict[str, Array]]:
  """`ppo_epochs` passes over the experience, in `minibatches` updates each.

  Args:
    state: of the policy or of the critic.
    frozen: the parameters of that model that do not learn, see `models.lora`.
    experience: all rows of the step.
    key: orders the rows of each pass; used only with several minibatches.
    loss_fn: takes (params, (experience, weights)), params being all of them.
    weigh: the weights of the tokens of one minibatch.
    optimizer: of this model.
    ppo: `config.ppo`.

  Returns:
    The new state, and metrics averaged over the updates.
  """
  rows = experience.macro.ids_BT.shape[0]
  size = rows // ppo.minibatches

  def one(state: TrainState, batch: Experience) -> tuple[TrainState, dict]:
    return update.train_step(
        state,
        (batch, weigh(batch)),
        loss_fn=lambda learning, batch: loss_fn(
            lora.join(frozen, learning), batch
        ),
        optimizer=optimizer,
        num_micro=update.num_micro(size, ppo.micro_batch_size),
    )

  if ppo.ppo_epochs * ppo.minibatches == 1:
    return one(state, experience)
  orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(
      jax.random.split(key, ppo.ppo_epochs)
  ).reshape(-1, size)
  take = lambda order: jax.tree.map(lambda x: x[order], experience)
  state, metrics = jax.lax.scan(
      lambda state, order: one(state, take(order)), state, orders
  )
  return state, jax.tree.map(jnp.mean, metrics)


class PPO(Stage):
  """The third stage: policy and critic against a reward model."""

  def __init__(self, run: Run, shapes: Models, params: Models):
    super().__init__(run, 'ppo', run.config.ppo, run.data.ppo)
    config, c = run.config, self.config
    self.shown = ('objective/score', 'objective/kl', 'response/length')
    self.shapes = shapes
    self.ref_policy = params.ref_policy
    self.reward_model = params.reward_model
    # Optimizer updates of policy and critic in one step, and in all.
    self._per_step = c.ppo_epochs * c.minibatches
    policy_steps = self.num_steps - c.critic_warmup_updates
    policy_updates = policy_steps * self._per_step
    critic_updates = self.num_steps * self._per_step
    policy_optimizer = optim.make_optimizer(c.optim, policy_updates)
    critic_optimizer = optim.make_optimizer(config.critic.optim, critic_updates)
    self.learning_rates = {
        'policy': optim.learning_rate(c.optim, policy_updates),
        'critic': optim.learning_rate(config.critic.optim, critic_updates),
    }
    # What does not learn of policy and critic.
    self.frozen = {}
    self.frozen['policy'], learning = lora.split(shapes.policy, params.policy)
    self.states = {
        'policy': update.init_state(learning, policy_optimizer),
        'kl_coef': update.on_mesh_of(
            learning, jnp.asarray(c.kl_coef, jnp.result_type(float))
        ),
    }
    if c.baseline == 'critic':
      self.frozen['critic'], learning = lora.split(shapes.critic, params.critic)
      self.states['critic'] = update.init_state(learning, critic_optimizer)
    self._host = run.host_termination()
    self._make_programs()
    self._make_updates(policy_optimizer, critic_optimizer)

  def _make_programs(self) -> None:
    run, c, shapes = self.run, self.config, self.shapes
    num_rows = run.rows
    # The evaluation runs the same program.
    self._rollout = functools.partial(
        judge.sample_responses,
        shape=shapes.policy,
        settings=run.sampling(),
        num_rollouts=update.num_micro(num_rows, run.config.rollout.batch_size),
    )
    self._score = jax.jit(
        functools.partial(
            score_sequences,
            shapes,
            temperature=run.logprob_temperature,
            chunk_tokens=run.config.model.logprob_chunk,
            num_micro=update.num_micro(num_rows, c.micro_batch_size),
        )
    )
    self._experience = jax.jit(
        functools.partial(make_experience, config=run.config)
    )
    self._adapt = jax.jit(
        functools.partial(
            rewards.adapted_kl_coef,
            target=c.kl_target,
            horizon=c.kl_horizon,
            responses=num_rows,
        )
    )

  def _make_updates(
      self,
      policy_optimizer: optax.GradientTransformation,
      critic_optimizer: optax.GradientTransformation,
  ) -> None:
    run, c, shapes = self.run, self.config, self.shapes
    self._update_policy = jax.jit(
        functools.partial(
            update_on,
            loss_fn=functools.partial(
                policy_loss_fn,
                shape=shapes.policy,
                clip_eps=c.clip_eps,
                ratio=c.ratio,
                temperature=run.logprob_temperature,
                chunk_tokens=run.config.model.logprob_chunk,
            ),
            weigh=lambda batch: losses.loss_weights(
                batch.macro.mask_BT,
                batch.macro.starts_BT,
                reduction=c.loss_reduction,
            ),
            optimizer=policy_optimizer,
            ppo=c,
        ),
        donate_argnums=0,
    )
    critic = run.config.critic
    self._update_critic = jax.jit(
        functools.partial(
            update_on,
            loss_fn=functools.partial(
                value_loss_fn, shape=shapes.critic, config=critic
            ),
            weigh=lambda batch: losses.loss_weights(
                targets.critic_mask(batch.macro, critic_target=critic.target),
                batch.macro.starts_BT,
                reduction=c.loss_reduction,
            ),
            optimizer=critic_optimizer,
            ppo=c,
        ),
        donate_argnums=0,
    )

  def programs(self) -> dict[str, Program]:
    states, frozen, models = checkpoint.abstract_of(
        (self.states, self.frozen, self.params(self.states))
    )
    programs = {}

    def add(name: str, function: Callable[..., Any], *args: Any) -> Any:
      """Shapes of what the program gives, a batch over the devices."""
      programs[name] = Program(function, args)
      made = jax.eval_shape(function, *args)
      batch = made[0] if isinstance(made, tuple) else made
      return abstract(batch, self.run.mesh)

    prompts = self.run.abstract_prompts(self.run.rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    split = lambda: jax.random.split(jax.random.key(0), self.run.rows)
    rollout = add('ppo/rollout', self._rollout, models.policy, prompts, key, 0)
    scored = add('ppo/score', self._score, models, rollout.sequences)
    given_BT = rollout.sequences.response_mask_BT if self._host else None
    experience = add(
        'ppo/experience',
        self._experience,
        rollout,
        scored,
        abstract(jax.eval_shape(split), self.run.mesh),
        states['kl_coef'],
        given_BT,
    )
    for name, function in (
        ('policy', self._update_policy),
        ('critic', self._update_critic),
    ):
      if name in states:
        args = (states[name], frozen[name], experience, key)
        programs[f'ppo/update_{name}'] = Program(function, args)
    return programs

  def params(self, states: dict) -> Models:
    """The parameters of the four models."""
    trained = {
        name: lora.join(frozen, states[name].params)
        for name, frozen in self.frozen.items()
    }
    return Models(
        policy=trained['policy'],
        ref_policy=self.ref_policy,
        critic=trained.get('critic'),
        reward_model=self.reward_model,
    )

  def _starts(self, rollout: Rollout) -> tuple[Array | None, dict[str, Array]]:
    """Where a rule of the host opens macro actions, and its metrics.

    Each host reads the rows of its own devices.
    """
    if self._host is None:
      return None, {}
    rows, mesh = rollout.sequences, self.run.mesh
    starts_BT, counts_B = place(
        self._host(
            own_part(masking.response_tokens(rows), mesh),
            own_part(rows.response_mask_BT, mesh),
        ),
        mesh,
        self.run.rows,
    )
    return starts_BT, _host_metrics(counts_B)

  def step(self, states: dict, index: int) -> tuple[dict, dict[str, Any]]:
    run = self.run
    prompts = judge.prompt_batch(
        run, self.data, self.rows(index), self.config.samples_per_prompt
    )
    with jax.profiler.TraceAnnotation('rollout'):
      rollout = self._rollout(
          self.params(states).policy, prompts, run.key('rollout'), index
      )
    macro_keys_B = sampling.row_keys(
        run.key('macro'), index, prompts.prompt_ids_B, prompts.sample_ids_B
    )
    with jax.profiler.TraceAnnotation('score'):
      scored = self._score(self.params(states), rollout.sequences)
      given_BT, told = self._starts(rollout)  # while the devices score
      experience, metrics = self._experience(
          rollout, scored, macro_keys_B, states['kl_coef'], given_BT
      )
    metrics |= told
    key = jax.random.fold_in(run.key('minibatches'), index)
    with jax.profiler.TraceAnnotation('update'):
      new, learned = dict(states), {}
      if index >= self.config.critic_warmup_updates:
        new['policy'], learned['policy'] = self._update_policy(
            states['policy'], self.frozen['policy'], experience, key
        )
      if 'critic' in states:
        new['critic'], learned['critic'] = self._update_critic(
            states['critic'], self.frozen['critic'], experience, key
        )
    if self.config.kl_target:
      new['kl_coef'] = self._adapt(states['kl_coef'], metrics['objective/kl'])
    for model, found in learned.items():
      metrics[f'loss/{model}'] = found.pop('loss')
      done = new[model].step - self._per_step  # before this step
      metrics[f'{model}/lr'] = self.learning_rates[model](done)
      metrics |= {f'{model}/{name}': value for name, value in found.items()}
    return new, metrics

  def _judge(self, states: dict, num_prompts: int) -> judge.Judged:
    model = lambda name: judge.Model(
        getattr(self.shapes, name), getattr(self.params(states), name)
    )
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
    self._judged = self._judge(states, self.config.batch_size)
    means = self._judged.means()
    return {f'eval/{name}': value for name, value in means.items()}

  def samples(self, states: dict) -> str:
    del states  # those of the evaluation just before
    return self._judged.table(self.run.config.log.samples)

  def best_value(self, metrics: dict[str, float]) -> float | None:
    if metrics['eval/kl'] > self.config.max_kl:
      return None
    return super().best_value(metrics)
