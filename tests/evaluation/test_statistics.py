import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.evaluation.statistics import Mean, mcnemar, paired, sign_flip


def test_interval_of_a_proportion_is_that_of_the_binomial():
    low, high = Mean([1.0] * 60 + [0.0] * 40).interval(resamples=20_000)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert (low, high) == (pytest.approx(0.6 - half, abs=0.011), pytest.approx(0.6 + half, abs=0.011))


def test_interval_depends_on_the_seed_alone_and_holds_the_value():
    mean = Mean([0.1, 0.9, 0.4, 0.4], [1, 2, 3, 4], math.exp)
    assert mean.interval() == mean.interval() != mean.interval(seed=1)
    low, high = mean.interval()
    assert low < mean.value < high
    assert mean.value == pytest.approx(math.exp((0.1 + 1.8 + 1.2 + 1.6) / 10))


def test_large_sets_are_resampled_in_blocks(monkeypatch):
    import mm.evaluation.statistics as statistics

    values = np.random.default_rng(0).random(50).tolist()
    monkeypatch.setattr(statistics, "CELLS", 120)
    low, high = Mean(values).interval(resamples=500)
    assert low < Mean(values).value < high


@pytest.mark.parametrize(("values", "weights"), [([], None), ([1.0], [0.0])])
def test_a_mean_of_nothing_is_an_error(values, weights):
    with pytest.raises(ValueError, match="no records to average"):
        _ = Mean(values, weights).value


def test_mcnemar_is_the_exact_binomial():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(4, 4) == 1.0


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=12))
def test_sign_flip_agrees_with_the_exact_test_on_binary_scores(difference):
    ours = sign_flip(np.array(difference), resamples=4_000)
    assert ours == pytest.approx(mcnemar(difference.count(-1.0), difference.count(1.0)), abs=0.04)


def test_paired():
    a, b = [0.0] * 20 + [1.0] * 20, [1.0] * 15 + [0.0] * 5 + [1.0] * 18 + [0.0] * 2
    found = paired(a, b)
    assert (found.a_better, found.b_better) == (2, 15)
    assert found.difference == pytest.approx(13 / 40)
    assert found.low < found.difference < found.high
    assert found.p_value == pytest.approx(mcnemar(2, 15)) and "McNemar" in found.test
    assert "sign-flip" in paired([0.5, 0.2], [0.6, 0.3]).test
    same = paired(a, a)
    assert (same.difference, same.p_value) == (0.0, 1.0)
    with pytest.raises(ValueError, match="got 1 and 2"):
        paired([1.0], [1.0, 0.0])
