"""Arguments that a word or a rule would leave unheard."""

import pytest

from ma_rlhf_jax import arguments

_GIVEN = {'macro.ngram': ('ngram=7', 7), 'seed': ('seed=1', 1)}


@pytest.mark.parametrize(
    ('words', 'fields'),
    [
        ([], ['macro.ngram', 'seed']),
        (['token_ppo', 'rloo'], ['macro.ngram', 'seed']),
        (['token_ppo', 'kl_matched'], ['seed']),
        (['lambda_matched'], ['seed']),
    ],
)
def test_only_words_that_match_n_may_change_it(
    words: list[str], fields: list[str]
) -> None:
  assert list(arguments.kept(_GIVEN, words)) == fields


def test_ngram_is_refused_where_no_rule_reads_it() -> None:
  for rule in ('fixed', 'parsing'):
    arguments.check_ngram(_GIVEN, rule)
  arguments.check_ngram({}, 'ppl')
  with pytest.raises(arguments.ArgumentError, match="ngram=7 .*'ppl'"):
    arguments.check_ngram(_GIVEN, 'ppl')
