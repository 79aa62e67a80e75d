"""MA-PPO in one file: one whole update in float64, in the order of the method.

MA-RLHF (ICLR 2025, arXiv 2410.02743) is PPO for language models whose unit of
credit is a macro action: some consecutive tokens of a response. The policy
still chooses single tokens; macro actions group their rewards, values,
advantages and, in the paper's text, their probability ratios.

Notation: x is a response of tokens t = 0 ... R - 1; w is a macro action of |w|
tokens, start <= t < stop; w+1 comes after it. `update`, last, does it all.
"""

from collections.abc import Callable
import dataclasses

import numpy as np
from numpy import ndarray
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a variant chooses. The defaults are ours; see PAPER and AUTHORS."""

  termination: str = 'fixed'  # fixed | ppl | given (Response.starts)
  ngram: int = 5  # tokens in a fixed macro action; 0 = infinity
  logprobs: str = 'reference'  # | old: whose log-probs ppl reads
  last_token_alone: bool = False  # authors: a macro action of its own
  empty_step: bool = False  # authors: an empty macro action before it
  kl_coef: float = 0.05
  kl_target: float = 0.0  # nats per response; 0 = kl_coef stays
  kl_horizon: float = 10_000.0  # responses
  score_clip: float = 2.5
  pool_rewards: str = 'sum'  # | equal (authors)
  pool_values: str = 'start'  # | equal | unit | position | position_reversed
  gamma: float = 1.0
  gae_lambda: float = 0.95
  discount: str = 'decision'  # gamma for each macro action | token: semi-MDP
  advantage: str = 'shared'  # by the tokens of w | own (pool_values='start')
  critic_target: str = 'own'  # | macro | starts (first tokens only)
  baseline: str = 'critic'  # | rloo: other responses to the prompt
  whiten_advantages: bool = False
  ratio: str = 'token'  # | macro | geometric
  reduction: str = 'sequence'  # | token | macro | constant; see `mean`
  response_length: int = 512  # tokens; only `constant` reads it
  clip_eps: float = 0.2
  value_clip_eps: float = 0.2


PUBLISHED = Settings(pool_values='equal', critic_target='macro')  # in both
PAPER = dataclasses.replace(PUBLISHED, ratio='macro', reduction='macro')
AUTHORS = dataclasses.replace(  # github.com/ernie-research/MA-RLHF
    PUBLISHED, pool_rewards='equal', last_token_alone=True, empty_step=True
)


@dataclasses.dataclass(frozen=True)
class Response:
  """One finished response of R >= 1 tokens; arrays are float64 [R]."""

  old_logprobs: ndarray  # of its tokens, by the policy that sampled it
  ref_logprobs: ndarray  # by the frozen reference policy
  old_values: ndarray  # the critic's, at the state before each token
  score: float  # of the reward model
  prompt: int = 0  # equal for responses to the same prompt (rloo)
  starts: tuple[int, ...] = (0,)  # first tokens of given macro actions


def macro_actions(x: Response, s: Settings) -> list[tuple[int, int]]:
  """Returns (start, stop) of each macro action of a response (appendix B.4).

  A rule says whether w ends before token t: fixed, when |w| = ngram; ppl, when
  t would raise the perplexity exp(mean of -logprob) of w, which is when its
  -logprob exceeds that mean. The authors' code cuts off the last token and,
  where the rule has done so already, adds an empty step of reward and value 0.
  """
  nll = -(x.ref_logprobs if s.logprobs == 'reference' else x.old_logprobs)
  ends_before = {
      'fixed': lambda t, start: t - start == s.ngram,
      'ppl': lambda t, start: nll[t] > nll[start:t].mean(),
      'given': lambda t, start: t in x.starts,
  }[s.termination]
  starts, last = [0], len(nll) - 1
  for t in range(1, len(nll)):
    if ends_before(t, starts[-1]):
      starts.append(t)
  if s.empty_step if starts[-1] == last else s.last_token_alone:
    starts.append(last)
  return list(zip(starts, starts[1:] + [len(nll)], strict=True))


def token_rewards(x: Response, s: Settings) -> ndarray:
  """Returns -kl_coef (old_logprob - ref_logprob), plus the score at the end."""
  rewards = -s.kl_coef * (x.old_logprobs - x.ref_logprobs)
  rewards[-1] += np.clip(x.score, -s.score_clip, s.score_clip)
  return rewards


# sigma_i for tokens i = 0 ... n - 1 of a macro action (appendix D.1).
WEIGHTS = {
    'sum': lambda i, n: np.ones(n),
    'start': lambda i, n: 1.0 * (i == 0),  # unbiased: has seen no token of w
    'equal': lambda i, n: np.ones(n) / n,
    'unit': lambda i, n: 1.0 * (i == n - 1),
    'position': lambda i, n: 1 / (n - i) / np.sum(1 / (n - i)),
    'position_reversed': lambda i, n: 1 / (i + 1) / np.sum(1 / (i + 1)),
}


def credit(x: Response, s: Settings) -> tuple[ndarray, ndarray]:
  """Returns advantages and critic targets of the tokens of one response.

  Macro GAE, backwards from V = A = 0 after the end; d = 1 and g = gamma or, if
  tokens are discounted, d = gamma and g = gamma^|w|; rloo: V = 0, lambda = 1:
    R_w = sum_i d^i sigma_i r_i             V_w = sum_i sigma_i V_i
    delta_w = R_w + g V_w+1 - V_w           A_w = delta_w + g lambda A_w+1
  The macro return is A_w + V_w. A token's own return is of token GAE, by lambda
  at the last token of w and 1 inside; its own advantage is that minus V_t.
  """
  rewards, critic = token_rewards(x, s), s.baseline == 'critic'
  values, lam = (x.old_values, s.gae_lambda) if critic else (0 * rewards, 1.0)
  values = np.append(values, 0.0)  # after the end
  d = s.gamma if s.discount == 'token' else 1.0
  shared, macro, own = np.zeros((3, len(values)))
  next_value = next_advantage = 0.0
  for start, stop in reversed(macro_actions(x, s)):
    n, i = stop - start, np.arange(stop - start)
    r = WEIGHTS[s.pool_rewards](i, n) * rewards[start:stop]
    value = WEIGHTS[s.pool_values](i, n) @ values[start:stop]
    g = s.gamma**n if s.discount == 'token' else s.gamma
    delta = np.sum(d**i * r) + g * next_value - value
    advantage = delta + g * lam * next_advantage
    to_come = s.gamma * ((1 - lam) * values[stop] + lam * own[stop])
    for t in reversed(range(start, stop)):
      own[t] = rewards[t] + to_come
      to_come = d * own[t]
    shared[start:stop], macro[start:stop] = advantage, advantage + value
    next_value, next_advantage = value, advantage
  advantages = shared if s.advantage == 'shared' else own - values
  return advantages[:-1], (own if s.critic_target == 'own' else macro)[:-1]


def batch_credit(batch: list[Response], s: Settings) -> tuple[list, list]:
  """Returns `credit` of every response, with what needs the whole batch.

  rloo subtracts the mean return of the other responses to the same prompt;
  whitening makes mean 0 and variance 1 over all tokens of the batch.
  """
  credits = [credit(x, s) for x in batch]
  advantages, returns = map(list, zip(*credits, strict=True))
  if s.baseline == 'rloo':
    totals = np.array([a[0] for a in advantages])  # V is 0 in them
    for k, x in enumerate(batch):
      others = [y.prompt == x.prompt and y is not x for y in batch]
      advantages[k] = advantages[k] - totals[others].mean()
  if s.whiten_advantages:
    every = np.concatenate(advantages)
    std = np.sqrt(every.var() + 1e-8)
    advantages = [(a - every.mean()) / std for a in advantages]
  return advantages, returns


def policy_losses(new: Tensor, x: Response, a: ndarray, s: Settings) -> Tensor:
  """Returns -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) of each token."""
  spans = macro_actions(x, s)
  pool = {  # log-ratios of the tokens of w -> that of w, at each of them
      'token': lambda r: r,
      'macro': lambda r: r.sum().expand(len(r)),  # new / old probability of w
      'geometric': lambda r: r.mean().expand(len(r)),  # GSPO, arXiv 2507.18071
  }[s.ratio]
  advantages, change = torch.tensor(a), new - torch.tensor(x.old_logprobs)
  pooled = torch.cat([pool(change[i:j]) for i, j in spans])
  ratio = pooled.clamp(-20, 20).exp()
  clipped = ratio.clamp(1 - s.clip_eps, 1 + s.clip_eps)
  # Once for each w, so that all ratios have the same gradient where they are 1.
  counts = [s.ratio != 'macro' or t in dict(spans) for t in range(len(a))]
  gains = torch.minimum(ratio * advantages, clipped * advantages)
  return -gains * torch.tensor(counts)


def value_losses(new: Tensor, x: Response, g: ndarray, s: Settings) -> Tensor:
  """Returns max((V - return)^2, (clipped V - return)^2) / 2 of each token."""
  returns, old = torch.tensor(g), torch.tensor(x.old_values)
  clipped = old + (new - old).clamp(-s.value_clip_eps, s.value_clip_eps)
  return torch.maximum((new - returns) ** 2, (clipped - returns) ** 2) / 2


def mean(rows: list, batch: list, s: Settings, starts: bool) -> Tensor:
  """Returns the mean loss of tokens, or of first tokens of macro actions only.

  sequence: over responses, of the mean over their tokens. The others divide the
  sum over all tokens by their number, that of macro actions, or a constant.
  """
  opens = [sorted({i for i, _ in macro_actions(x, s)}) for x in batch]
  kept = [x[o] if starts else x for x, o in zip(rows, opens, strict=True)]
  if s.reduction == 'sequence':
    return torch.stack([x.mean() for x in kept]).mean()
  total, constant = sum(map(len, kept)), len(batch) * s.response_length
  actions = sum(map(len, opens))
  divisors = {'token': total, 'macro': actions, 'constant': constant}
  return torch.cat(kept).sum() / divisors[s.reduction]


@dataclasses.dataclass(frozen=True)
class Model:
  """The policy or the critic: its parameters and what they compute."""

  params: ndarray  # one float64 vector
  apply: Callable[[Tensor], list[Tensor]]  # params -> [R] for each response
  decay: ndarray | float = 0.1  # AdamW's, one for each parameter or for all
  lr: float = 1.5e-5
  adam: tuple = (0.0, 0.0, 0)  # averages of gradient and its square; steps


def descend(
    model: Model, losses: Callable, batch: list, aims: list, s: Settings
) -> tuple[Model, tuple[float, ndarray]]:
  """Returns the model after AdamW, and what it saw: loss, gradient (uncut)."""
  params = torch.tensor(model.params, requires_grad=True)
  rows = zip(model.apply(params), batch, aims, strict=True)
  starts = losses is value_losses and s.critic_target == 'starts'
  loss = mean([losses(*row, s) for row in rows], batch, s, starts)
  gradient = torch.autograd.grad(loss, params)[0].numpy()
  g = gradient / max(1.0, np.linalg.norm(gradient))
  m, v, k = model.adam
  m, v, k = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2, k + 1
  change = m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.95**k)) + 1e-8)
  new = model.params - model.lr * (change + model.decay * model.params)
  model = dataclasses.replace(model, params=new, adam=(m, v, k))
  return model, (loss.item(), gradient)


def update(
    batch: list[Response], policy: Model, critic: Model | None, s: Settings
) -> tuple[Model, Model | None, float, dict]:
  """Returns the new policy and critic, the next kl_coef, losses and gradients.

  For a second epoch, call it with the same batch: credit depends on that alone.
  kl_coef follows kl_target as in Ziegler et al., arXiv 1909.08593.
  """
  advantages, returns = batch_credit(batch, s)
  log = {}
  policy, log['policy'] = descend(policy, policy_losses, batch, advantages, s)
  if s.baseline == 'critic':
    critic, log['critic'] = descend(critic, value_losses, batch, returns, s)
  kl = np.mean([np.sum(x.old_logprobs - x.ref_logprobs) for x in batch])
  error = np.clip(kl / s.kl_target - 1, -0.2, 0.2) if s.kl_target else 0.0
  kl_coef = s.kl_coef * (1 + error * len(batch) / s.kl_horizon)
  return policy, critic, kl_coef, log
