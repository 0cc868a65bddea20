"""Metrics: sums over micro-batches and ranks are formed first, and divided last."""

from __future__ import annotations

from collections import Counter

from rlkd import distributed
from rlkd.distributed import RunStopped


class MetricAccumulator:
    """Collects means, totals and maxima under metric names; `reduce` combines the ranks.

    Example: m.mean("reward/mean", total=3.0, count=8); m.total("tokens/trained", 512); m.maximum("mismatch/max", 1e-6)
    """

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, float]] = {}
        self._totals: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def mean(self, name: str, total: float, count: float) -> None:
        """Add `total`, a sum of `count` values, to the mean `name`; a mean of no values is left out of the row."""
        before_total, before_count = self._means.get(name, (0.0, 0.0))
        self._means[name] = (before_total + total, before_count + count)

    def total(self, name: str, value: float) -> None:
        """Add `value` to the sum `name`."""
        self._totals[name] = self._totals.get(name, 0.0) + value

    def maximum(self, name: str, value: float) -> None:
        """Raise the maximum `name` to `value` if it is smaller."""
        self._maxima[name] = max(self._maxima.get(name, value), value)

    def merge(self, other: MetricAccumulator) -> None:
        """Add everything in `other`."""
        for name, (total, count) in other._means.items():
            self.mean(name, total, count)
        for name, value in other._totals.items():
            self.total(name, value)
        for name, value in other._maxima.items():
            self.maximum(name, value)

    def reduce(self) -> dict[str, float]:
        """The metrics over all ranks. A collective; values are combined by position, so the names are compared first.

        Raises: RunStopped on all ranks if their names differ, or one name is two of mean, total and maximum.
        """
        means, totals, maxima = sorted(self._means), sorted(self._totals), sorted(self._maxima)
        kinds = {"mean": means, "total": totals, "maximum": maxima}
        distributed.require_same_names([f"{kind} {n}" for kind, names in kinds.items() for n in names], "metrics")
        repeated = sorted(name for name, times in Counter(means + totals + maxima).items() if times > 1)
        if repeated:
            which = [kind for kind, names in kinds.items() if repeated[0] in names]
            raise RunStopped(
                f"metrics: expected each name once, got {repeated[0]} as {' and as '.join(which)}; rename one of them"
            )
        summed = distributed.all_reduce(
            [self._means[n][0] for n in means] + [self._means[n][1] for n in means] + [self._totals[n] for n in totals]
        )
        row = {n: summed[i] / summed[len(means) + i] for i, n in enumerate(means) if summed[len(means) + i]}
        row.update(zip(totals, summed[2 * len(means) :], strict=True))
        row.update(zip(maxima, distributed.all_reduce([self._maxima[n] for n in maxima], "max"), strict=True))
        return row
