"""Our side of a comparison with other trainers, on one CPU workload.

An extra peer of `run_all.py` of the comparison, whose folder `PEERS` names:

    PEERS=.../peers python tests/benchmarks/peer.py --workload W1 --json FILE

A thin caller of the bench: its programs, weights and prompts, and their clocks.
"""

import os
import pathlib
import sys

sys.path.insert(0, os.environ.get('PEERS', os.getcwd()))
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import peer_common  # noqa: E402


def _config(wl):
  from ma_rlhf_jax import config as config_lib

  c = config_lib.base()
  c.model.vocab_size, c.model.num_layers = wl.vocab, wl.layers
  c.model.embed_dim, c.model.mlp_dim = wl.hidden, wl.mlp
  c.model.num_heads, c.model.num_kv_heads = wl.heads, wl.kv_heads
  c.model.head_dim = wl.head_dim
  c.ppo.batch_size, c.ppo.steps = wl.batch, 100
  c.ppo.optim.lr = c.critic.optim.lr = 1e-6
  c.rollout.temperature, c.rollout.top_k = wl.temperature, wl.top_k
  c.data.max_prompt_len, c.data.max_response_len = wl.prompt_len, wl.new_tokens
  return c


def main() -> None:
  """Measures and writes what `run_all.py` merges."""
  parser = peer_common.parser(__doc__)
  args = parser.parse_args()
  report = peer_common.Report('ours', args)
  peer_common.limit_threads(args.threads)
  import jax

  from ma_rlhf_jax.parallel import host_memory

  host_memory.keep_freed()  # as `train` does
  jax.devices()  # its threads exist now
  peer_common.release_affinity()
  from ma_rlhf_jax.benching import workload

  report.versions['jax'] = jax.__version__
  report.mark('imported')
  wl, clock = report.wl, report.clock
  config = _config(wl)
  from ma_rlhf_jax.parallel.mesh import make_mesh
  from ma_rlhf_jax.ppo import step

  with jax.set_mesh(make_mesh(config.mesh)):
    work = workload.make(config)
    programs, states = work.programs, work.states
    report.mark('built')
    for index in range(max(args.warmup, 1) + args.iters):
      report.turn()
      clock.new_iteration()
      with clock.phase('iteration'):
        prompts = work.prompts(index, wl.prompts(index))
        with clock.phase('rollout'):
          rollout = step.respond(programs, states, prompts, index)
          jax.block_until_ready(rollout)
        with clock.phase('update'):
          states, metrics = step.learn(
              programs, states, prompts, rollout, index
          )
          jax.block_until_ready((states, metrics))
  lengths = rollout.sequences.response_mask_BT.sum()
  report.extra['completion_mask_sum'] = int(lengths)
  report.extra['response_tokens'] = wl.batch * wl.new_tokens
  report.notes.append('scores and gradients in one pass: no experience phase')
  report.write()


if __name__ == '__main__':
  main()
