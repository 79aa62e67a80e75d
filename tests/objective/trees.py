"""All trajectories of a small tree of tokens, with exact values.

A state is the tokens so far; every response has DEPTH tokens. Nothing is
sampled: expectations are sums over all trajectories.
"""

import dataclasses
import functools
import itertools

import numpy as np

VOCAB, DEPTH = 2, 6
Prefix = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tree:
  """A policy and the rewards of its tokens.

  Attributes:
    policy: probabilities [VOCAB] in each state.
    rewards: of each state and token, [VOCAB].
    values: exact value of each state, 0 at the end.
  """

  policy: dict[Prefix, np.ndarray]
  rewards: dict[Prefix, np.ndarray]
  values: dict[Prefix, float]

  def q(self, state: Prefix) -> np.ndarray:
    """[VOCAB], exact value of each token."""
    after = [self.values[(*state, a)] for a in range(VOCAB)]
    return self.rewards[state] + np.array(after)


@functools.cache
def states() -> list[Prefix]:
  """All states in which a token is chosen, shorter ones first."""
  return [
      state
      for depth in range(DEPTH)
      for state in itertools.product(range(VOCAB), repeat=depth)
  ]


def make(seed: int, *, rewards_at: range = range(DEPTH)) -> Tree:
  """A random tree with rewards for the tokens at these depths."""
  rng = np.random.default_rng(seed)
  policy, rewards, values = {}, {}, {}
  for state in states():
    odds = np.exp(rng.normal(size=VOCAB))
    policy[state] = odds / odds.sum()
    paid = rng.normal(size=VOCAB)
    rewards[state] = paid if len(state) in rewards_at else np.zeros(VOCAB)
  values |= dict.fromkeys(itertools.product(range(VOCAB), repeat=DEPTH), 0.0)
  tree = Tree(policy, rewards, values)
  for state in reversed(states()):
    values[state] = float(policy[state] @ tree.q(state))
  return tree


@functools.cache
def trajectories() -> list[Prefix]:
  """Every response."""
  return list(itertools.product(range(VOCAB), repeat=DEPTH))


def along(table: dict, *, by_token: bool = False) -> np.ndarray:
  """[trajectories, DEPTH]: a table of states (and tokens) along each."""
  return np.array(
      [
          [
              table[path[:t]][path[t]] if by_token else table[path[:t]]
              for t in range(DEPTH)
          ]
          for path in trajectories()
      ]
  )


def chances(tree: Tree) -> np.ndarray:
  """[trajectories, DEPTH]: probability of the rest given the state at t."""
  each = along(tree.policy, by_token=True)
  return np.cumprod(each[:, ::-1], axis=1)[:, ::-1]


@functools.cache
def through(state: Prefix) -> np.ndarray:
  """Indices of the trajectories that pass a state."""
  depth = len(state)
  found = [i for i, p in enumerate(trajectories()) if p[:depth] == state]
  return np.array(found)
