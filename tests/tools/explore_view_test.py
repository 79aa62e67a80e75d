"""How macro actions are drawn."""

import html.parser

import numpy as np

from ma_rlhf_jax.tools import explore_view


def _told() -> explore_view.Told:
  statistics = dict(per_response=2.0, length_mean=1.5, length_p95=2.0)
  ruled = explore_view.Ruled(
      name='fixed & so on',
      ids=np.array([[0, 0, 1, 9]]),
      advantages=np.array([[0.25, 0.25, -1, 0]]),
      lengths=np.array([2, 1]),
      statistics=statistics,
      note='2 of 4 sentences without a usable tree',
  )
  return explore_view.Told([['a', '\n', '<b>']], [ruled, ruled], ['1.5'], True)


def test_lengths_are_counted_singly_up_to_ten_and_then_by_doubling():
  lengths = np.array([1, 1, 3, 10, 11, 20, 21, 40])
  counts = dict(explore_view.histogram(lengths))
  assert counts['1'] == 2 and counts['2'] == 0 and counts['10'] == 1
  assert counts['11-20'] == 2 and counts['21-40'] == 2
  assert sum(counts.values()) == 8 and list(counts)[-1] == '21-40'


def test_brackets_without_colours_and_codes_with_them():
  plain = explore_view.text(_told(), 8, color=False)
  assert '  A [a⏎][<b>]' in plain and '\x1b' not in plain
  assert '2 decisions, 2.0 per response, 1.50 tokens each' in plain
  assert 'score 1.5\n' in plain and plain.count('2 of 4 sentences') == 2
  coloured = explore_view.text(_told(), 8, color=True)
  assert '\x1b[30;44ma⏎\x1b[0m\x1b[30;42m<b>\x1b[0m' in coloured


def test_the_page_escapes_what_it_shows():
  page = explore_view.page(_told(), 8)
  assert '&lt;b&gt;' in page and '<b>A</b>' in page
  assert 'fixed &amp; so on' in page and page.count('class=t') == 6
  texts = []
  reader = html.parser.HTMLParser()
  reader.handle_data = texts.append
  reader.feed(page)
  assert '-1.00' in texts and '+0.25' in texts
