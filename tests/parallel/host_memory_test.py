"""Freed memory comes back without the kernel: no page is faulted in again."""

import subprocess
import sys
import textwrap

import pytest

_PROGRAM = textwrap.dedent("""
    import platform, resource, sys
    import numpy as np
    from ma_rlhf_jax.parallel import host_memory

    def faults():
      before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
      np.ones(2**28 + 2**27).sum()  # 3 GiB: the largest threshold is 2
      return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    if platform.libc_ver()[0] != 'glibc':
      sys.exit(99)
    first = faults()
    assert host_memory.keep_freed()
    faults()
    print(first, faults())
""")


def test_freed_memory_is_kept() -> None:
  done = subprocess.run(
      [sys.executable, '-c', _PROGRAM], capture_output=True, text=True
  )
  if done.returncode == 99:
    pytest.skip('another C library')
  assert done.returncode == 0, done.stderr
  fresh, kept = map(int, done.stdout.split())
  assert kept < fresh / 10
