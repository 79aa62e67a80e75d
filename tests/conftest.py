"""Settings of all tests: eight CPU devices, strict shapes, `--slow`."""

from collections.abc import Iterator
import importlib.metadata
import os
import platform

import pytest

# Most of the time goes into compiling tiny programs, so they are optimised
# little. Flags that are set already stay as they are.
_FLAGS = {
    '--xla_force_host_platform_device_count': 8,
    '--xla_backend_optimization_level': 0,
}
# An unknown flag ends the process: these are known to jaxlib 0.10 and 0.11.
if importlib.metadata.version('jaxlib').startswith(('0.10.', '0.11.')):
  # Compiles in half the time.
  _FLAGS['--xla_cpu_use_fusion_emitters'] = 'false'
  if platform.machine() == 'x86_64':
    # Without fused multiply-add, what fuses with what rounds nothing else.
    _FLAGS['--xla_cpu_max_isa'] = 'AVX'

# Read by jax when it is imported.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
for _flag, _value in _FLAGS.items():
  if _flag not in os.environ.get('XLA_FLAGS', ''):
    _flags = f'{os.environ.get("XLA_FLAGS", "")} {_flag}={_value}'
    os.environ['XLA_FLAGS'] = _flags.strip()

import jax  # noqa: E402

# A [B] that meets a [B, T] is an error, not a silent [T, T].
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Lines of the source in compiled programs, which take time and nobody reads.
jax.config.update('jax_include_full_tracebacks_in_locations', False)
jax.config.update('jax_traceback_in_locations_limit', 0)


@pytest.fixture(scope='module', autouse=True)
def _forget_programs() -> Iterator[None]:
  """Or a process would keep gigabytes of them."""
  yield
  jax.clear_caches()


def pytest_addoption(parser: pytest.Parser) -> None:
  """Adds --slow."""
  parser.addoption(
      '--slow', action='store_true', help='also run the tests marked slow'
  )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
  """Skips tests marked slow unless --slow is given."""
  if config.getoption('--slow'):
    return
  for item in items:
    if 'slow' in item.keywords:
      item.add_marker(pytest.mark.skip(reason='slow: runs with --slow'))
