"""The pytrees that travel between the stages of a step, and the axis letters.

Arrays end in their axes:

  B  sequences          P  prompt columns      T  response columns
  L  P + T              M  macro actions       V  vocabulary
  D  model width        F  mlp width           N  query heads
  K  kv heads           H  head size           S  cache slots
  X  layers             C  tokens in a chunk   (in the vocabulary head)

`masking.py` draws the token layout. Each struct is made in one place and only
read afterwards: PromptBatch (data.batches) -> Rollout (rollout.decode) ->
Scored (rollout.scoring) -> MacroActions (macro.termination) ->
Targets (objective.targets) -> TrainState (training.update).
"""

from typing import Any, NamedTuple

from flax import struct
import jax

Array = jax.Array
Params = Any


class Models(NamedTuple):
  """One thing for each of the models of PPO: configs, or parameters.

  Without a critic (`ppo.baseline=rloo`) its entry is None.
  """

  policy: Any
  ref_policy: Any
  critic: Any
  reward_model: Any


@struct.dataclass
class PromptBatch:
  """Prompts, padded on the left.

  Attributes:
    tokens_BP: int32 token ids; padding holds the pad id.
    mask_BP: bool, true on real tokens (BOS included).
    prompt_ids_B: int32, the row of the prompt in its data set. With
      `sample_ids_B` it seeds the sampling of this row, whatever its neighbours.
    sample_ids_B: int32, which of several samples of one prompt this row is.
    limits_B: int32, tokens after which each response is cut; None = T of all.
  """

  tokens_BP: Array
  mask_BP: Array
  prompt_ids_B: Array
  sample_ids_B: Array
  limits_B: Array | None = None


@struct.dataclass
class SequenceBatch:
  """Prompt + response rows in the layout of `masking.py`.

  Attributes:
    tokens_BL: int32 token ids, pad id on padding.
    mask_BL: bool, true on real tokens.
    response_mask_BT: bool, `mask_BL` of the response columns; its width says
      where the response starts.
  """

  tokens_BL: Array
  mask_BL: Array
  response_mask_BT: Array


@struct.dataclass
class PairBatch:
  """Preference pairs; both rows share the prompt columns.

  Attributes:
    chosen: the preferred sequences.
    rejected: the others.
  """

  chosen: SequenceBatch
  rejected: SequenceBatch


@struct.dataclass
class Rollout:
  """Prompts with sampled responses.

  Attributes:
    sequences: tokens and masks; EOS is the last real token of a response that
      ended by itself.
    sample_logprobs_BT: float, nats, log-probability of each token under the
      distribution it was drawn from (temperature, top-k and top-p applied); 0
      on padding.
    kept_mass_BT: float in (0, 1], the mass of the tempered distribution that
      top-k and top-p left; 1 on padding.
  """

  sequences: SequenceBatch
  sample_logprobs_BT: Array
  kept_mass_BT: Array


@struct.dataclass
class Scored:
  """What the four models say about a rollout; 0 on padding.

  Attributes:
    logprobs_BT: float, nats, of the response tokens under the policy that
      sampled them (the `old_logprobs` of the PPO ratio).
    ref_logprobs_BT: float, nats, under the reference policy.
    entropy_BT: float, nats, of the policy's next-token distribution.
    values_BT: float, reward-model units, critic's value of the state in which
      response token t is chosen.
    score_B: float, reward-model units, at the last real token.
    Of models that were not asked the entries are None.
  """

  logprobs_BT: Array | None = None
  ref_logprobs_BT: Array | None = None
  entropy_BT: Array | None = None
  values_BT: Array | None = None
  score_B: Array | None = None


@struct.dataclass
class MacroActions:
  """Which macro action each response token belongs to.

  Attributes:
    ids_BT: int32, 0, 1, 2, ... from the first response token on; T on padding,
      which `segment_sum` drops.
    starts_BT: bool, true on the first token of each macro action.
    mask_BT: bool, true on real response tokens.
    empty_B: int32, the macro action before which an empty step of reward 0 and
      value 0 takes part in the estimation, T where there is none; None = none
      at all. Only `macro.authors` makes such steps.
  """

  ids_BT: Array
  starts_BT: Array
  mask_BT: Array
  empty_B: Array | None = None


@struct.dataclass
class Targets:
  """What the PPO losses aim at; 0 on padding.

  Attributes:
    advantages_BT: float, reward-model units.
    returns_BT: float, reward-model units, regression target of the critic.
  """

  advantages_BT: Array
  returns_BT: Array


@struct.dataclass
class LossWeights:
  """What each token of a batch counts; 0 on padding.

  Attributes:
    loss_BT: float, in the loss, of which they are all the normalisation.
    metric_BT: float, in the metrics beside it; they add up to 1.
  """

  loss_BT: Array
  metric_BT: Array


@struct.dataclass
class Experience:
  """All that an update reads, one row per sampled response.

  Attributes:
    sequences: tokens and masks.
    scored: log-probs, values and scores from before the update.
    macro: the macro actions.
    targets: advantages and returns.
  """

  sequences: SequenceBatch
  scored: Scored
  macro: MacroActions
  targets: Targets


@struct.dataclass
class TrainState:
  """One trained model.

  Attributes:
    step: int32 scalar, optimizer updates done.
    params: the parameter tree.
    opt_state: the optax state.
  """

  step: Array
  params: Params
  opt_state: Any
