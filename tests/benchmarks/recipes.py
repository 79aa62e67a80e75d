"""The recipe that a benchmark measures, from its flags."""

import argparse
import ast
import importlib

from ml_collections import ConfigDict


def parser(doc: str) -> argparse.ArgumentParser:
  """Flags that all benchmarks of a recipe share."""
  made = argparse.ArgumentParser(description=doc.splitlines()[0])
  made.add_argument('--recipe', default='tiny', help='a file of configs/')
  made.add_argument('--runs', type=int, default=10)
  made.add_argument(
      '--set', nargs='*', default=[], metavar='FIELD=VALUE', dest='fields'
  )
  return made


def read(flags: argparse.Namespace, words: str = '') -> ConfigDict:
  """The recipe with `words` after its colon and the fields of `--set`."""
  config = importlib.import_module(f'configs.{flags.recipe}').get_config(words)
  for given in flags.fields:
    name, _, value = given.partition('=')
    try:
      value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      pass  # text
    config.update_from_flattened_dict({name: value})
  return config
