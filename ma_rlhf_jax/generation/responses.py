"""Responses to any number of prompts, one batch after the other."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np

from ma_rlhf_jax.generation import batching
from ma_rlhf_jax.models.presets import GemmaConfig
from ma_rlhf_jax.parallel.mesh import place
from ma_rlhf_jax.rollout import decode, sampling, scoring
from ma_rlhf_jax.structs import Array, Params, PromptBatch, SequenceBatch

Model = tuple[GemmaConfig, Params]


class Response(NamedTuple):
  """One finished response.

  Attributes:
    row: index of its prompt.
    sample: which of several responses to that prompt.
    ids: its tokens, EOS included where it ended by itself.
    logprob: nats, the sum over `ids` under the model itself: at temperature
      1, without filters.
    score: of the reward model, or None.
  """

  row: int
  sample: int
  ids: list[int]
  logprob: float
  score: float | None


@dataclasses.dataclass(frozen=True)
class Models:
  """What draws and what scores, on the devices of one mesh.

  Attributes:
    mesh: the devices.
    policy: shape and parameters.
    reward_model: shape and parameters, or None.
  """

  mesh: jax.sharding.Mesh
  policy: Model
  reward_model: Model | None = None

  @property
  def multiple(self) -> int:
    """What the rows of a batch must be a multiple of."""
    return self.mesh.shape['data'] * self.mesh.shape['fsdp']


@functools.partial(jax.jit, static_argnames=('shape', 'settings'))
def _draw(
    params: Params,
    prompts: PromptBatch,
    stream_key: Array,
    *,
    shape: GemmaConfig,
    settings: decode.SamplingSettings,
) -> tuple[SequenceBatch, Array]:
  """The sequences, and the log-prob [B] of each response."""
  keys_B = row_keys(stream_key, prompts)
  rollout = decode.generate(shape, params, prompts, keys_B, settings)
  logprobs_BT, _ = scoring.response_logprobs(
      shape, params, rollout.sequences, temperature=1.0
  )
  return rollout.sequences, logprobs_BT.sum(axis=1)


_score = jax.jit(scoring.sequence_scores, static_argnums=0)


def row_keys(stream_key: Array, prompts: PromptBatch) -> Array:
  """The random keys [B]: of the seed, the prompt and the sample alone."""
  return sampling.row_keys(
      stream_key, 0, prompts.prompt_ids_B, prompts.sample_ids_B
  )


def batch_rows(wanted: int, responses: int, multiple: int) -> int:
  """Rows of a batch: `wanted`, or fewer where there are fewer responses.

  Args:
    wanted: --batch_size.
    responses: to draw in all.
    multiple: the rows are rounded up to a multiple of it.
  """
  return -(-min(wanted, responses) // multiple) * multiple


def respond(
    models: Models,
    prompts: Sequence[Sequence[int]],
    settings: decode.SamplingSettings,
    *,
    num_samples: int,
    seed: int,
    batch_size: int,
) -> Iterator[list[Response]]:
  """Draws `num_samples` responses to each prompt, and yields batch by batch.

  A response depends on the seed, the ids of its prompt, how often the same
  prompt stood before, and which sample it is; neither on other prompts nor on
  the batch size, but where two tokens are as likely as each other up to
  rounding, which differs with the size of arrays.

  Args:
    models: on their devices, under `jax.set_mesh` of their mesh.
    prompts: ids of each, BOS first.
    settings: how to sample.
    num_samples: responses to each prompt.
    seed: of all draws, in [0, 2^32).
    batch_size: responses drawn at once; rounded up to a multiple of the
      devices that hold rows.

  Raises:
    ValueError: if a log-prob or score is no finite number.
  """
  stream_key = jax.random.key(seed)
  keys = batching.prompt_keys(prompts)
  total = len(prompts) * num_samples
  rows = batch_rows(batch_size, total, models.multiple)
  shape, params = models.policy
  for batch in batching.plan([len(p) for p in prompts], num_samples, rows):
    made = batching.prompt_batch(
        batch, prompts, keys, rows=rows, pad_id=settings.pad_id
    )
    made = place(made, models.mesh)
    sequences, logprobs_B = _draw(
        params, made, stream_key, shape=shape, settings=settings
    )
    scores_B = None
    if models.reward_model is not None:
      scores_B = _score(*models.reward_model, sequences)
    yield _finished(batch, *jax.device_get((sequences, logprobs_B, scores_B)))


def _finished(
    batch: batching.Batch,
    sequences: SequenceBatch,
    logprobs_B: np.ndarray,
    scores_B: np.ndarray | None,
) -> list[Response]:
  tokens_BT = sequences.tokens_BL[:, batch.width :]
  made = []
  for place_, (row, sample) in enumerate(batch.items):
    ids = tokens_BT[place_][sequences.response_mask_BT[place_]].tolist()
    score = None if scores_B is None else float(scores_B[place_])
    logprob = float(logprobs_B[place_])
    if not np.isfinite([logprob, score or 0.0]).all():
      raise ValueError(
          f'prompt {row + 1} got a response of log-prob {logprob} and score '
          f'{score}; a model gives numbers that are not finite: look for nan '
          'in its weights, or try --dtype=float32'
      )
    made.append(Response(row, sample, ids, logprob, score))
  return made
