"""avg@k and pass@k against counting, and intervals against their limits."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from oblr_trl.evaluation.estimators import bootstrap_means, estimate, paired_differences, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_fraction_of_draws_of_k_that_hold_a_right_completion(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(c, n, k) == Fraction(sum(any(draw) for draw in draws), len(draws))


def test_pass_at_1_is_the_average_and_pass_at_n_whether_any_is_right():
    for c in range(9):
        assert pass_at_k(c, 8, 1) == Fraction(c, 8)
        assert pass_at_k(c, 8, 8) == (c > 0)


def test_pass_at_k_is_unbiased():
    # One completion is right with probability 1/3. E over c ~ Binomial(4, 1/3) of pass@2 is 1 - (2/3)^2 = 5/9.
    right = Fraction(1, 3)
    weights = [Fraction(m) * right**c * (1 - right) ** (4 - c) for c, m in enumerate((1, 4, 6, 4, 1))]
    assert sum(w * pass_at_k(c, 4, 2) for c, w in enumerate(weights)) == Fraction(5, 9)


@pytest.mark.parametrize(("c", "n", "k"), [(0, 4, 5), (0, 4, 0), (5, 4, 1), (-1, 4, 1)])
def test_counts_that_cannot_be_are_refused(c, n, k):
    with pytest.raises(AssertionError):
        pass_at_k(c, n, k)


def test_a_mean_is_rounded_once():
    # The sum of floats gives 0.15000000000000002.
    assert estimate([Fraction(1, 10)] * 10 + [Fraction(1, 5)] * 10, seed=0)["value"] == 0.15
    assert estimate([Fraction(1, 3)] * 3, seed=0)["value"] == 1 / 3


def test_the_same_seed_gives_the_same_interval_and_another_a_similar_one():
    values = [Fraction(i % 3, 2) for i in range(90)]
    first, again, other = (estimate(values, seed=seed) for seed in (0, 0, 1))

    assert first == again
    assert first["low"] == pytest.approx(other["low"], abs=0.01)
    assert np.any(bootstrap_means(np.arange(9.0), seed=0) != bootstrap_means(np.arange(9.0), seed=1))


def test_the_interval_of_a_large_sample_is_that_of_the_normal_distribution():
    # 400 problems, half of them right: standard error sqrt(0.25 / 400) = 0.025, so 0.5 -+ 1.96 * 0.025.
    found = estimate([Fraction(i % 2) for i in range(400)], seed=0)
    assert list(found.values()) == [0.5, pytest.approx(0.451, abs=0.004), pytest.approx(0.549, abs=0.004)]


def test_resamples_are_of_problems_whatever_their_values():
    ones = bootstrap_means(np.arange(5.0), seed=3)
    assert np.allclose(bootstrap_means(2 * np.arange(5.0) + 1, seed=3), 2 * ones + 1)


def test_a_paired_difference_is_known_better_than_each_of_its_two_scores():
    first = [Fraction(i % 2) for i in range(100)]
    second = [max(value, Fraction(i < 10)) for i, value in enumerate(first)]  # 5 problems more, all others alike
    difference, alone = estimate(paired_differences(first, second), seed=0), estimate(first, seed=0)

    assert difference["value"] == 0.05
    assert 0 < difference["low"] < 0.05 < difference["high"] < 0.11
    assert difference["high"] - difference["low"] < alone["high"] - alone["low"]


def test_problems_that_all_agree_leave_no_doubt_and_every_benchmark_weighs_the_same():
    ones, zeros = [Fraction(1)] * 90, [Fraction(0)] * 10
    assert estimate(ones, seed=0) == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert estimate(ones, zeros, seed=0) == {"value": 0.5, "low": 0.5, "high": 0.5}
