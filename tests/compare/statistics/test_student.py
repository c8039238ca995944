"""Student's t distribution against scipy's."""

from __future__ import annotations

import random

import pytest
import scipy.stats

from compare.statistics.student import t_quantile, two_sided_p, upper_p


def test_tails_agree_with_scipy_for_real_degrees_of_freedom() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        freedom, t = 10 ** draw.uniform(-0.5, 5), 10 ** draw.uniform(-4, 2)
        expected = scipy.stats.t.sf(t, freedom)
        assert two_sided_p(t, freedom) == pytest.approx(2 * expected, rel=1e-9, abs=1e-300)
        assert two_sided_p(-t, freedom) == two_sided_p(t, freedom)
        assert upper_p(t, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-300)
        assert upper_p(-t, freedom) == pytest.approx(1 - expected, rel=1e-9)
    assert (two_sided_p(0.0, 3), upper_p(0.0, 3)) == (1.0, 0.5)
    assert two_sided_p(1e300, 3) == 0.0


def test_quantiles_agree_with_scipy() -> None:
    draw = random.Random(1)
    for _ in range(100):
        freedom = 10 ** draw.uniform(-0.3, 5)
        probability = draw.choice([0.5, 0.9, 0.95, 0.99, 0.999, draw.random()])
        expected = scipy.stats.t.ppf((1 + probability) / 2, freedom)
        assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-9)


def test_a_quantile_is_that_of_a_printed_table() -> None:
    assert t_quantile(0.95, 4) == pytest.approx(2.776445105, abs=1e-9)
