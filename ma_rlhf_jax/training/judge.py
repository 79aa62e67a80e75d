"""How good the responses of a policy to held-out prompts are."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from ma_rlhf_jax import masking
from ma_rlhf_jax.data import batches
from ma_rlhf_jax.data.encoding import EncodedSet
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.objective import rewards
from ma_rlhf_jax.parallel import partition
from ma_rlhf_jax.parallel.mesh import gathered, own_rows, place
from ma_rlhf_jax.rollout import layout, scoring
from ma_rlhf_jax.rollout.decode import SamplingSettings
from ma_rlhf_jax.structs import (
    Array,
    Params,
    PromptBatch,
    Rollout,
    SequenceBatch,
)
from ma_rlhf_jax.training import console, update
from ma_rlhf_jax.training.run import Run
from ma_rlhf_jax.training.shared import Shared

# How the policy itself is drawn from.
_PLAIN = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_new_tokens': 0}


class Model(NamedTuple):
  """A model: its shape and its parameters."""

  shape: GemmaConfig
  params: Params


@dataclasses.dataclass(frozen=True)
class Judged:
  """One response to each of N prompts.

  Attributes:
    prompts: texts.
    responses: texts.
    numbers: name -> float64 [N]: `score` (reward-model units), `length`
      (tokens, EOS included), `ended` (1 where EOS came), `repeated` (share of
      the tokens that are the most frequent one, see `repetition`), `gold` where
      the task knows it, and two k1 estimates in nats from the reference. `kl`:
      log of policy over reference of this response, both at the temperature of
      the log-probs and unfiltered. Where the response was drawn with a filter,
      or at another temperature than that, its mean is the KL of no two
      distributions.
      `policy_kl`: the same of another response to the prompt, drawn at
      temperature 1 without filters, and at that temperature, so that its mean
      is the KL of the policies themselves.
  """

  prompts: list[str]
  responses: list[str]
  numbers: dict[str, np.ndarray]

  def means(self) -> dict[str, float]:
    """The mean of every number."""
    return {name: float(np.mean(x)) for name, x in self.numbers.items()}

  def table(self, count: int) -> str:
    """The first `count` rows as text."""
    shown = {
        name: self.numbers[name][:count].tolist()
        for name in ('score', 'gold', 'kl')
        if name in self.numbers
    }
    shown['length'] = self.numbers['length'][:count].astype(int).tolist()
    return console.samples_table(
        self.prompts[:count], self.responses[:count], shown
    )


@functools.partial(
    jax.jit, static_argnames=('shapes', 'temperature', 'num_micro')
)
def _measure(
    shared: Shared,
    rollout: Rollout,
    *,
    shapes: tuple[GemmaConfig, ...],
    temperature: float,
    num_micro: int,
) -> dict[str, Array]:
  """kl [B] of finished responses, and their score [B] by a third model."""
  params: tuple[Params, ...] = partition.on_device(shared.tree)

  def measure(rows: SequenceBatch) -> dict[str, Array]:
    logprobs_BT, ref_logprobs_BT = (
        scoring.response_logprobs(shape, p, rows, temperature=temperature)[0]
        for shape, p in zip(shapes[:2], params[:2], strict=True)
    )
    kl_B, _ = rewards.kl_estimates(
        logprobs_BT, ref_logprobs_BT, rows.response_mask_BT
    )
    found = {'kl': kl_B}
    if len(shapes) > 2:
      found['score'] = scoring.sequence_scores(shapes[2], params[2], rows)
    return found

  return scoring.in_micro_batches(measure, rollout.sequences, num_micro)


def _occurrence(rows: np.ndarray) -> np.ndarray:
  """How often each entry stood before: [7, 3, 7, 7] -> [0, 0, 1, 2]."""
  order = np.argsort(rows, kind='stable')
  ranked = rows[order]
  first = np.searchsorted(ranked, ranked)
  places = np.empty_like(order)
  places[order] = np.arange(len(rows)) - first
  return places


def prompt_batch(
    run: Run, data: EncodedSet, rows: Sequence[int], samples: int = 1
) -> PromptBatch:
  """Prompts on the devices, each `samples` times in a row.

  Each process makes no more than the rows of its own devices.

  Samples of one prompt are numbered within the batch, also where the prompt
  itself comes twice because the batch reaches into the next epoch.
  """
  repeated = np.repeat(np.asarray(rows), samples)
  own = own_rows(run.mesh, len(repeated))
  made = batches.prompt_batch(
      data,
      repeated[own],
      prompt_len=run.prompt_len,
      pad_id=run.tokenizer.pad_token_id,
      sample_ids=_occurrence(repeated)[own],
  )
  return place(made, run.mesh, len(repeated))


def repetition(tokens_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
  """float64 [B]: how much of each response is its most frequent token.

  Args:
    tokens_BT: ids.
    mask_BT: which of them count.

  Returns:
    The share, in (0, 1]; 0 for a response of fewer than four tokens, of which
    it says nothing.
  """
  shares = []
  for tokens, mask in zip(tokens_BT, mask_BT, strict=True):
    counts = np.unique(tokens[mask], return_counts=True)[1]
    enough = counts.sum() >= 4
    shares.append(counts.max() / counts.sum() if enough else 0.0)
  return np.array(shares)


def _texts(run: Run, rollout: Rollout) -> tuple[list[str], list[str]]:
  """The prompts and the responses of a rollout."""
  rows = rollout.sequences
  tokens, mask = gathered(rows.tokens_BL), gathered(rows.mask_BL)
  width = tokens.shape[1] - rows.response_mask_BT.shape[1]
  text = lambda columns: [
      run.text(t[m])
      for t, m in zip(tokens[:, columns], mask[:, columns], strict=True)
  ]
  return text(slice(None, width)), text(slice(width, None))


def _joined(parts: Sequence[Judged], count: int) -> Judged:
  """The first `count` of all."""
  join = lambda lists: [x for part in lists for x in part][:count]
  return Judged(
      prompts=join([part.prompts for part in parts]),
      responses=join([part.responses for part in parts]),
      numbers={
          name: np.concatenate([p.numbers[name] for p in parts])[:count]
          for name in parts[0].numbers
      },
  )


def judge(
    run: Run,
    policy: Model,
    *,
    num_prompts: int,
    stream: str,
    temperature: float,
    data: EncodedSet | None = None,
    ref_policy: Model | None = None,
    reward_model: Model | None = None,
) -> Judged:
  """Samples a response to each of the first held-out prompts and scores it.

  The random keys are those of step 0 of `stream`, whenever it is called, so
  that two evaluations of one run differ by the policy alone. For `policy_kl`
  second responses are drawn, with the keys of step 1, unless the first ones are
  plain samples at temperature 1.

  Args:
    run: what the stages share.
    policy: draws the responses.
    num_prompts: at most this many; fewer where fewer are held out.
    stream: of the random keys, see `Spec.key`.
    temperature: of the sampling, and of the log-probs of `kl` (1 for greedy
      responses); at that of the rollout these are `ppo.logprob_temperature`.
    data: whose prompts; None = those that training is evaluated on.
    ref_policy: for the KL; None = no KL and no score.
    reward_model: gives the score, to which the reward functions of the config
      add; None = they alone do.
  """
  data = run.data.eval if data is None else data
  count = min(num_prompts, len(data))
  models = (policy, ref_policy, reward_model)
  reward = run.text_reward(data) if ref_policy is not None else None
  parts = []
  for start in range(0, count, run.spec.rows):
    rows = np.arange(start, start + run.spec.rows) % len(data)
    prompts = prompt_batch(run, data, rows)
    parts.append(
        _judge_batch(
            run, prompts, run.spec.key(stream), temperature, models, reward
        )
    )
  return _joined(parts, count)


_Models = tuple[Model, Model | None, Model | None]


def _draw(
    run: Run,
    policy: Model,
    prompts: PromptBatch,
    key: Array,
    step: int,
    settings: SamplingSettings,
) -> Rollout:
  return layout.sample_responses(
      policy.params,
      prompts,
      key,
      step,
      layout=run.spec.decode_layout(policy.shape),
      settings=settings,
      num_rollouts=update.num_micro(
          run.spec.rows, run.config.rollout.batch_size
      ),
  )


def _judge_batch(
    run: Run,
    prompts: PromptBatch,
    key: Array,
    sampled_at: float,
    models: _Models,
    reward: Callable[..., np.ndarray] | None,
) -> Judged:
  settings = run.spec.sampling(sampled_at)
  rollout = _draw(run, models[0], prompts, key, 0, settings)
  texts, responses = _texts(run, rollout)
  numbers: dict[str, Any] = {}
  if models[1] is not None:
    numbers = _by_models(run, prompts, key, rollout, settings, models)
  tokens_BT = masking.response_tokens(rollout.sequences)
  mask_BT = rollout.sequences.response_mask_BT
  if reward is not None:
    given = (prompts.prompt_ids_B, tokens_BT, mask_BT)
    numbers['score'] = reward(*map(gathered, given)) + gathered(
        numbers.get('score', 0.0)
    )
  if run.gold is not None:
    numbers['gold'] = [
        run.gold(p, r) for p, r in zip(texts, responses, strict=True)
    ]
  numbers['length'] = mask_BT.sum(axis=1)
  is_eos_BT = tokens_BT == run.tokenizer.eos_token_id
  numbers['ended'] = is_eos_BT.any(axis=1)
  numbers['repeated'] = repetition(
      gathered(tokens_BT), gathered(mask_BT & ~is_eos_BT)
  )
  return Judged(
      texts,
      responses,
      {name: gathered(x).astype(np.float64) for name, x in numbers.items()},
  )


def _by_models(
    run: Run,
    prompts: PromptBatch,
    key: Array,
    rollout: Rollout,
    settings: SamplingSettings,
    models: _Models,
) -> dict[str, Array]:
  """`kl`, `policy_kl` and `score`, each [B], of the responses of `rollout`."""

  def measure(rollout: Rollout, temperature: float, models: _Models) -> dict:
    return _measure(
        Shared(tuple(model.params for model in models if model)),
        rollout,
        shapes=tuple(model.shape for model in models if model),
        temperature=temperature,
        num_micro=update.num_micro(
            run.spec.rows, run.config.ppo.micro_batch_size
        ),
    )

  policy, ref_policy, _ = models
  temperature = settings.temperature or 1.0
  if settings.temperature == run.config.rollout.temperature:
    temperature = run.spec.logprob_temperature
  found = measure(rollout, temperature, models)
  policy_kl_B = found['kl']
  plain = dataclasses.replace(settings, **_PLAIN)
  is_plain = settings == plain and temperature == plain.temperature
  if not is_plain and policy is not ref_policy:  # of one policy both are 0
    drawn = _draw(run, policy, prompts, key, 1, plain)
    policy_kl_B = measure(drawn, plain.temperature, models[:2])['kl']
  return found | {'policy_kl': policy_kl_B}
