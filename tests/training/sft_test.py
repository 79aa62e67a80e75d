"""Which tokens SFT learns, and its losses against a plain loop over tokens."""

from collections.abc import Callable
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ma_rlhf_jax.models.gemma import hidden_states
from ma_rlhf_jax.models.vocabulary import head_logits
from ma_rlhf_jax.structs import Params, SequenceBatch
from ma_rlhf_jax.training import sft, update
from ma_rlhf_jax.training.sft import LOSS_ON, SFT
from tests import other_kernel, tiny, tolerance

_ = tiny.PAD
_EOS, _BOS = tiny.EOS, tiny.BOS


def _by_hand() -> SequenceBatch:
  """P = 3, T = 4; the last row fills up a batch."""
  tokens_BL = [
      [_, _BOS, 5, 6, 7, _EOS, _],
      [_BOS, 8, 9, _EOS, _, _, _],
      [_, _, _, _, _, _, _],
  ]
  mask_BL = jnp.asarray(tokens_BL, jnp.int32) != _
  return SequenceBatch(
      tokens_BL=jnp.asarray(tokens_BL, jnp.int32),
      mask_BL=mask_BL,
      response_mask_BT=mask_BL[:, 3:],
  )


@pytest.mark.parametrize(
    'loss_on, tokens, learned',
    [
        # of the columns 3..6
        ('response', [_, _BOS, 5, 6, 7, _EOS, _], ['1110', '1000', '0000']),
        # of the columns 1..6; what follows padding on the left is BOS
        ('text', [_, _BOS, 5, 6, 7, _EOS, _], ['011110', '111000', '000000']),
        # of the columns 1..6 after moving left
        (
            'everything',
            [_BOS, 5, 6, 7, _EOS, _, _],
            ['111111', '111111', '000000'],
        ),
    ],
)
def test_what_is_learned(
    loss_on: str, tokens: list[int], learned: list[str]
) -> None:
  tokens_BL, mask_BL, learned_BW = LOSS_ON[loss_on](_by_hand())
  assert tokens_BL[0].tolist() == tokens
  assert mask_BL[0].tolist() == [token != _ for token in tokens]
  assert learned_BW.dtype == bool
  found = [''.join('01'[x] for x in row) for row in learned_BW.tolist()]
  assert found == learned


def _stage(workdir: pathlib.Path, **fields: Any) -> SFT:
  """SFT of the tiny model on the rows of `tiny.encoded`."""
  config = tiny.config(**{'sft__steps': 12, 'sft__batch_size': 3, **fields})
  run = tiny.run(workdir, config)
  return SFT(run, tiny.SHAPE, tiny.params('policy', 3))


@jax.jit
def _logits(params: Params, tokens_BL: jax.Array, mask_BL: jax.Array):
  hidden_BLD = hidden_states(tiny.SHAPE, params, tokens_BL, mask_BL)
  return head_logits(hidden_BLD, params['embedding'], softcap=0.0)


def _plain_loss(loss_on: str) -> float:
  """Mean negative log-likelihood of the held-out tokens, one by one."""
  batch = tiny.sequences(list(range(8)))
  tokens, mask = np.asarray(batch.tokens_BL), np.asarray(batch.mask_BL)
  first = {'response': tiny.PROMPT_LEN, 'text': 1, 'everything': 1}[loss_on]
  if loss_on == 'everything':
    starts = [int(np.argmax(row)) for row in mask]
    tokens = np.stack(
        [np.roll(r, -s) for r, s in zip(tokens, starts, strict=True)]
    )
    mask = np.stack([np.roll(r, -s) for r, s in zip(mask, starts, strict=True)])
  logits = np.asarray(
      _logits(tiny.params('policy', 3), tokens, mask), np.float64
  )
  nll = []
  for row in range(8):
    for column in range(first, tokens.shape[1]):
      real = mask[row, column] and tokens[row, column] != _BOS
      if real or loss_on == 'everything':
        x = logits[row, column - 1]
        log_z = np.log(np.sum(np.exp(x - x.max()))) + x.max()
        nll.append(log_z - x[tokens[row, column]])
  return sum(nll) / len(nll)


@pytest.mark.parametrize('loss_on', ['response', 'text', 'everything'])
def test_held_out_loss_is_the_mean_over_tokens_whatever_the_batches(
    tmp_path: pathlib.Path, loss_on: str
) -> None:
  # 8 rows in batches of 3, 3 and 2
  stage = _stage(tmp_path, sft__loss_on=loss_on)
  found = stage.evaluate(stage.states)
  assert found == {'eval/loss': pytest.approx(_plain_loss(loss_on), rel=1e-5)}


@pytest.mark.parametrize('loss_on', ['everything', 'response'])
def test_what_a_kernel_says_at_padding_changes_no_loss(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, loss_on: str
) -> None:
  want = _plain_loss(loss_on)
  other_kernel.install(monkeypatch)
  stage = _stage(tmp_path, sft__loss_on=loss_on)
  found = stage.evaluate(stage.states)
  assert found == {'eval/loss': pytest.approx(want, rel=1e-5)}


@pytest.mark.slow
def test_the_loss_falls_on_rows_that_come_again(
    tmp_path: pathlib.Path,
) -> None:
  stage = _stage(tmp_path, sft__optim__lr=2e-2, sft__optim__weight_decay=0.0)
  states = stage.states
  before = stage.evaluate(states)['eval/loss']
  found = []
  for index in range(12):
    states, metrics = stage.step(states, index)
    found.append({name: float(x) for name, x in metrics.items()})
  assert sorted(found[0]) == [
      'loss/sft',
      'policy/grad_norm',
      'policy/lr',
      'tokens',
  ]
  assert stage.evaluate(states)['eval/loss'] < before - 0.5
  assert found[-1]['loss/sft'] < found[0]['loss/sft']
  assert int(states['policy'].step) == 12
  # one update of warm-up (0.1 * 12), then a cosine from 0.02 down to 0
  assert [m['policy/lr'] for m in found[:2]] == pytest.approx([0.02, 0.02])
  assert 0 < found[-1]['policy/lr'] < 0.001
  lengths = stage.data.prompt.lengths() + stage.data.chosen.lengths()
  assert found[0]['tokens'] == lengths[stage.rows(0)].sum()


@pytest.mark.slow
def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
  logprobs = functools.partial(
      sft.learned_logprobs,
      shape=tiny.SHAPE,
      loss_on='response',
  )
  start = tiny.params('policy', 3)
  batch = tiny.sequences([3, 1, 4, 0, 5, 2])

  def less_gradient(num_micro: int) -> Callable[[Params], tuple]:
    step = functools.partial(
        sft._step,
        logprobs=logprobs,
        loss_on='response',
        optimizer=optax.sgd(1.0),
        num_micro=num_micro,
    )
    step = jax.jit(step)

    def run(params: Params) -> tuple[Params, dict[str, jax.Array]]:
      params = jax.tree.map(jnp.asarray, params)
      state = update.init_state(params, optax.sgd(1.0))
      state, metrics = step(state, {}, batch)
      return state.params, metrics

    return run

  whole, cut = less_gradient(1), less_gradient(3)
  # The longest sums of a gradient go over all tokens.
  bounds = tolerance.of_sums(whole, (start,), batch.tokens_BL.size)
  tolerance.assert_close(cut(start), whole(start), bounds)
  moved = jax.tree.map(jnp.subtract, whole(start)[0], start)
  for x, bound in zip(jax.tree.leaves(moved), bounds, strict=False):
    assert np.abs(x).max() > 100 * bound
