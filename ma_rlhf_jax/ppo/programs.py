"""The programs of a PPO step: what is jitted, with which shapes, and donated.

Made from config, devices, lengths, token ids and parameters, which may be
abstract: then the programs can be traced and compiled, but not run.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from ma_rlhf_jax.macro import host as host_rules
from ma_rlhf_jax.macro import termination
from ma_rlhf_jax.models import lora
from ma_rlhf_jax.objective import rewards
from ma_rlhf_jax.objective.advantage import Objective
from ma_rlhf_jax.objective.targets import BASELINES
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.parallel.mesh import abstract
from ma_rlhf_jax.ppo import learn, metrics, step
from ma_rlhf_jax.ppo.host import Asked, Host, HostAnswers
from ma_rlhf_jax.ppo.method import Method
from ma_rlhf_jax.rollout import layout as layout_lib
from ma_rlhf_jax.rollout import sampling
from ma_rlhf_jax.scorers import functions
from ma_rlhf_jax.structs import (
    Array,
    Experience,
    Models,
    PromptBatch,
    Rollout,
    Scored,
)
from ma_rlhf_jax.training import buckets, checkpoint, optim, update
from ma_rlhf_jax.training.shared import Shared
from ma_rlhf_jax.training.spec import Program, Spec

_log = logging.getLogger(__name__)

# config.ppo.one_pass -> the models that learn in the pass that scores.
_FUSED = {'joint': ('policy', 'critic'), 'policy': ('policy',), 'off': ()}


def why_not_fused(config: ConfigDict) -> str:
  """Why scoring and learning in one pass would not be exact; '' = it is.

  A row must not depend on others, nor what it counts in the loss on the pass.
  """
  c = config.ppo
  rule = config.macro.termination
  asks = termination.TerminationSettings.from_config(config.macro).asks_models
  reasons = {
      f'ppo.one_pass={c.one_pass}': c.one_pass == 'off',
      f'ppo.ppo_epochs={c.ppo_epochs}': c.ppo_epochs > 1,
      f'ppo.minibatches={c.minibatches}': c.minibatches > 1,
      'ppo.whiten_advantages': c.whiten_advantages,
      f'ppo.baseline={c.baseline}': not BASELINES[c.baseline].has_critic,
      f'ppo.loss_reduction=macro with macro.termination={rule}': asks
      and c.loss_reduction == 'macro',
      f'critic.target=starts with macro.termination={rule}': asks
      and config.critic.target == 'starts',
  }
  return ', '.join(reason for reason, holds in reasons.items() if holds)


class Programs:
  """What a step runs, beside what it is given.

  Attributes:
    spec: what they are made from.
    method: what their numerics are fixed by.
    fixed: parameters of reference and reward model.
    frozen: those of policy and critic that do not learn, see `models.lora`.
    abstract_states: shapes of what is trained.
    to_decode: parameters of the policy -> those that `rollout` takes.
    rollout: (parameters, prompts, key, index) -> responses.
    split: the micro-batches of all rows of a step.
    fused_models: those that learn in the pass that scores; () = none.
  """

  def __init__(
      self,
      spec: Spec,
      configs: Models,
      params: Models,
      num_steps: int,
      host: Host = Host(),  # noqa: B008 - it is frozen
  ):
    """Traces nothing yet.

    Args:
      spec: see there.
      configs: `GemmaConfig` of the four models; no critic under a baseline
        that has none.
      params: their parameters, real or abstract; those of policy and critic
        are where they start from.
      num_steps: updates in all.
      host: what is asked of it; not for compiling.
    """
    config = spec.config
    self.spec, self._host = spec, host
    self.method = Method(
        configs,
        Objective.from_config(config),
        termination.TerminationSettings.from_config(config.macro),
        spec.logprob_temperature,
    )
    waiting = functools.partial(
        partition.in_memory, memory=config.model.frozen_memory
    )
    self.fixed = Models(
        policy=None,
        ref_policy=waiting(params.ref_policy),
        critic=None,
        reward_model=waiting(params.reward_model),
    )
    self._make_optimizers(num_steps)
    self.frozen = {
        name: self._split(name, params)[0] for name in self._optimizers
    }
    self.abstract_states = self.init_states(checkpoint.abstract_of(params))
    self._choose_fused()
    self._make_rollout()
    self._make_passes()
    self._make_updates()

  def _choose_fused(self) -> None:
    config = self.spec.config
    reason = why_not_fused(config)
    self.fused_models = () if reason else _FUSED[config.ppo.one_pass]
    names = ' and '.join(self.fused_models)
    _log.info(
        'ppo: %s',
        f'scored before it is learned from ({reason})'
        if reason
        else f'{names} scored and learned in one pass',
    )

  def _make_optimizers(self, num_steps: int) -> None:
    config, c = self.spec.config, self.spec.config.ppo
    # Optimizer updates of policy and critic in one step, and in all.
    self._per_step = c.ppo_epochs * c.minibatches
    steps = {'policy': num_steps - c.critic_warmup_updates, 'critic': num_steps}
    trained = {'policy': c.optim, 'critic': config.critic.optim}
    if not BASELINES[c.baseline].has_critic:
      del trained['critic']
    self._optimizers, self._learning_rates = {}, {}
    for name, fields in trained.items():
      updates = steps[name] * self._per_step
      self._optimizers[name] = optim.make_optimizer(fields, updates)
      self._learning_rates[name] = optim.learning_rate(fields, updates)

  def _split(self, name: str, params: Models) -> tuple[Any, Any]:
    """Parameters of a model that do not learn, and those that do."""
    return lora.split(getattr(self.method.configs, name), getattr(params, name))

  def init_states(self, params: Models) -> step.States:
    """Policy, critic and KL coefficient before the first update."""
    kl_coef = np.asarray(self.spec.config.ppo.kl_coef, jnp.result_type(float))
    states = {'kl_coef': update.on_mesh_of(params.policy, kl_coef)}
    for name, optimizer in self._optimizers.items():
      _, learning = self._split(name, params)
      states[name] = update.init_state(learning, optimizer)
    return states

  def _make_rollout(self) -> None:
    spec = self.spec
    self._layout = layout = spec.decode_layout(self.method.configs.policy)
    self.to_decode = functools.partial(layout_lib.to_decode, layout=layout)
    # The evaluation runs the same program.
    self.rollout = functools.partial(
        layout_lib.draw,
        layout=layout,
        settings=spec.sampling(),
        num_rollouts=update.num_micro(
            spec.rows, spec.config.rollout.batch_size
        ),
    )

  def _micro_batches(self, rows: int) -> buckets.Buckets:
    c = self.spec.config.ppo
    return buckets.make_buckets(
        self.spec.length,
        rows,
        c.micro_batch_size,
        count=c.length_buckets,
        groups=self.spec.batch_devices,
    )

  def _make_passes(self) -> None:
    method, objective = self.method, self.method.objective
    self.split = self._micro_batches(self.spec.rows)
    bound = {'method': method, 'split': self.split}

    def score(models: Shared, *rest: Any) -> Scored:
      return learn.score(models.tree, *rest, **bound)

    def experience(rollout: Rollout, scored: Scored, *rest: Any) -> Any:
      made = step.form_experience(rollout.sequences, scored, *rest, method)
      return made[0], metrics.describe(rollout, *made, rest[1], objective)

    def score_and_learn(states: dict, others: Shared, *rest: Any) -> Any:
      rollout, _, kl_coef, _ = rest
      new, learned, made = learn.score_and_learn(
          states, *others.tree, *rest, optimizers=self._optimizers, **bound
      )
      told = metrics.describe(rollout, *made, kl_coef, objective)
      return new, made[0], told, learned

    self._score = jax.jit(score)
    self._experience = jax.jit(experience)
    self._score_and_learn = jax.jit(score_and_learn, donate_argnums=0)

  def _make_updates(self) -> None:
    spec, c = self.spec, self.spec.config.ppo
    self._updates = {
        name: jax.jit(
            functools.partial(
                learn.update_model,
                name=name,
                method=self.method,
                optimizer=optimizer,
                epochs=c.ppo_epochs,
                minibatches=c.minibatches,
                split=self._micro_batches(spec.rows // c.minibatches),
            ),
            donate_argnums=0,
        )
        for name, optimizer in self._optimizers.items()
    }
    self._adapt = jax.jit(
        functools.partial(
            rewards.adapted_kl_coef,
            target=c.kl_target,
            horizon=c.kl_horizon,
            responses=spec.rows,
        )
    )

  def models(self, states: step.States) -> Models:
    """The parameters of the four models."""
    return self.fixed._replace(
        **{
            name: lora.join(frozen, states[name].params)
            for name, frozen in self.frozen.items()
        }
    )

  def trained(self, index: int) -> tuple[str, ...]:
    """The models that step number `index` updates."""
    warming_up = index < self.spec.config.ppo.critic_warmup_updates
    return tuple(
        name for name in self._updates if name != 'policy' or not warming_up
    )

  def fused(self, index: int) -> tuple[str, ...]:
    """Those of them that learn in the pass that scores."""
    trained = self.trained(index)
    return self.fused_models if set(self.fused_models) <= set(trained) else ()

  def macro_keys(self, prompts: PromptBatch, index: int) -> Array:
    """A random key for each row [B], for random lengths of macro actions."""
    return sampling.row_keys(
        self.spec.key('macro'),
        index,
        prompts.prompt_ids_B,
        prompts.sample_ids_B,
    )

  def ask_host(self, prompts: PromptBatch, rollout: Rollout) -> Asked:
    """What the host says about the text of responses."""
    return self._host.ask(prompts, rollout, self.spec.mesh)

  def score(self, states: step.States, rollout: Rollout) -> Scored:
    """What the four models say about responses, apart from learning."""
    return self._score(Shared(self.models(states)), rollout.sequences)

  def experience(
      self,
      rollout: Rollout,
      scored: Scored,
      row_keys_B: Array,
      kl_coef: Array,
      answers: HostAnswers,
  ) -> tuple[Experience, step.Metrics]:
    """`step.form_experience`, and the metrics of it."""
    return self._experience(rollout, scored, row_keys_B, kl_coef, answers)

  def _fused_arguments(
      self, states: step.States, frozen: dict, models: Models, *rest: Any
  ) -> tuple[Any, ...]:
    only = lambda tree: {name: tree[name] for name in self.fused_models}
    fixed = models._replace(**dict.fromkeys(self.fused_models))
    return only(states), Shared((only(frozen), fixed)), *rest

  def score_and_learn(
      self, states: step.States, *rest: Any
  ) -> tuple[step.States, Experience, step.Metrics, dict[str, step.Metrics]]:
    """`learn.score_and_learn` of the fused models, and metrics of it."""
    return self._score_and_learn(
        *self._fused_arguments(states, self.frozen, self.models(states), *rest)
    )

  def update(
      self, name: str, states: step.States, experience: Experience, index: int
  ) -> tuple[Any, step.Metrics]:
    """`learn.update_model` of one model."""
    key = jax.random.fold_in(self.spec.key('minibatches'), index)
    return self._updates[name](states[name], self.frozen[name], experience, key)

  def adapt_kl(self, states: step.States, told: step.Metrics) -> step.States:
    """The next KL coefficient, where it adapts."""
    if not self.spec.config.ppo.kl_target:
      return {}
    return {'kl_coef': self._adapt(states['kl_coef'], told['objective/kl'])}

  def describe_updates(
      self, learned: dict[str, step.Metrics], new: step.States
  ) -> step.Metrics:
    """Metrics of the updates of each model, by their names in the log."""
    made = {}
    for model, found in learned.items():
      # A loss per macro action sums the tokens of each, `constant` counts pads:
      # only divided by their weight is it what the metric says.
      made[f'loss/{model}'] = found.pop('loss') / found.pop('weight')
      done = new[model].step - self._per_step  # before this step
      made[f'{model}/lr'] = self._learning_rates[model](done)
      made |= {f'{model}/{name}': value for name, value in found.items()}
    return made

  def _abstract_answers(self, rollout: Rollout, scored: Scored) -> HostAnswers:
    """Shapes of what the host will say, by the config."""
    config, mask_BT = self.spec.config, rollout.sequences.response_mask_BT
    reads_text = config.macro.termination in host_rules.NAMES
    scores = any(t != functions.MODEL for t in functions.terms(config.reward))
    wide = lambda x: jax.ShapeDtypeStruct(
        x.shape, np.float32, sharding=x.sharding
    )
    return HostAnswers(
        mask_BT if reads_text else None,
        wide(scored.score_B) if scores else None,
    )

  def listing(self) -> dict[str, Program]:
    """What a step runs, by name, in its order."""
    states, frozen, models = checkpoint.abstract_of(
        (self.abstract_states, self.frozen, self.models(self.abstract_states))
    )
    rows, mesh = self.spec.rows, self.spec.mesh
    key = jax.eval_shape(lambda: jax.random.key(0))
    split = lambda: jax.random.split(jax.random.key(0), rows)
    lay_out, copied = layout_lib.decode_program(models.policy, self._layout)
    policy = layout_lib.abstract_params(models.policy, self._layout)
    prompts = self.spec.abstract_prompts(rows)
    programs = {}
    if copied:
      programs['ppo/reshard'] = Program(lay_out, (copied,))
    programs['ppo/rollout'] = Program(self.rollout, (policy, prompts, key, 0))
    rollout, scored = self.spec.abstract_rollout(rows)
    answers = self._abstract_answers(rollout, scored)
    if self.fixed.reward_model is None:
      scored = scored.replace(score_B=None)
    keys_B = abstract(jax.eval_shape(split), mesh)
    asked = keys_B, states['kl_coef'], answers
    args = (rollout, scored, *asked)
    made, _ = jax.eval_shape(self._experience, *args)
    experience = abstract(made, mesh)
    if self.fused_models:
      fused = self._fused_arguments(states, frozen, models, rollout, *asked)
      programs['ppo/one_pass'] = Program(self._score_and_learn, fused)
    else:
      read = (Shared(models), rollout.sequences)
      programs['ppo/score'] = Program(self._score, read)
      programs['ppo/experience'] = Program(self._experience, args)
    for name, function in self._updates.items():
      if name not in self.fused_models:
        args = (states[name], frozen[name], experience, key)
        programs[f'ppo/update_{name}'] = Program(function, args)
    return programs
