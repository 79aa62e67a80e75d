"""Weights that several models share, as one argument of a program.

Adapters share what they do not teach with the model they started from. Given
twice, such an array is there once, but a compiler counts it twice against the
memory of a device, and refuses what would fit.
"""

from typing import Any

import jax


@jax.tree_util.register_pytree_node_class
class Shared:
  """A tree whose leaves are told apart by identity, each of them once.

  Attributes:
    tree: of any structure; inside a traced function, with all leaves in place.
  """

  def __init__(self, tree: Any):
    self.tree = tree

  def tree_flatten(self) -> tuple[list[Any], tuple]:
    leaves, structure = jax.tree.flatten(self.tree)
    first = {id(leaf): place for place, leaf in reversed([*enumerate(leaves)])}
    places = sorted(first.values())
    number = {place: index for index, place in enumerate(places)}
    which = tuple(number[first[id(leaf)]] for leaf in leaves)
    return [leaves[place] for place in places], (structure, which)

  @classmethod
  def tree_unflatten(cls, how: tuple, leaves: list[Any]) -> 'Shared':
    structure, which = how
    return cls(jax.tree.unflatten(structure, [leaves[i] for i in which]))
