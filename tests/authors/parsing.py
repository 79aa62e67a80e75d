"""Where the parsing rule of the authors' code puts its boundaries.

It walks sentence by sentence and adds up tokens, so whatever stands between
sentences (newlines, blanks before them) is not counted, and every boundary
after it is that many tokens early:

  I like tea. \\n You like coffee     tokens   0 1 2 3 | 4 | 5 6 7
  boundaries 0, 4, 7                  "You" is token 5, its boundary is 4

For comparison only: training with their variant refuses this rule, because it
fails on many responses (see `boundaries`); `macro.parsing` is ours.

Source: ernie-research/MA-RLHF, dschat/rlhf/ppo_trainer.py (arXiv 2410.02743).
"""

from collections.abc import Callable, Sequence

from ma_rlhf_jax.macro import parsing

Tokenize = Callable[[str], Sequence[str]]


class AuthorsError(ValueError):
  """Here the authors' code raises an error that nothing catches."""


def _leaf_counts(
    leaves: Sequence[str], sentence: str, tokenize: Tokenize
) -> list[int]:
  """Tokens of each leaf, tokenised alone with the blank before it."""
  counts, cursor = [], 0
  for leaf in leaves:
    place = sentence.find(leaf, cursor)
    if place < 0:
      raise AuthorsError(
          f'the leaf {leaf!r} does not stand in the sentence {sentence!r}; '
          'there, parser and policy must cut alike'
      )
    blank = ' ' if sentence[place - 1 : place] == ' ' else ''
    counts.append(len(tokenize(blank + leaf)))
    cursor = place + len(leaf)
  return counts


def _macro_actions(
    tree: parsing.Tree, counts: Sequence[int], cutoff: int
) -> list[tuple[int, int]]:
  """(first token, token behind the last) of each, within the sentence."""
  before = [0]
  for count in counts:
    before.append(before[-1] + count)
  found: list[tuple[int, int]] = []
  index = 0
  while index < len(tree.nodes):
    first, last, behind = tree.nodes[index]
    begin, end = before[first], before[last]
    if behind == index + 1 and last - first == 1:
      raise AuthorsError(
          f'the leaf {tree.leaves[first]!r} has no part-of-speech node; there, '
          'a word that is not inside one has no leaves'
      )
    if last - first == 1 and found:
      found[-1] = (found[-1][0], end)
    elif last - first == 1 or end - begin < cutoff:
      found.append((begin, end))
    else:
      index += 1
      continue
    index = behind
  return found


def boundaries(
    sentences: Sequence[tuple[str, str]],
    *,
    width: int,
    cutoff: int,
    tokenize: Tokenize,
) -> list[int]:
  """Their boundaries, in columns of the response.

  Args:
    sentences: what their parser was given and the bracketed tree it returned,
      in order.
    width: R, columns of the response: its tokens, EOS and padding.
    cutoff: tokens; a smaller node is a macro action.
    tokenize: the policy's tokens of a text alone.

  Returns:
    Start columns from 0 to `width - 1`, none twice.

  Raises:
    AuthorsError: where theirs fails: no sentence at all; a tree whose leaves
      are not the policy's tokens (contractions, escaped brackets, two blanks);
      a word without part-of-speech node; a response without EOS.
  """
  if not sentences:
    raise AuthorsError(
        'the response has no sentence; there, an empty list is indexed'
    )
  found, position = set(), 0
  for sentence, text in sentences:
    tree = parsing.read(text)
    if tree is None or not tree.leaves:
      raise AuthorsError(f'the tree {text!r} of {sentence!r} cannot be read')
    counts = _leaf_counts(tree.leaves, sentence, tokenize)
    if sum(counts) != len(tokenize(sentence)):
      raise AuthorsError(
          f'the leaves of {sentence!r} have {sum(counts)} tokens, the sentence '
          f'{len(tokenize(sentence))}; there, parser and policy must cut alike'
      )
    macros = _macro_actions(tree, counts, cutoff)
    found |= {position + begin for begin, _ in macros}
    position += sum(counts)
    if len(tree.leaves) > 1:
      found.add(position)
  if max(found) >= width:
    raise AuthorsError(
        f'the boundary {max(found)} lies behind the last of {width} columns; '
        'there, a response must end with EOS'
    )
  return sorted(found | {width - 1})
