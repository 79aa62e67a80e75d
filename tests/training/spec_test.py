"""What programs are made from: keys, sizes, sampling, and abstract batches."""

import jax
import numpy as np
import pytest

from ma_rlhf_jax.data import batches
from ma_rlhf_jax.parallel.mesh import place
from ma_rlhf_jax.training import spec as spec_lib
from tests import tiny


def test_each_stream_has_a_key_of_its_own() -> None:
  spec, other = tiny.spec(tiny.config()), tiny.spec(tiny.config(seed=1))
  names = spec_lib._STREAMS
  data = [
      tuple(np.asarray(jax.random.key_data(s.key(name))).tolist())
      for s in (spec, other)
      for name in names
  ]
  assert len(set(data)) == 2 * len(names) >= 12
  again = tiny.spec(tiny.config(ppo__kl_coef=0.5)).key('macro')
  assert jax.random.key_data(again).tolist() == list(data[names.index('macro')])
  with pytest.raises(ValueError):
    spec.key('no stream')


@pytest.mark.parametrize('given, want', [(0.0, 0.7), (1.0, 1.0), (0.3, 0.3)])
def test_logprobs_are_at_the_sampling_temperature_unless_given(
    given: float, want: float
) -> None:
  config = tiny.config(rollout__temperature=0.7, ppo__logprob_temperature=given)
  assert tiny.spec(config).logprob_temperature == want


def test_sampling_is_as_the_config_says() -> None:
  config = tiny.config(
      rollout__temperature=0.7,
      rollout__top_k=5,
      rollout__top_p=0.9,
      rollout__min_new_tokens=2,
      rollout__int8_cache=True,
      ppo__samples_per_prompt=3,
  )
  spec = tiny.spec(config)
  found = spec.sampling()
  assert (found.temperature, found.top_k, found.top_p) == (0.7, 5, 0.9)
  assert (found.min_new_tokens, found.max_new_tokens) == (2, 8)
  assert found.int8_cache
  assert (found.pad_id, found.eos_id) == (0, 1)
  assert spec.sampling(0.0).temperature == 0.0  # greedy, not the default
  assert spec.rows == 12  # 4 prompts, 3 samples of each


def test_sizes_follow_from_config_and_mesh() -> None:
  config = tiny.config(ppo__batch_size=5, ppo__samples_per_prompt=3)
  spec = tiny.spec(config, mesh=tiny.mesh(2, 3, 1), prompt_len=7)
  assert (spec.rows, spec.length, spec.batch_devices) == (15, 7 + 8, 6)


@pytest.mark.parametrize(('size', 'rows'), [(0, 12), (6, 6)])
def test_a_decoding_layout_is_made_for_the_rows_of_a_rollout(
    size: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = tiny.config(
      ppo__samples_per_prompt=3, rollout__batch_size=size, rollout__tensor=2
  )
  spec, seen = tiny.spec(config), []
  monkeypatch.setattr(
      spec_lib, 'make_layout', lambda *args, **how: seen.append((args, how))
  )
  spec.decode_layout(tiny.SHAPE)
  want = (tiny.SHAPE, spec.mesh, 2), {'rows': rows, 'columns': 14}
  assert seen == [want]


def test_abstract_batches_look_like_real_ones() -> None:
  mesh = tiny.mesh(2, 2, 1)
  spec = tiny.spec(tiny.config(), mesh=mesh)
  width = {'prompt_len': spec.prompt_len, 'pad_id': spec.pad_id}
  prompts = batches.prompt_batch(tiny.encoded(), range(8), **width)
  sequences = batches.sft_batch(
      tiny.encoded(), range(8), response_len=spec.response_len, **width
  )
  looks = lambda tree: jax.tree.map(
      lambda x: (x.shape, x.dtype, x.sharding), tree
  )
  with jax.set_mesh(mesh):
    assert looks(spec.abstract_prompts(8)) == looks(place(prompts, mesh, 8))
    found = spec.abstract_sequences(8)
    assert looks(found) == looks(place(sequences, mesh, 8))
    rollout, scored = spec.abstract_rollout(8)
  assert looks(rollout.sequences) == looks(found)
  assert rollout.kept_mass_BT.shape == scored.values_BT.shape == (8, 8)
  assert scored.score_B.shape == (8,) and scored.score_B.dtype == np.float32
