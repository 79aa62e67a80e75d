"""Reads a recipe: a Python file whose `get_config` makes a config.

What is wrong with one is told with its file, its line and the cause.
"""

from collections.abc import Callable
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import traceback
import types

from ml_collections import ConfigDict

from ma_rlhf_jax import registry
from ma_rlhf_jax.arguments import ArgumentError
from ma_rlhf_jax.config import base, flatten

_MOST = 300  # characters of a line of a message
# What ml_collections says where a field is set that there is not.
_NO_FIELD = re.compile(r'^Key "(\w+)" does not exist and cannot be added.*')


class RecipeError(Exception):
  """A recipe cannot be used; the message has at most three lines."""


class _Named:
  """What a recipe raises becomes a `RecipeError` with its file and line.

  A recipe is the user's code and may raise anything; what does not come out of
  its file, or out of what it calls, goes on its way.
  """

  def __init__(self, path: str) -> None:
    self._path = path

  def __enter__(self) -> None:
    pass

  def __exit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: types.TracebackType | None,
  ) -> None:
    if not isinstance(error, Exception) or isinstance(error, RecipeError):
      return
    if isinstance(error, ArgumentError):  # not the fault of the file
      raise RecipeError(str(error)) from error
    lines = _lines(self._path, trace)
    if isinstance(error, SyntaxError) and not lines:
      lines = [error.lineno]
    if lines:
      raise _error(self._path, lines[-1], f'{kind.__name__}: {words(error)}')


def _lines(path: str, trace: types.TracebackType | None) -> list[int]:
  """The lines of a file that a traceback goes through, the innermost last."""
  path = os.path.abspath(path)
  return [
      frame.lineno
      for frame in traceback.extract_tb(trace)
      if os.path.abspath(frame.filename) == path
  ]


def _error(path: str, line: int | None, cause: str) -> RecipeError:
  where = f'{path}, line {line}' if line else path
  return RecipeError(f'{where}: {cause}')


def words(error: BaseException) -> str:
  """The message of an error in at most two lines."""
  if isinstance(error, SyntaxError):
    return str(error.msg)
  inner = error if isinstance(error, KeyError) else next(iter(error.args), '')
  inner = isinstance(inner, KeyError) and inner.args  # of ml_collections
  text = str(inner[0] if inner else error)
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if not lines:
    return type(error).__name__
  first = _NO_FIELD.sub(r"'\1'", lines[0])[:_MOST]
  hints = [line for line in lines[1:] if line.startswith('Did you mean')]
  told = f'the config has no field {first}' if inner else first
  return '\n'.join([told, *hints[:1]])


def load(named: str) -> ConfigDict:
  """The config of `path.py:arguments`, locked.

  Raises:
    RecipeError: if there is none.
  """
  path, colon, arguments = named.partition(':')
  with _Named(path):
    make = getattr(_module(path), 'get_config', None)
    if not callable(make):
      raise RecipeError(
          f'{path}: it defines no get_config; write `def get_config(arguments='
          "''):`, which returns a config"
      )
    given = (arguments,) if colon else ()
    line = _check_signature(path, make, given)
    config = make(*given)
  _check_config(path, line, config)
  config.lock()
  return config


def _module(path: str) -> types.ModuleType:
  """The file as a module, run."""
  loader = importlib.machinery.SourceFileLoader('recipe', path)
  spec = importlib.util.spec_from_loader('recipe', loader)
  module = importlib.util.module_from_spec(spec)
  sys.modules['recipe'] = module  # where dataclasses look for their module
  registry.look_in(os.path.dirname(os.path.abspath(path)))
  try:
    loader.exec_module(module)
  except (UnicodeDecodeError, ValueError) as error:
    if _lines(path, error.__traceback__):
      raise
    raise RecipeError(f'{path}: it is no Python: {words(error)}') from error
  return module


def _check_signature(
    path: str, make: Callable[..., ConfigDict], given: tuple[str, ...]
) -> int | None:
  """The line of get_config, once it is known to take what it is given."""
  code = getattr(make, '__code__', None)
  line = code and code.co_firstlineno
  try:
    inspect.signature(make).bind(*given)
  except TypeError as error:
    raise _error(
        path,
        line,
        f"get_config {error}; write `def get_config(arguments=''):`",
    ) from error
  return line


def _check_config(path: str, line: int | None, config: ConfigDict) -> None:
  """Raises where get_config has made something else than a whole config."""
  if not isinstance(config, ConfigDict):
    raise _error(
        path,
        line,
        f'get_config returned {type(config).__name__}, not a config; end it '
        'with `return config`',
    )
  wanted, found = set(flatten(base())), set(flatten(config))
  if wrong := sorted(wanted ^ found):
    raise _error(
        path,
        line,
        f'get_config returned a config without, or with unknown, fields '
        f'{", ".join(wrong[:5])}; begin it with `config = base()`',
    )
