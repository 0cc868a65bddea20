"""What an evaluation concludes from its samples: pass@k, majority@k, and intervals. Pure functions of numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""The confidence level of all intervals."""
RESAMPLES = 10_000

Interval = tuple[float, float]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 − C(n−c, k) / C(n, k): the probability that k of n samples, c of them correct, include a correct one.

    The unbiased estimator of arXiv 2107.03374, Eq. 1. Raises: ValueError unless 1 ≤ k ≤ n.
    """
    _check_k("pass", samples, k)
    if samples - correct < k:
        return 1.0
    wrong = 1.0
    for i in range(samples - correct + 1, samples + 1):
        wrong *= 1.0 - k / i
    return 1.0 - wrong


def majority_at_k(votes: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """The probability that the most frequent answer of k of the n samples is correct.

    The expected value over all subsets of k samples, and over the answers that are equally frequent in one. So it
    depends neither on the order of the samples nor on luck, and majority@1 is avg@k if every sample has an answer.

    Args:
        votes: the answer of each sample; None: it has none, and does not vote. A subset without votes is not correct.
        correct: whether each sample is. If samples with the same answer differ, that answer counts with their mean.

    Raises: ValueError unless 1 ≤ k ≤ n.
    """
    _check_k("majority", len(votes), k)
    sizes = Counter(vote for vote in votes if vote is not None)
    share = {vote: sum(c for v, c in zip(votes, correct, strict=True) if v == vote) / sizes[vote] for vote in sizes}
    won = 0.0
    for winner in (vote for vote in sizes if share[vote]):
        for top in range(1, min(k, sizes[winner]) + 1):
            # ways[t, m]: subsets of m samples in which the winner has `top` votes, t rivals too, and none has more.
            ways: dict[tuple[int, int], int] = {(0, top): math.comb(sizes[winner], top)}
            rivals = [size for vote, size in sizes.items() if vote != winner and size >= top]
            for size in rivals:
                ways = _one_more(ways, size, k, top)
            others = len(votes) - sizes[winner] - sum(rivals)  # however many are drawn, no answer has as many votes
            won += share[winner] * sum(
                count * math.comb(others, k - drawn) / (1 + tied) for (tied, drawn), count in ways.items()
            )
    return won / math.comb(len(votes), k)


def _one_more(ways: dict[tuple[int, int], int], size: int, k: int, top: int) -> dict[tuple[int, int], int]:
    """`ways` with one more answer, which `size` of the samples have."""
    more: dict[tuple[int, int], int] = {}
    for (tied, drawn), count in ways.items():
        for votes in range(min(size, top, k - drawn) + 1):
            key = tied + (votes == top), drawn + votes
            more[key] = more.get(key, 0) + count * math.comb(size, votes)
    return more


def _check_k(name: str, samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"{name}@k: expected 1 ≤ k ≤ {samples} samples, got k = {k}; sample more, or lower k")


def exact_interval(successes: int, trials: int, level: float = LEVEL) -> Interval:
    """The interval of Clopper and Pearson (Biometrika 26, 1934) for a probability, from `successes` in `trials`."""
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else _probability(successes, trials, tail)
    high = 1.0 if successes == trials else _probability(successes + 1, trials, 1 - tail)
    return low, high


def _probability(successes: int, trials: int, tail: float) -> float:
    """The p with P(X ≥ successes) = `tail` for X of the binomial distribution of `trials` and p, by bisection."""
    i = np.arange(successes, trials + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])  # of the factorials
    ways = logs[trials] - logs[i] - logs[trials - i]
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        reached = np.exp(ways + i * math.log(p) + (trials - i) * math.log1p(-p)).sum() if p < 1 else 1.0
        low, high = (low, p) if reached > tail else (p, high)
    return (low + high) / 2


def bootstrap_interval(values: Sequence[float], seed: int, level: float = LEVEL) -> Interval:
    """The percentile bootstrap (Efron 1979) of the mean of `values`, one per prompt, which are drawn again with `seed`.

    Several samples of a prompt belong together, so prompts are drawn, and not samples.
    """
    array, count = np.asarray(values, dtype=np.float64), len(values)
    bits = np.random.Philox(key=np.array([seed, count], dtype=np.uint64))  # raw: numpy keeps this stream for ever
    rows = max(1, 2**22 // count)
    means: list[NDArray[np.float64]] = []
    for start in range(0, RESAMPLES, rows):
        drawn = bits.random_raw(min(rows, RESAMPLES - start) * count).reshape(-1, count) % np.uint64(count)
        means.append(array[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval(values: Sequence[float], seed: int, bounds: Interval = (0.0, 1.0), level: float = LEVEL) -> Interval:
    """An interval for the mean of what `values`, one per prompt and within `bounds`, are a sample of.

    Exact where each value is one of the bounds, as for greedy completions; otherwise the bootstrap. If all values are
    equal, the bootstrap has nothing to draw, and would be sure of a mean that few prompts cannot show: then at most the
    share `u` of the prompts has another value, with u from `exact_interval` for none among them.

    Raises: ValueError without values.
    """
    if not values:
        raise ValueError("expected the values of at least one prompt, got none; evaluate more prompts")
    low, high = bounds
    if all(value in bounds for value in values):
        below, above = exact_interval(sum(value == high for value in values), len(values), level)
        return low + below * (high - low), low + above * (high - low)
    if min(values) == max(values):
        others = exact_interval(0, len(values), level)[1]
        return values[0] - others * (values[0] - low), values[0] + others * (high - values[0])
    return bootstrap_interval(values, seed, level)


def sign_test(worse: int, better: int) -> float:
    """The two-sided p-value of the exact test of McNemar (Psychometrika 12, 1947) that prompts change either way alike.

    Args:
        worse, better: how many prompts became wrong, and how many right; the others say nothing.
    """
    changed, fewer = worse + better, min(worse, better)
    ways: int = 2 * sum(math.comb(changed, i) for i in range(fewer + 1))
    return min(1.0, ways / (1 << changed))
