import numpy as np
import pytest
from scipy import stats

from operators.significance import EXACT_QUERIES, bootstrap, compare, holm, sign_flip


def test_three_wins_of_three_are_two_of_eight_signs():
    assert sign_flip(np.array([0.5, 0.1, 0.2])) == 2 / 8


def test_queries_without_a_difference_change_nothing():
    assert sign_flip(np.array([0.5, 0, 0.1, 0, 0.2])) == sign_flip(np.array([0.5, 0.1, 0.2]))
    assert sign_flip(np.zeros(5)) == 1.0


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.4])
def test_many_queries_agree_with_scipys_permutation_test(shift):
    differences = np.random.default_rng(1).normal(shift, 0.6, 40)
    theirs = stats.permutation_test(
        (differences, np.zeros(40)),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(2),
    ).pvalue
    assert sign_flip(differences) == pytest.approx(theirs, abs=0.02)


def test_drawing_signs_agrees_with_trying_all():
    differences = np.random.default_rng(3).normal(0.3, 0.6, EXACT_QUERIES)
    exact, tiny = sign_flip(differences), 1e-9
    # Queries that hardly differ push it past the exact limit and move nothing.
    drawn = sign_flip(np.concatenate([differences, [tiny] * 8]), rounds=40_000)
    assert drawn == pytest.approx(exact, abs=0.01)


def test_a_drawn_p_value_is_never_zero_and_repeats():
    clear = np.full(200, 0.5)
    assert sign_flip(clear, rounds=100) == 1 / 101
    noisy = np.random.default_rng(0).normal(0.05, 1, 100)
    assert sign_flip(noisy, seed=4) == sign_flip(noisy, seed=4)


def test_the_interval_is_that_of_the_t_distribution_for_plain_numbers():
    values = np.random.default_rng(5).normal(0.4, 0.1, 400)
    low, high = bootstrap(values)
    wanted = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    np.testing.assert_allclose([low, high], wanted, atol=0.002)
    assert all(np.isnan(bootstrap(np.empty(0))))


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_comparison_counts_queries_and_orients_the_difference():
    found = compare(np.array([1.0, 0.5, 0.2, 0.2]), np.array([0.5, 0.5, 0.3, 0.0]))
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.difference == pytest.approx(0.15)
    assert found.low < found.difference < found.high
