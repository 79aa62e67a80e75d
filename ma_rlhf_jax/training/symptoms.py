"""Symptoms of a failed run: a table of tests on the metrics of a stage.

A run can end without an error and still deliver a destroyed model. Each row of
`SYMPTOMS` names one way in which that shows, tests for it on the numbers that
training logs anyway, and says which field to change. A line is printed when a
symptom begins, the final comparison opens with those that are left, and
`stop.<code>` ends a run on one of them.

A new symptom is one function, one row of the table and one field of `stop`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict


class SymptomError(RuntimeError):
  """A run ends because of a symptom that `stop` names; `codes` are all."""

  def __init__(self, message: str, codes: Sequence[str]) -> None:
    super().__init__(message)
    self.codes = tuple(codes)


@dataclasses.dataclass(frozen=True)
class Reading:
  """What a test reads: the numbers of a stage at one evaluation.

  Attributes:
    metrics: by name, the evaluation's and those of the newest update; the
      names and units are those of the metrics table.
    first: the first value of each metric in this stage: of the evaluation
      before the first update, and of the first update.
    is_last: whether all updates of the stage are done.
    held_out: rows that the evaluation reads.
    config: of the run.
  """

  metrics: Mapping[str, float]
  first: Mapping[str, float]
  is_last: bool
  held_out: int
  config: ConfigDict


@dataclasses.dataclass(frozen=True)
class Symptom:
  """One row of the table.

  Attributes:
    code: its name, in `verdict.json` and as a field of `stop`.
    stage: whose evaluations can show it.
    reads: metrics without which there is nothing to test.
    test: the evidence in words and numbers; '' where it is absent.
    remedy: which fields to change.
    at_end: whether it is tested for after the last update of the stage alone.
  """

  code: str
  stage: str
  reads: tuple[str, ...]
  test: Callable[[Reading], str]
  remedy: str
  at_end: bool = False

  def evidence(self, reading: Reading) -> str:
    """That of the test; '' where there is nothing to test yet."""
    missing = any(name not in reading.metrics for name in self.reads)
    too_early = self.at_end and not reading.is_last
    return '' if missing or too_early else self.test(reading)

  def line(self, evidence: str) -> str:
    """Code, evidence and remedy."""
    return f'{self.code}: {evidence}; {self.remedy}'


def _at_chance(r: Reading) -> str:
  """Held-out accuracy that a coin toss explains.

  The test is that of p = 1/2 at the 0.5 % level (one-sided). Of few pairs it
  tells little, so an accuracy of 0.6 or more never counts.
  """
  accuracy = r.metrics['eval/accuracy']
  chance = 0.5 + 2.58 * math.sqrt(0.25 / r.held_out)
  if accuracy >= min(0.6, chance):
    return ''
  return (
      f'the reward model prefers the chosen response in {accuracy:.3f} of '
      f'{r.held_out} held-out pairs, and a coin would in 0.5'
  )


def _kl_above_max(r: Reading) -> str:
  kl, most = r.metrics['eval/kl'], r.config.ppo.max_kl
  if kl <= most:
    return ''
  return (
      f'eval/kl is {kl:.4g} nats per response, and ppo.max_kl allows {most:g}'
  )


def _no_end(r: Reading) -> str:
  ended = r.metrics['eval/ended']
  if ended > 0.01:
    return ''
  return f'a share of {ended:.3f} of the held-out responses ends with EOS'


def _one_token(r: Reading) -> str:
  share = r.metrics['eval/repeated']
  if share < 0.5:
    return ''
  return (
      "a response's most frequent token is a share of "
      f'{share:.2f} of its tokens (eval/repeated)'
  )


def _no_entropy(r: Reading) -> str:
  now = r.metrics['objective/entropy']
  first = r.first['objective/entropy']
  if now >= min(0.02, 0.1 * first):
    return ''
  return (
      f'objective/entropy is {now:.2g} nats per token, and was {first:.2g} in '
      'the first update'
  )


def _worse_score(r: Reading) -> str:
  """The score fell by more than half of its spread over the rollouts."""
  now, before = r.metrics['eval/score'], r.first['eval/score']
  if now >= before - 0.5 * r.first['objective/score_std']:
    return ''
  return (
      f'eval/score is {now:.4g}, and was {before:.4g} before the first update'
  )


SYMPTOMS: tuple[Symptom, ...] = (
    Symptom(
        'reward_model_at_chance',
        'reward_model',
        ('eval/accuracy',),
        _at_chance,
        'check the labels (data.chosen_column, data.rejected_column, '
        'data.shuffle_labels), or raise reward_model.optim.lr or epochs',
        at_end=True,
    ),
    Symptom(
        'kl_above_max',
        'ppo',
        ('eval/kl',),
        _kl_above_max,
        'raise ppo.kl_coef or lower ppo.optim.lr',
    ),
    Symptom(
        'no_response_ends',
        'ppo',
        ('eval/ended',),
        _no_end,
        'raise data.max_response_len or ppo.kl_coef, or lower ppo.optim.lr; if '
        'SFT already had it, train SFT for longer (sft.epochs)',
    ),
    Symptom(
        'one_token_repeated',
        'ppo',
        ('eval/repeated',),
        _one_token,
        'lower ppo.optim.lr or raise ppo.kl_coef',
    ),
    Symptom(
        'entropy_collapsed',
        'ppo',
        ('objective/entropy',),
        _no_entropy,
        'lower ppo.optim.lr or raise ppo.kl_coef',
    ),
    Symptom(
        'score_below_sft',
        'ppo',
        ('eval/score', 'objective/score_std'),
        _worse_score,
        'lower ppo.optim.lr and critic.optim.lr',
    ),
)
CODES = tuple(symptom.code for symptom in SYMPTOMS)
_BY_CODE = {symptom.code: symptom for symptom in SYMPTOMS}


class Watch:
  """The symptoms of one stage while it trains.

  Attributes:
    found: code -> evidence, of the symptoms of the newest evaluation.
    first: the first value of each metric.
  """

  def __init__(self, stage: str, config: ConfigDict, held_out: int) -> None:
    """Knows nothing yet.

    Args:
      stage: name of the stage.
      config: of the run.
      held_out: rows that its evaluations read.
    """
    self._stage, self._config, self._held_out = stage, config, held_out
    self._newest: dict[str, float] = {}
    self.found: dict[str, str] = {}
    self.first: dict[str, float] = {}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Takes over what `state` of an earlier start has returned."""
    self.found = dict(state.get('found', {}))
    self.first = dict(state.get('first', {}))

  def restore_best(self, state: Mapping[str, Any]) -> None:
    """`restore` of the best step; what only shows at the end of all stays."""
    at_end = {c: e for c, e in self.found.items() if _BY_CODE[c].at_end}
    self.restore(state)
    self.found |= at_end

  def state(self) -> dict[str, Any]:
    """What a later start needs, as JSON values."""
    return {'found': self.found, 'first': self.first}

  def note(self, metrics: Mapping[str, float]) -> None:
    """Takes the metrics of an update or of an evaluation."""
    self._newest |= metrics
    self.first = {**metrics, **self.first}

  def check(self, is_last: bool) -> list[str]:
    """Tests the newest metrics, those of an evaluation among them.

    Args:
      is_last: whether all updates of the stage are done.

    Returns:
      A line for each symptom that was not there at the evaluation before.
    """
    reading = Reading(
        metrics=self._newest,
        first=self.first,
        is_last=is_last,
        held_out=self._held_out,
        config=self._config,
    )
    before, self.found = self.found, {
        symptom.code: evidence
        for symptom in SYMPTOMS
        if symptom.stage == self._stage
        and (evidence := symptom.evidence(reading))
    }
    return lines({c: e for c, e in self.found.items() if c not in before})

  def stops(self, step: int, last_checkpoint: str) -> None:
    """Raises SymptomError where `stop` names a symptom that is there.

    Args:
      step: updates done.
      last_checkpoint: what to go back to, for the message.
    """
    for code in self.found:
      if self._config.stop[code]:
        raise SymptomError(
            f'{self._stage} stopped at step {step} by stop.{code}: '
            f'{self.found[code]}; {_BY_CODE[code].remedy}, in a new --workdir.'
            f' Last good checkpoint: {last_checkpoint}',
            list(self.found),
        )


def lines(found: Mapping[str, str]) -> list[str]:
  """One line for each of the symptoms `found` (code -> evidence)."""
  return [_BY_CODE[code].line(evidence) for code, evidence in found.items()]


def of_comparison(
    rows: Mapping[str, Mapping[str, Any]], config: ConfigDict
) -> dict[str, str]:
  """The symptoms that the final comparison itself shows, code -> evidence.

  Args:
    rows: name -> 'sft', 'ppo' and 'difference', each (mean, low, high).
    config: of the run.
  """
  numbers = {n: row for n, row in rows.items() if 'difference' in row}
  means = lambda side: {f'eval/{n}': row[side][0] for n, row in numbers.items()}
  reading = Reading(means('ppo'), means('sft'), True, 0, config)
  tests = ('kl_above_max', 'no_response_ends', 'one_token_repeated')
  found = {
      code: evidence
      for code in tests
      if (evidence := _BY_CODE[code].evidence(reading))
  }
  mean, low, high = numbers['score']['difference']
  if high < 0:
    found['score_below_sft'] = (
        f'the score is lower than before PPO by {-mean:.4g} [{-high:.4g}, '
        f'{-low:.4g}]'
    )
  return found


def verdict(found: Mapping[str, str]) -> str:
  """What the final comparison opens with.

  Args:
    found: code -> evidence.
  """
  if not found:
    return 'verdict: none of the known symptoms of a failed run'
  noun = 'symptom' if len(found) == 1 else 'symptoms'
  return '\n  '.join(
      [f'verdict: {len(found)} {noun} of a failed run', *lines(found)]
  )
