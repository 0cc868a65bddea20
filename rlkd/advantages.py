"""Who gets credit: rewards of one group in, advantages out. Plain floats."""

from __future__ import annotations

import math
from collections.abc import Sequence


def group_relative(rewards: Sequence[float | None], normalise: bool) -> list[float]:
    """A_i = (r_i − mean) / (std + 1e-4), or r_i − mean without `normalise`.

    GRPO, arXiv 2402.03300, §4.1; mean-only as in Dr. GRPO, arXiv 2503.20783. The standard deviation has n − 1 in its
    denominator. A failed reward (None) takes no part in mean and deviation and gets advantage 0.
    """
    known = [r for r in rewards if r is not None]
    if len(known) < 2:
        return [0.0] * len(rewards)
    mean = math.fsum(known) / len(known)
    scale = 1.0
    if normalise:
        scale = math.sqrt(math.fsum((r - mean) ** 2 for r in known) / (len(known) - 1)) + 1e-4
    return [0.0 if r is None else (r - mean) / scale for r in rewards]
