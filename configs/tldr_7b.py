"""TL;DR summaries with Gemma-7B, n = 5.

Status:    its rows cannot be read yet, so that it does not run
Command:   python -m ma_rlhf_jax.train --config=configs/tldr_7b.py
Hardware:  planned for v5e:8x8, 10.4 s a PPO step and 42 chip hours by
           `plan`; one GPU of 80 GB with adapters,
           --config=configs/tldr_7b.py:lora
Data:      openai/summarize_from_feedback, comparisons: 92,858 rows, split 20 :
           40 : 40
Updates:   SFT 145 of 128 rows, reward model 290 of 128 pairs, PPO 145 of 256
           prompts. The authors count micro-steps of 8 prompts: 4,643, an update
           of 256 every 32, warm-up 200 (6 updates)
KL:        ppo.kl_coef=0.05 reward-model units a nat of a token. Summed over a
           macro action (ours, paper) that is 0.05 a nat of it; averaged
           (authors) 0.05 / 5 = 0.01, which under summed rewards is
           --config.ppo.kl_coef=0.01
Expect:    the published scores belong to --config=configs/tldr_7b.py:authors;
           none has been reproduced with this code yet
"""

from ml_collections import ConfigDict

from ma_rlhf_jax.config import apply_arguments, published


def get_config(arguments: str = '') -> ConfigDict:
  """The recipe; `arguments` follow the colon of --config."""
  config = published('google/gemma-7b', 'gemma-7b')
  config.data.task = 'tldr'
  config.data.path = 'openai/summarize_from_feedback'
  config.data.subset = 'comparisons'
  config.sft.batch_size = 128
  config.sft.epochs = 1.0
  config.sft.optim.lr = 2e-5
  config.reward_model.batch_size = 128
  config.reward_model.optim.lr = 1e-6
  config.ppo.optim.lr = 1e-6
  config.critic.optim.lr = 1e-6
  # As a share of their micro-steps; their script has a ratio of 0.05.
  config.ppo.optim.warmup_ratio = 200 / 4643
  config.critic.optim.warmup_ratio = 200 / 4643
  # Found by `plan` for that slice.
  config.model.remat = 'dots'
  config.reward_model.micro_batch_size = 64
  config.ppo.micro_batch_size = 128
  return apply_arguments(config, arguments)
