"""Weights that several models share, as one argument of a program.

Adapters share what they do not teach with the model they started from. Given
twice, such an array is there once, but a compiler counts it twice against the
memory of a device, and refuses what would fit.
"""

from typing import Any

import jax


@jax.tree_util.register_pytree_with_keys_class
class Shared:
  """A tree whose leaves are told apart by identity, each of them once.

  Its paths are those of the first places. For arrays, and descriptions of
  such: mapped to what Python holds once, like 0, different leaves become one.

  Attributes:
    tree: of any structure; inside a traced function, with all leaves in place.
  """

  def __init__(self, tree: Any):
    self.tree = tree

  def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple]:
    found, structure = jax.tree_util.tree_flatten_with_path(self.tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
    keys = [jax.tree_util.DictKey(name(path)) for path, _ in found]
    leaves, how = self._flat([leaf for _, leaf in found], structure)
    return [(keys[place], leaf) for place, leaf in leaves], how

  def tree_flatten(self) -> tuple[list[Any], tuple]:
    leaves, how = self._flat(*jax.tree.flatten(self.tree))
    return [leaf for _, leaf in leaves], how

  def _flat(
      self, leaves: list[Any], structure: Any
  ) -> tuple[list[tuple[int, Any]], tuple]:
    """(place, leaf) of each leaf where it stands first, and how to go back."""
    first = {id(leaf): place for place, leaf in reversed([*enumerate(leaves)])}
    places = sorted(first.values())
    number = {place: index for index, place in enumerate(places)}
    which = tuple(number[first[id(leaf)]] for leaf in leaves)
    return [(place, leaves[place]) for place in places], (structure, which)

  @classmethod
  def tree_unflatten(cls, how: tuple, leaves: list[Any]) -> 'Shared':
    structure, which = how
    return cls(jax.tree.unflatten(structure, [leaves[i] for i in which]))
