"""How a process that computes on CPUs keeps its memory."""

import ctypes
import importlib.metadata
import importlib.util

import jax

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def _only_cpus() -> bool:
  """Whether jax can find no other devices; starts no backend."""
  if platforms := jax.config.jax_platforms:
    return platforms == 'cpu'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return not plugins and not importlib.util.find_spec('libtpu')


def keep_freed() -> bool:
  """Keeps what a program on CPUs frees for the next one; whether it could.

  XLA asks for the temporaries of a program each time it runs. glibc maps such
  large blocks anew, and the kernel fills every page with zeros: a fifth of a
  step. The process then never gives memory back: it stays as large as it has
  been. Where devices have memory of their own, nothing changes.

  Call it before jax starts threads: those that allocated before go on as they
  did.
  """
  if not _only_cpus():
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # another C library
    return False
  settings = {
      _M_MMAP_MAX: 0,
      _M_TRIM_THRESHOLD: -1,  # never
      # Other arenas than the first hold no large blocks.
      _M_ARENA_MAX: 1,
  }
  return all([mallopt(name, value) for name, value in settings.items()])
