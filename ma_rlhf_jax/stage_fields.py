"""The config fields of SFT, reward model, PPO and critic."""

from ma_rlhf_jax.fields import (
    SWITCH,
    TEMPERATURE,
    TEXT,
    Block,
    Field,
    above,
    at_least,
    block,
    one_of,
    within,
)

# Far above what anyone runs, as in `config_fields`.
_SIZE, _COUNT = within(1, 2**20), within(1, 2**12)
_EPOCHS = above(0, 1e6)

# What an estimator of advantages is called with.
_ESTIMATOR = ('values_BT', 'rewards_BT', 'macro', 'objective')


# fmt: off
def _optim(lr: float) -> dict[str, Field]:
  """AdamW with the authors' betas, decay and clipping."""
  return dict(
    lr=Field(lr, above(0), 'Peak learning rate.'),
    schedule=Field('cosine', one_of('training.optim:SCHEDULES'),
        'How the learning rate decays after the warm-up.'),
    warmup_ratio=Field(0.1, within(0, 1),
        'Share of all updates of the stage in which the rate rises to lr.'),
    final_lr_ratio=Field(0.0, within(0, 1),
        'Learning rate at the end of the decay, as a share of lr.'),
    b1=Field(0.9, within(0, 1, below=True),
        "Decay of AdamW's first moment, per update.", 'authors'),
    b2=Field(0.95, within(0, 1, below=True),
        "Decay of AdamW's second moment, per update.", 'authors'),
    eps=Field(1e-8, above(0), "Added to the root of AdamW's second moment."),
    weight_decay=Field(0.1, at_least(0),
        'Decoupled weight decay; norm weights are never decayed.', 'authors'),
    clip_norm=Field(1.0, at_least(0),
        'Largest global norm of a gradient; 0 = no clipping.', 'authors'),
    moment_dtype=Field('float32', one_of('float32', 'bfloat16'),
        "Type of AdamW's moments; bfloat16 takes half the memory of float32."),
  )


def _supervised(rows: str, lr: float) -> dict:
  """How a stage goes through its part of the rows."""
  return dict(
    epochs=Field(1.0, _EPOCHS, 'Passes over the part of the stage.'),
    steps=Field(0, at_least(0), 'Updates; 0 = as many as epochs gives.'),
    batch_size=Field(64, _SIZE, f'{rows} per update.'),
    micro_batch_size=Field(0, at_least(0),
        f'{rows} per gradient pass; 0 = batch_size.'),
    eval_every=Field(50, at_least(0),
        'Updates between evaluations beside those of checkpoints; 0 = none.'),
    optim=_optim(lr),
  )


BLOCKS: dict[str, Block] = {}
BLOCKS['sft'] = block('Supervised fine-tuning',
  init=Field('', TEXT, 'Model to start from: a Hugging Face folder, a hub id '
      'or a workdir; empty: random weights.'),
  loss_on=Field('response', one_of('training.sft:LOSS_ON'),
      'Tokens in the loss; text adds the prompt, everything also the padding, '
      'as the authors do.'),
  **_supervised('Sequences', 2e-5),
)
BLOCKS['reward_model'] = block('Reward modelling',
  init=Field('', TEXT, 'Model to start from: a folder, a hub id or a workdir; '
      "empty: this run's SFT policy."),
  loss=Field('per_token', one_of('objective.preference:PAIR_LOSSES'),
      'Tokens of a pair whose rewards the loss compares.'),
  num_padding_at_beginning=Field(0, at_least(0), 'Padding tokens that '
      'loss=authors passes over before one is the end; Gemma needs 0.'),
  **_supervised('Pairs', 1e-5),
)
BLOCKS['ppo'] = block('MA-PPO and its policy',
  policy_init=Field('', TEXT, 'Policy to start from: a folder, a hub id or a '
      "workdir; empty: this run's SFT policy."),
  reward_model=Field('', TEXT,
      "Reward model: a folder, a hub id or a workdir; empty: this run's."),
  critic_init=Field('', TEXT, 'Model the critic starts from: a folder, a hub '
      'id or a workdir; empty: the reward model.'),
  from_run=Field('', TEXT, 'Workdir whose SFT policy and reward model are '
      'reused; recipes spell it from_run, since from is a keyword of Python.'),
  epochs=Field(1.0, _EPOCHS, 'Passes over the prompts of the PPO part.'),
  steps=Field(0, at_least(0), 'Steps; 0 = as many as epochs gives.'),
  batch_size=Field(256, _SIZE, 'Prompts per step.', 'paper'),
  samples_per_prompt=Field(1, _COUNT, 'Responses drawn for each prompt.'),
  ppo_epochs=Field(1, _COUNT, 'Passes over the rollouts of a step.', 'paper'),
  minibatches=Field(1, at_least(1), 'Updates per pass of ppo_epochs.', 'paper'),
  micro_batch_size=Field(0, at_least(0),
      'Full-length sequences per gradient pass; shorter ones are more to a '
      'pass. 0 = all, or with several widths a sixteenth of them.'),
  length_buckets=Field(0, within(0, 64), 'Widths to which rows are padded for '
      'scoring and updates: 1 = that of the longest possible row, 0 = six from '
      '512 tokens on, else one.', resumable=True),
  one_pass=Field('auto', one_of('auto', 'joint', 'policy', 'off'), 'Models '
      'scored and trained in one forward pass where that is exact: joint = '
      'policy and critic, whose gradients exist at once.', resumable=True),
  kl_coef=Field(0.05, within(0, 1e6), 'Weight of the KL penalty of each token '
      'in its reward, in reward-model units per nat.', 'paper'),
  kl_estimator=Field('k1', one_of('k1'),
      'Estimator of the KL in the reward: the log-ratio. k2 and k3 have '
      'another gradient than that of the KL, as a reward is constant to it.'),
  kl_target=Field(0.0, within(0, 1e6), 'KL (objective/kl) in nats per response '
      'that kl_coef adapts to; 0 = kl_coef is fixed.'),
  kl_horizon=Field(10_000, at_least(1),
      'Responses in which kl_coef can change by a factor of e^0.2.'),
  score_clip=Field(2.5, within(0, 1e6), 'Scores are clipped to +-score_clip '
      'reward-model units; 0 = no clipping.', 'authors'),
  clip_eps=Field(0.2, above(0),
      'Distance from 1 at which the importance ratio is clipped.', 'paper'),
  gamma=Field(1.0, within(0, 1),
      'Discount of a macro action or of a token, see discount.', 'paper'),
  discount=Field('macro', one_of('objective.advantage:DISCOUNTS'),
      'What gamma discounts: a macro action (authors) or a token (SMDP).'),
  gae_lambda=Field(0.95, within(0, 1), 'GAE lambda per macro action.', 'paper'),
  advantage=Field('shared',
      one_of('objective.advantage:ADVANTAGES', or_own=_ESTIMATOR),
      'Advantage of a token: that of its macro action (shared), or one of its '
      'own (own).', 'paper'),
  baseline=Field('critic', one_of('objective.targets:BASELINES'),
      'What is subtracted from returns: values of the critic, or the mean '
      'return of the other responses to a prompt (rloo).', 'paper'),
  whiten_advantages=Field(False, SWITCH,
      'Advantages of a batch are shifted to mean 0 and scaled to std 1.'),
  ratio=Field('token', one_of('objective.losses:RATIOS'),
      'Importance ratio: of a token (authors), of a macro action (paper), or '
      'its geometric mean.', 'authors'),
  loss_reduction=Field('sequence', one_of('objective.losses:REDUCTIONS'),
      'The policy loss is a mean over sequences of their means (authors), over '
      'all tokens or macro actions (paper), or over all columns (constant).',
      'authors'),
  logprob_temperature=Field(0.0, TEMPERATURE,
      'Temperature of the log-probs in ratio and KL; 0 = that of rollout.'),
  critic_warmup_updates=Field(0, at_least(0),
      'Steps at the start in which only the critic is trained.'),
  max_kl=Field(30.0, above(0, 1e6),
      'Largest eval/kl, in nats per response, of the best checkpoint.'),
  eval_every=Field(10, at_least(0),
      'Steps between evaluations beside those of checkpoints; 0 = none.'),
  optim=_optim(1.5e-5),
)
BLOCKS['critic'] = block('The critic of MA-PPO',
  target=Field('token', one_of('objective.advantage:CRITIC_TARGETS'),
      'Returns that it learns: of tokens, or of macro actions at all their '
      'tokens (macro, paper) or at the first (starts).'),
  gae_lambda=Field(-1.0, within(0, 1, -1),
      'Lambda of its returns, per macro action; -1 = ppo.gae_lambda.'),
  clip_eps=Field(0.2, at_least(0), 'Distance from the old value at which a '
      'value is clipped, in reward-model units; 0 = no clipping.', 'authors'),
  optim=_optim(1.5e-5),
)
# fmt: on
