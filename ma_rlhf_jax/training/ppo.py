"""MA-PPO: rollouts, experience, and the updates of policy and critic."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ma_rlhf_jax import masking
from ma_rlhf_jax.macro import host
from ma_rlhf_jax.models import lora
from ma_rlhf_jax.objective import rewards
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.parallel.mesh import abstract, own_part, place
from ma_rlhf_jax.rollout import layout as layout_lib
from ma_rlhf_jax.rollout import sampling
from ma_rlhf_jax.structs import (
    Array,
    PromptBatch,
    Rollout,
    Scored,
    SequenceBatch,
    TrainState,
)
from ma_rlhf_jax.training import (
    buckets,
    checkpoint,
    judge,
    one_pass,
    optim,
    ppo_update,
    update,
)
from ma_rlhf_jax.training.experience import (
    Models,
    make_experience,
    score_sequences,
)
from ma_rlhf_jax.training.loop import Program, Stage
from ma_rlhf_jax.training.run import Run
from ma_rlhf_jax.training.shared import Shared

_log = logging.getLogger(__name__)
_host_metrics = jax.jit(host.metrics)


class PPO(Stage):
  """The third stage: policy and critic against a reward model.

  Attributes:
    split: the micro-batches of all rows of a step.
    together: the models that learn in the pass that scores; () = none.
    to_decode: parameters of the policy -> those that `layout.draw` takes.
  """

  def __init__(self, run: Run, shapes: Models, params: Models):
    super().__init__(run, 'ppo', run.config.ppo, run.data.ppo)
    config, c = run.config, self.config
    self.shown = ('objective/score', 'objective/kl', 'response/length')
    self.shapes = shapes
    self.ref_policy, self.reward_model = (
        partition.in_memory(frozen, config.model.frozen_memory)
        for frozen in (params.ref_policy, params.reward_model)
    )
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
    self._make_updates({'policy': policy_optimizer, 'critic': critic_optimizer})

  def _make_programs(self) -> None:
    run, c, shapes = self.run, self.config, self.shapes
    num_rows = run.rows
    self._layout = layout = run.decode_layout(shapes.policy)
    self.to_decode = functools.partial(layout_lib.to_decode, layout=layout)
    # The evaluation runs the same program.
    self._rollout = functools.partial(
        layout_lib.draw,
        layout=layout,
        settings=run.sampling(),
        num_rollouts=update.num_micro(num_rows, run.config.rollout.batch_size),
    )
    split = functools.partial(
        buckets.make_buckets,
        run.prompt_len + run.response_len,
        micro_rows=c.micro_batch_size,
        count=c.length_buckets,
        groups=run.mesh.shape['data'] * run.mesh.shape['fsdp'],
    )
    self.split = split(num_rows)
    self._minibatch_split = split(num_rows // c.minibatches)
    self._logprobs = {
        'temperature': run.logprob_temperature,
        'chunk_tokens': run.config.model.logprob_chunk,
    }

    def score(models: Shared, sequences: SequenceBatch) -> Scored:
      how = {'split': self.split, **self._logprobs}
      return score_sequences(shapes, models.tree, sequences, **how)

    self._score = jax.jit(score)
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
      self, optimizers: dict[str, optax.GradientTransformation]
  ) -> None:
    config, c, shapes = self.run.config, self.config, self.shapes
    loss_fns = {
        'policy': functools.partial(
            ppo_update.policy_loss_fn,
            shape=shapes.policy,
            clip_eps=c.clip_eps,
            ratio=c.ratio,
            **self._logprobs,
        ),
        'critic': functools.partial(
            ppo_update.value_loss_fn, shape=shapes.critic, config=config.critic
        ),
    }
    weights = {
        'policy': ppo_update.policy_weights,
        'critic': ppo_update.critic_weights,
    }
    self._updates = {
        name: jax.jit(
            functools.partial(
                ppo_update.update_on,
                loss_fn=loss_fns[name],
                weigh=lambda batch, name=name: weights[name](
                    batch.macro, config
                ),
                optimizer=optimizers[name],
                ppo=c,
                split=self._minibatch_split,
            ),
            donate_argnums=0,
        )
        for name in self.states
        if name != 'kl_coef'
    }
    # What one pass teaches; nothing where it would not be exact.
    reason = one_pass.why_not(config)
    together = {'joint': ('policy', 'critic'), 'policy': ('policy',)}
    self.together = () if reason else together[c.one_pass]
    _log.info(
        'ppo: %s',
        f'scored before it is learned from ({reason})'
        if reason
        else f'{" and ".join(self.together)} scored and learned in one pass',
    )

    def learn_together(
        states: dict[str, TrainState], others: Shared, *rest: Any
    ) -> tuple[Any, ...]:
      return one_pass.step(
          states,
          *others.tree,
          *rest,
          shapes=shapes,
          config=config,
          optimizers=optimizers,
          split=self.split,
          **self._logprobs,
      )

    self._one_pass = jax.jit(learn_together, donate_argnums=0)

  def programs(self) -> dict[str, Program]:
    states, frozen, models = checkpoint.abstract_of(
        (self.states, self.frozen, self.params(self.states))
    )
    rows, mesh = self.run.rows, self.run.mesh
    key = jax.eval_shape(lambda: jax.random.key(0))
    split = lambda: jax.random.split(jax.random.key(0), rows)
    lay_out, copied = layout_lib.decode_program(models.policy, self._layout)
    policy = layout_lib.abstract_params(models.policy, self._layout)
    prompts = self.run.abstract_prompts(rows)
    programs = {}
    if copied:
      programs['ppo/reshard'] = Program(lay_out, (copied,))
    draw = policy, prompts, key, 0
    programs['ppo/rollout'] = Program(self._rollout, draw)
    rollout, scored = self.run.abstract_rollout(rows)
    given_BT = rollout.sequences.response_mask_BT if self._host else None
    keys_B = abstract(jax.eval_shape(split), mesh)
    told = keys_B, states['kl_coef'], given_BT
    args = (rollout, scored, *told)
    made, _ = jax.eval_shape(self._experience, *args)
    experience = abstract(made, mesh)
    if self.together:
      one = self._one_pass_args(states, frozen, models, rollout, *told)
      programs['ppo/one_pass'] = Program(self._one_pass, one)
    else:
      read = (Shared(models), rollout.sequences)
      programs['ppo/score'] = Program(self._score, read)
      programs['ppo/experience'] = Program(self._experience, args)
    for name, function in self._updates.items():
      if name not in self.together:
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

  def _one_pass_args(
      self, states: dict, frozen: dict, models: Models, *rest: Any
  ) -> tuple[Any, ...]:
    """Arguments of `_one_pass`."""
    only = lambda tree: {name: tree[name] for name in self.together}
    fixed = models._replace(**dict.fromkeys(self.together))
    return only(states), Shared((only(frozen), fixed)), *rest

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
    prompts = judge.prompt_batch(
        self.run, self.data, self.rows(index), self.config.samples_per_prompt
    )
    rollout = self.respond(states, prompts, index)
    return self.learn(states, prompts, rollout, index)

  def respond(self, states: dict, prompts: PromptBatch, index: int) -> Rollout:
    """Responses of the policy to the prompts of one step."""
    with jax.profiler.TraceAnnotation('rollout'):
      policy = self.to_decode(self.params(states).policy)
      return self._rollout(policy, prompts, self.run.key('rollout'), index)

  def score(self, states: dict, rollout: Rollout) -> Scored:
    """What the four models say about responses, apart from learning."""
    with jax.profiler.TraceAnnotation('score'):
      return self._score(Shared(self.params(states)), rollout.sequences)

  def learn(
      self, states: dict, prompts: PromptBatch, rollout: Rollout, index: int
  ) -> tuple[dict, dict[str, Any]]:
    """The states after the updates of one step, and its metrics."""
    run = self.run
    macro_keys_B = sampling.row_keys(
        run.key('macro'), index, prompts.prompt_ids_B, prompts.sample_ids_B
    )
    # Then the policy does not learn, and its KL says nothing of kl_coef.
    warming_up = index < self.config.critic_warmup_updates
    together = () if warming_up else self.together
    new, learned = dict(states), {}
    if together:
      given_BT, told = self._starts(rollout)
      with jax.profiler.TraceAnnotation('one_pass'):
        made, experience, metrics, learned = self._one_pass(
            *self._one_pass_args(
                states,
                self.frozen,
                self.params(states),
                rollout,
                macro_keys_B,
                states['kl_coef'],
                given_BT,
            )
        )
      new |= made
    else:
      scored = self.score(states, rollout)
      given_BT, told = self._starts(rollout)  # while the devices score
      experience, metrics = self._experience(
          rollout, scored, macro_keys_B, states['kl_coef'], given_BT
      )
    metrics |= told
    key = jax.random.fold_in(run.key('minibatches'), index)
    with jax.profiler.TraceAnnotation('update'):
      for name, update_on in self._updates.items():
        waits = name == 'policy' and warming_up
        if name not in together and not waits:
          new[name], learned[name] = update_on(
              states[name], self.frozen[name], experience, key
          )
    if self.config.kl_target and not warming_up:
      new['kl_coef'] = self._adapt(states['kl_coef'], metrics['objective/kl'])
    for model, found in learned.items():
      # A loss per macro action sums the tokens of each, `constant` counts pads:
      # only divided by their weight is it what the metric says.
      metrics[f'loss/{model}'] = found.pop('loss') / found.pop('weight')
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
    self._judged = self._judge(states, self.run.rows)  # one rollout
    means = self._judged.means()
    return {f'eval/{name}': value for name, value in means.items()}

  def samples(self, states: dict) -> str:
    del states  # those of the evaluation just before
    return self._judged.table(self.run.config.log.samples)

  def best_value(self, metrics: dict[str, float]) -> float | None:
    if metrics['eval/kl'] > self.config.max_kl:
      return None
    return super().best_value(metrics)
