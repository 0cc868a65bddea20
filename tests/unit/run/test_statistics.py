"""Every number is compared with an enumeration, or with one from the literature."""

import itertools
import math
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from rlkd.run import statistics
from rlkd.run.statistics import bootstrap_interval, exact_interval, interval, majority_at_k, pass_at_k, sign_test


@pytest.mark.parametrize("correct", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(correct, k):
    subsets = list(itertools.combinations([True] * correct + [False] * (5 - correct), k))
    assert pass_at_k(5, correct, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_of_many_samples_is_that_of_exact_integers():
    """The product must not lose digits where the binomials have hundreds."""
    for correct, k in ((1, 1), (3, 64), (40, 100), (900, 100)):
        exact = 1 - Fraction(math.comb(1000 - correct, k), math.comb(1000, k))
        assert pass_at_k(1000, correct, k) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(
    "of", [lambda n, c, k: pass_at_k(n, c, k), lambda n, c, k: majority_at_k("ab"[:n], [0] * n, k)]
)
def test_more_than_all_samples_is_refused(of):
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"@k: expected 1 ≤ k ≤ 2 samples, got k = {k}"):
            of(2, 0, k)


def by_enumeration(votes, correct, k):
    """Every subset, every tie."""
    of = {}
    for vote, right in zip(votes, correct, strict=True):
        of.setdefault(vote, []).append(right)
    total = Fraction(0)
    for chosen in itertools.combinations(range(len(votes)), k):
        counts = Counter(votes[i] for i in chosen if votes[i] is not None)
        best = [vote for vote, count in counts.items() if count == max(counts.values())]
        total += sum((Fraction(sum(of[v]), len(of[v])) for v in best), Fraction(0)) / max(1, len(best))
    return total / math.comb(len(votes), k)


@pytest.mark.parametrize("k", range(1, 8))
@pytest.mark.parametrize("votes", ["aaabbcd", "aabbccd", "aaaaaaa", "abcdefg", ["a", None, "b", None, "b", "a", None]])
def test_majority_is_the_mean_over_subsets_and_ties(votes, k):
    for right in ("a", "b", "z"):
        correct = [vote == right for vote in votes]
        assert majority_at_k(votes, correct, k) == pytest.approx(float(by_enumeration(votes, correct, k)), abs=1e-12)
    odd = [i % 2 == 0 for i in range(7)]  # samples with the same answer may differ: a reward also judges the form
    assert majority_at_k(votes, odd, k) == pytest.approx(float(by_enumeration(votes, odd, k)), abs=1e-12)


def test_majority_of_all_samples_by_hand():
    assert majority_at_k(["4", "4", "5"], [True, True, False], 3) == 1.0
    assert majority_at_k(["4", "5"], [True, False], 2) == 0.5, "a tie is half a success, whichever came first"
    assert majority_at_k(["5", "4"], [False, True], 2) == 0.5
    assert majority_at_k([None, None], [False, False], 2) == 0.0
    assert majority_at_k([None, None, "4"], [False, False, True], 3) == 1.0, "samples without an answer do not vote"


def test_a_majority_of_many_samples_takes_no_time():
    """There are 10^18 subsets of 32 of 64 samples."""
    votes = ["a"] * 20 + ["b"] * 14 + ["c"] * 5 + list("defghijklmnopqrstuvwxyz") + [None] * 2
    started = time.process_time()
    found = [majority_at_k(votes, [vote == "a" for vote in votes], k) for k in (1, 16, 32, 64)]
    assert found[0] == pytest.approx(20 / 64) and found[0] < found[1] < found[2] < found[3] == 1.0
    assert time.process_time() - started < 0.2


def upper_tail(successes, trials, p):
    p = Fraction(p)
    return float(sum(math.comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(successes, trials + 1)))


@pytest.mark.parametrize(("successes", "trials"), [(1, 3), (7, 8), (13, 100), (50, 100), (127, 128), (90, 198)])
def test_at_the_ends_of_the_exact_interval_the_tails_have_two_and_a_half_percent(successes, trials):
    low, high = exact_interval(successes, trials)
    assert low < successes / trials < high
    assert upper_tail(successes, trials, low) == pytest.approx(0.025, abs=1e-9)
    assert 1 - upper_tail(successes + 1, trials, high) == pytest.approx(0.025, abs=1e-9)


def test_the_exact_interval_of_none_and_all_is_known_in_closed_form():
    for trials in (1, 8, 500):
        known = 1 - 0.025 ** (1 / trials)
        assert exact_interval(0, trials) == (0.0, pytest.approx(known))
        assert exact_interval(trials, trials) == (pytest.approx(1 - known), 1.0)


def test_the_bootstrap_is_that_of_all_possible_draws():
    """Of four prompts there are 256 draws; the quantiles of their means are those of the bootstrap."""
    values = [0.0, 0.25, 0.5, 1.0]
    means = [sum(draw) / 4 for draw in itertools.product(values, repeat=4)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert bootstrap_interval(values, seed=0) == pytest.approx((low, high), abs=0.0626), "at most one step of the means"


def test_the_bootstrap_of_many_values_is_the_normal_one_and_a_function_of_the_seed():
    values = [(i * 37 % 101) / 100 for i in range(2000)]
    low, high = bootstrap_interval(values, seed=3)
    error = np.std(values) / math.sqrt(2000)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.03)
    assert (low + high) / 2 == pytest.approx(np.mean(values), abs=error / 20)
    assert (low, high) == bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_the_intervals_hold_the_truth_as_often_as_they_claim(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    generator = np.random.Generator(np.random.Philox(key=5))
    held = 0
    for seed in range(300):
        share = generator.beta(2, 3, size=60)
        sampled = generator.binomial(4, share) / 4
        low, high = interval(sampled.tolist(), seed)
        held += low <= 0.4 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_an_interval_is_never_a_point():
    assert interval([1.0] * 8, 0) == exact_interval(8, 8)
    assert interval([0.0, 1.0, 1.0], 0) == exact_interval(2, 3)
    rest = 1 - 0.025 ** (1 / 20)
    assert interval([0.0] * 20, 0, bounds=(-1.0, 1.0)) == pytest.approx((-rest, rest)), "a difference that no one shows"
    assert interval([1.0] * 20, 0, bounds=(-1.0, 1.0)) == pytest.approx((1 - 2 * rest, 1.0))
    assert interval([0.5] * 20, 0) == pytest.approx((0.5 - rest / 2, 0.5 + rest / 2))
    with pytest.raises(ValueError, match="at least one prompt"):
        interval([], 0)


def test_the_sign_test_counts_coins():
    for worse, better in ((0, 0), (0, 5), (5, 0), (3, 3), (2, 9), (10, 30)):
        changed = worse + better
        flips = range(changed + 1)
        away = [math.comb(changed, i) for i in flips if abs(2 * i - changed) >= abs(worse - better)]
        assert sign_test(worse, better) == pytest.approx(sum(away) / 2**changed)
    assert sign_test(0, 5) == 0.0625
