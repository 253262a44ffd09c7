from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binomtest

from meliad_edge.rates import Rate, chance_of_loss

RATES = st.integers(0, 40).flatmap(lambda total: st.builds(Rate, st.integers(0, total), st.just(total)))


@given(RATES)
def test_the_interval_is_that_of_clopper_and_pearson(rate: Rate) -> None:
    count, total = rate.count, rate.total
    expected = (
        beta.ppf(0.025, count, total - count + 1) if count else 0.0,
        beta.ppf(0.975, count + 1, total - count) if count < total else 1.0,
    )
    assert rate.interval == pytest.approx(expected, abs=1e-9)


def test_of_no_images_nothing_is_known() -> None:
    assert Rate(0, 0).to_dict() == {"count": 0, "total": 0, "share": None, "interval": [0.0, 1.0]}


@given(st.integers(0, 40), st.integers(0, 40))
def test_losses_are_tested_as_coin_tosses(mended: int, broken: int) -> None:
    changed = mended + broken
    expected = binomtest(broken, changed, alternative="greater").pvalue if changed else 1.0
    assert chance_of_loss(mended, broken) == pytest.approx(expected, abs=1e-12)


def test_thousands_of_images_are_no_trouble() -> None:
    assert 0.0 < chance_of_loss(900, 1100) < 1e-4
