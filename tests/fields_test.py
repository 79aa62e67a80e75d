"""Checks of single fields, and tables of names that are read from sources."""

import importlib
import math
from typing import Any

import pytest

from ma_rlhf_jax import fields
from ma_rlhf_jax.config_fields import FIELDS
from ma_rlhf_jax.fields import Check, Field, above, at_least, one_of, within

_TABLES = sorted(
    {
        entry
        for field in FIELDS.values()
        for entry in field.check.entries
        if ':' in entry
    }
)


@pytest.mark.parametrize('table', _TABLES)
def test_names_read_from_a_source_are_those_of_the_table(table: str) -> None:
  module, _, name = table.partition(':')
  found = getattr(importlib.import_module(f'ma_rlhf_jax.{module}'), name)
  assert one_of(table).names == tuple(found)


def test_a_table_that_is_not_there_is_an_error() -> None:
  with pytest.raises(LookupError, match='losses.py has no table NOTHING'):
    print(one_of('objective.losses:NOTHING').names)


@pytest.mark.parametrize(
    ('check', 'words', 'inside', 'outside'),
    [
        (at_least(0), 'at least 0', (0, 0.5, 2**31 - 1), (-1, -1e-9)),
        (at_least(1, -1), 'at least 1, or -1', (1, -1), (0, -2)),
        (above(0), 'above 0', (1e-9, 5), (0, -1)),
        (above(0, 1e6), 'above 0 and at most 1e6', (0.5, 1e6), (0, 1.1e6)),
        (within(2, 5), 'between 2 and 5', (2, 5), (1, 6)),
        (within(1e-4, 1, 0), 'between 0.0001 and 1, or 0', (0, 0.5), (1e-5, 2)),
        (
            within(0, 1, below=True),
            'at least 0 and below 1',
            (0, 0.999),
            (-0.1, 1),
        ),
        (one_of('a', 'b'), 'one of a, b', ('a', 'b'), ('', 'c')),
        (one_of('', 'a'), 'one of a', ('a', ''), ('b',)),
        (
            fields.some_of('a', 'b', least=1),
            'a tuple of some of a, b',
            (('a',), ('b', 'a'), ('a', 'a')),
            ((), ('c',), ([],), ('a', 1)),
        ),
        (
            fields.some_of('a', 'b', in_order=True),
            'a tuple of some of a, b, in this order',
            ((), ('a', 'b'), ('b',)),
            (('b', 'a'), ('a', 'a')),
        ),
        (
            fields.many('two or less', 1, lambda v: len(v) < 3),
            'two or less',
            ((), (1, 3)),
            ((0,), (1.5,), ('a',), (1, 2, 3), (2**31,), (True,)),
        ),
        (
            fields.many('any', 0, lambda v: True, whole=False),
            'any',
            ((0.5, 2),),
            ((math.nan,), (-0.5,), (math.inf,)),
        ),
    ],
)
def test_a_check_holds_inside_and_says_what_it_needs(
    check: Check, words: str, inside: tuple, outside: tuple
) -> None:
  field = Field(inside[0], check, 'A field.')
  assert [field.problem('a.b', value) for value in inside] == [''] * len(inside)
  for value in outside:
    if value == value and value not in ((math.nan,),):
      assert field.problem('a.b', value) == f'a.b={value!r} must be {words}'
    else:
      assert field.problem('a.b', value)


@pytest.mark.parametrize(
    ('default', 'value', 'words'),
    [
        (0.5, math.nan, 'must be a finite number'),
        (0.5, -math.inf, 'must be a finite number'),
        (0.5, 1e31, 'must be at most 1e30 in size'),
        (5, 2**31, 'must be at most 2147483647 in size'),
    ],
)
def test_numbers_without_a_bound_have_a_size(
    default: Any, value: Any, words: str
) -> None:
  problem = Field(default, at_least(0), '.').problem('x', value)
  assert problem == (f'x={value!r} {words}')
  assert Field(0, within(0, 2**40), '.').problem('x', 2**40) == ''


def test_a_function_of_ones_own_is_a_name_where_that_is_said() -> None:
  check = one_of('a', or_own=('x',))
  assert check.need == 'one of a, or module:function'
  assert Field('a', check, '.').problem('x', 'math:sqrt') == ''
  assert 'no function' in Field('a', check, '.').problem('x', 'math:no')
  assert 'must be one of' in Field('a', one_of('a'), '.').problem('x', 'm:f')


def test_a_block_marks_its_fields_and_names_inner_ones() -> None:
  inner = {'x': Field(1, at_least(0), '.', resumable=True)}
  one = fields.block('One', a=Field(2, at_least(0), '.'), b=inner)
  assert {n: f.resumable for n, f in one.fields.items()} == {
      'a': False,
      'b.x': True,
  }
  two = fields.block('Two', resumable=True, **one.fields)
  assert all(field.resumable for field in two.fields.values())


def test_choices_are_names_or_both_values_of_a_switch() -> None:
  assert Field('a', one_of('a', 'b'), '.').choices == ('a', 'b')
  assert Field(False, fields.SWITCH, '.').choices == (False, True)
  assert Field(1, at_least(0), '.').choices == ()
