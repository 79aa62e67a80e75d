"""A request and its models on the devices: what `generate` works with."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from ma_rlhf_jax.data import prompts as prompts_lib
from ma_rlhf_jax.generation import chat, finished, records, streaming
from ma_rlhf_jax.generation.request import Request
from ma_rlhf_jax.generation.responses import Models, Response, respond
from ma_rlhf_jax.parallel.mesh import matmul_precision
from ma_rlhf_jax.rollout import decode

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


class Found(NamedTuple):
  """The models of a request, checked but not loaded.

  Attributes:
    policy: draws; its tokenizer counts.
    reward_model: scores; None = nothing does.
  """

  policy: finished.Finished
  reward_model: finished.Finished | None

  @property
  def models(self) -> list[finished.Finished]:
    """Those that there are."""
    return [model for model in self if model is not None]


def find(request: Request) -> Found:
  """The models that a request names.

  Raises:
    SourceError: if one cannot be used, or they do not fit together.
  """
  default = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  dtype = request.dtype or default
  policy = finished.find('model', request.model, dtype)
  scorer = None
  if request.reward_model:
    scorer = finished.find('reward_model', request.reward_model, dtype)
  finished.check_pair(policy, scorer)
  return Found(policy, scorer)


def encode(
    request: Request,
    tokenizer: 'PreTrainedTokenizerBase',
    texts: Sequence[str],
    names: Sequence[str],
) -> list[list[int]]:
  """Ids of prompts, BOS first.

  Args:
    request: says how long they may be.
    tokenizer: of the policy.
    texts: the prompts.
    names: of each, for messages.

  Raises:
    ValueError: if one is too long.
  """
  where = f'--input={request.input}' if request.input else '--prompt'
  ids = prompts_lib.encode(tokenizer, texts)
  lengths = [len(row) for row in ids]
  prompts_lib.check_lengths(where, names, lengths, request.prompt_limit)
  return ids


@dataclasses.dataclass(frozen=True)
class Session:
  """A request whose models are on the devices.

  Attributes:
    request: what is asked.
    models: policy and reward model.
    tokenizer: of both.
  """

  request: Request
  models: Models
  tokenizer: 'PreTrainedTokenizerBase'

  @property
  def settings(self) -> decode.SamplingSettings:
    """How responses are drawn."""
    return decode.SamplingSettings(
        max_new_tokens=self.request.max_new_tokens,
        temperature=self.request.temperature,
        top_k=self.request.top_k,
        top_p=self.request.top_p,
        eos_id=self.tokenizer.eos_token_id,
        pad_id=self.tokenizer.pad_token_id,
    )

  def respond(
      self, prompts: Sequence[Sequence[int]]
  ) -> Iterator[list[Response]]:
    """Batches of responses to prompts given as ids."""
    return respond(
        self.models,
        prompts,
        self.settings,
        num_samples=self.request.num_samples,
        seed=self.request.seed,
        batch_size=self.request.batch_size,
    )

  def rows(
      self, given: Mapping[str, Any], responses: Sequence[Response]
  ) -> list[dict[str, Any]]:
    """What is written for one row of prompts."""
    spell = functools.partial(streaming.plain_text, self.tokenizer)
    return records.rows(given, responses, spell)

  def prompt_ids(self, text: str) -> list[int]:
    """BOS and the ids of a prompt of any length."""
    return prompts_lib.encode(self.tokenizer, [text])[0]

  def fits(self, text: str) -> bool:
    """Whether a prompt is short enough."""
    return len(self.prompt_ids(text)) <= self.request.prompt_limit

  def answer(self, text: str) -> Iterator[str]:
    """The pieces of the assistant's answer to a conversation so far."""
    return streaming.speak(
        self.models,
        self.tokenizer,
        self.prompt_ids(text),
        self.settings,
        seed=self.request.seed,
        stop=chat.HUMAN,
    )


@contextlib.contextmanager
def opened(request: Request, found: Found) -> Iterator[Session]:
  """A session with the models loaded onto all local devices.

  Raises:
    SourceError: if the devices cannot split a model, or it cannot be read.
  """
  mesh = finished.make_mesh(request.tensor)
  with jax.set_mesh(mesh), matmul_precision(request.matmul_precision):
    for model in found.models:
      finished.check_mesh(model, request.tensor)
    loaded = [(model.shape, model.load()) for model in found.models]
    yield Session(request, Models(mesh, *loaded), found.policy.tokenizer)
