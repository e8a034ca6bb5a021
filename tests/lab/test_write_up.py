"""Tables of a write-up, made anew from results."""

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.lab.results import Results, Run, VariantResult
from deepseek_jax.lab.verdict import markdown
from deepseek_jax.lab.write_up import fill


def results(values):
  def variant(offset):
    runs = {
      seed: Run(
        status='finished',
        step=10,
        reason=None,
        figures={'bits_per_byte': value + offset, 'max_violation': 1.0 + value},
        curve={'step': [1, 10], 'value': [3.0, 2.0]},
      )
      for seed, value in enumerate(values)
    }
    return VariantResult(
      changes=(), values={}, train_steps=10, asked_steps=10, parameters=100, active=50,
      flops=1e9, runs=runs,
    )  # fmt: skip

  return Results(
    question='q', version='0', baseline='plain', match=None, precision=None, platform='cpu',
    figure='bits_per_byte', variants={'plain': variant(0.0), 'worse': variant(0.5)},
  )  # fmt: skip


TEXT = """# Question

Words stay.

<!-- findings -->
<!-- end -->

<!-- table -->
an old table
<!-- end -->
And these.
<!-- table max_violation -->
<!-- end -->
"""


def test_tables_are_made_anew_and_words_stay():
  one = results([2.0, 2.01, 1.99])
  text = fill(TEXT, one)
  assert 'an old table' not in text
  assert text.startswith('# Question\n\nWords stay.\n')
  assert '<!-- end -->\nAnd these.\n' in text
  assert markdown(one) in text
  assert markdown(one, 'max_violation') in text
  assert '- worse is higher than plain by 0.5000' in text
  assert fill(text, one) == text
  other = results([3.0, 3.01, 2.99])
  assert fill(text, other) == fill(TEXT, other) != text


def test_only_the_deciding_figure_has_sizes():
  one = results([2.0, 2.01, 1.99])
  assert 'FLOPs' in markdown(one)
  assert 'FLOPs' not in markdown(one, 'max_violation')


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('nothing here', 'no place for a table'),
    ('<!-- table max_violaton -->\n<!-- end -->', 'no such figure; did you mean `max_violation`'),
  ],
)
def test_faults(text, words):
  with pytest.raises(ConfigError, match=words):
    fill(text, results([1.0, 2.0]))
