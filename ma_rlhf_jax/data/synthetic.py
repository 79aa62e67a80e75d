"""A synthetic preference task whose true preference is known: posts, summaries.

A post tells of something in one of eight parts of life and never names it:

  My boss was late last week. I told a friend.
  TL;DR:

A summary names a part of life and describes with good, bad and neutral words:

   work calm and fair rude also kind neat.

`gold_score` counts words. It labels the pairs (with noise) and is reported
beside the reward model's score, so that over-optimisation of the reward model
is visible; training never sees it.
"""

import random
import re

# Part of life -> what a post speaks of. The first is what a summary may name.
TOPICS = {
    'work': ('boss', 'shift', 'office', 'desk'),
    'family': ('mom', 'dad', 'sister', 'uncle'),
    'money': ('bank', 'loan', 'rent', 'debt'),
    'health': ('doctor', 'tooth', 'diet', 'knee'),
    'study': ('exam', 'class', 'essay', 'teacher'),
    'travel': ('flight', 'train', 'hotel', 'ticket'),
    'pets': ('dog', 'cat', 'puppy', 'parrot'),
    'home': ('roof', 'kitchen', 'garden', 'door'),
}
EVENTS = (
    'was late',
    'made me sick',
    'cost too much',
    'got in the way',
    'kept me up',
    'let me down',
    'fell apart',
    'took all day',
    'gave me trouble',
    'went missing',
    'broke my plan',
    'scared us both',
)
TIMES = (
    'today',
    'again',
    'last week',
    'this year',
    'at night',
    'on Monday',
    'in June',
    'for hours',
)
REACTIONS = (
    'I told a friend.',
    'I did not wait.',
    'I want it to end.',
    'Nobody knows why.',
    'We had a fight.',
    'What should I do?',
    'My plans changed.',
    'Any advice?',
    'It felt strange.',
    'People laughed.',
)
# Words of one length, so that quality says little about the number of tokens.
GOOD = tuple(
    'able bold calm cozy deft fair fine firm fond free glad good kind keen '
    'neat nice open pure safe sane sure true warm wise'.split()
)
BAD = tuple(
    'arid cold dark dire dull evil fake foul grim hard idle lame lazy loud '
    'mean numb poor rude sick sore ugly vain weak worn'.split()
)
NEUTRAL = tuple('also and but here just now so then very yet'.split())

_GOOD, _BAD, _TOPICS = frozenset(GOOD), frozenset(BAD), frozenset(TOPICS)
_TOPIC_OF = {noun: topic for topic, nouns in TOPICS.items() for noun in nouns}
FULL_LENGTH = 8  # words below which a response is scored as if it had so many
EMPTY_SCORE = -1.0
NEUTRAL_SHARE = 0.2  # of the words after the topic
RIGHT_TOPIC = 0.6  # probability that a response names the post's topic


def _words(text: str) -> list[str]:
  return re.findall(r'[a-z]+', text.lower())


def gold_score(prompt: str, response: str) -> float:
  """The true quality of `response`, in [-1, 1].

    score = (good + topic - bad - repeated) / max(words, 8)

  with, all counted in words (letters only, case ignored),
    good      different words of GOOD
    topic     1 if the post's topic is named, less 1 for each other one named
    bad       words of BAD
    repeated  words that stood in the response before
    words     all words

  A long response gains nothing over one of eight words, a short one lacks
  words to be good; seven good words and the topic reach 1.

  Args:
    prompt: a post; the first of its words that belongs to a topic decides.
    response: the summary; an empty one scores -1.
  """
  words = _words(response)
  if not words:
    return EMPTY_SCORE
  different = set(words)
  topic = next((_TOPIC_OF[w] for w in _words(prompt) if w in _TOPIC_OF), None)
  named = different & _TOPICS
  points = (
      len(different & _GOOD)
      + (topic in named)
      - len(named - {topic})
      - sum(w in _BAD for w in words)
      - (len(words) - len(different))
  )
  return max(points / max(len(words), FULL_LENGTH), -1.0)


def _post(rng: random.Random) -> tuple[str, str]:
  """(post, its topic)."""
  topic = rng.choice(tuple(TOPICS))
  event, time = rng.choice(EVENTS), rng.choice(TIMES)
  post = f'My {rng.choice(TOPICS[topic])} {event} {time}.'
  return f'{post} {rng.choice(REACTIONS)}\nTL;DR:', topic


def _response(rng: random.Random, topic: str) -> str:
  """A summary of 8 to 11 words; its quality is uniform in [0, 1]."""
  quality = rng.random()
  right = rng.random() < RIGHT_TOPIC
  words = [topic if right else rng.choice(tuple(_others(topic)))]
  for _ in range(rng.randint(7, 10)):
    if words[-1] not in NEUTRAL and rng.random() < NEUTRAL_SHARE:
      words.append(rng.choice(NEUTRAL))
    else:
      words.append(rng.choice(GOOD if rng.random() < quality else BAD))
  return f' {" ".join(words)}.'


def _others(topic: str) -> list[str]:
  return [other for other in TOPICS if other != topic]


def _row(seed: int, index: int, label_noise: float) -> dict[str, str]:
  """Row `index`; depends on nothing but the arguments."""
  rng = random.Random(f'{seed}/{index}')
  prompt, topic = _post(rng)
  swap = rng.random() < label_noise
  while True:
    pair = sorted(
        [_response(rng, topic), _response(rng, topic)],
        key=lambda response: gold_score(prompt, response),
        reverse=not swap,
    )
    if gold_score(prompt, pair[0]) != gold_score(prompt, pair[1]):
      return {'prompt': prompt, 'chosen': pair[0], 'rejected': pair[1]}


def make_rows(
    num_rows: int, *, seed: int, label_noise: float, start: int = 0
) -> list[dict[str, str]]:
  """Rows with `prompt`, `chosen` and `rejected`, the same for a given seed.

  Two responses of independent quality are labelled by `gold_score`, never
  equal, and swapped with probability `label_noise`. A row depends on the seed
  and its index only, so more rows never change the earlier ones.

  Args:
    num_rows: how many rows.
    seed: of all draws.
    label_noise: in [0, 1].
    start: index of the first row.
  """
  return [
      _row(seed, index, label_noise) for index in range(start, start + num_rows)
  ]
