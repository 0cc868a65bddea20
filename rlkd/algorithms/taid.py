"""TAID: a teacher that starts near the student and moves away as the student follows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from rlkd.algorithms.opd import OPD
from rlkd.algorithms.taid_options import TAIDConfig
from rlkd.config.schema import AlgorithmConfig, Config


class TAID(OPD):
    """L(θ) = E_{(x, y)} [ Σ_n KL( p_t(·|x, y_<n), π_θ(·|x, y_<n) ) / N ],  p_t = softmax( (1−t) · sg(z_θ) + t · z_T )

    arXiv 2501.16937, Eq. 2–6. After each iteration but the first, with δ = (L_before − L) / L_before and
    m ← β·m + (1−β)·δ, t ← min(t_end, max(the straight line, t + α · sigmoid(m) · (1 − t))): t never falls. L is the KL,
    as in the paper; it may start at 0 (at t = 0 the student is its own teacher), so we bound δ, which is at most 1, by
    −1 from below. The authors' code takes the cross-entropy, which is never near 0, and has no bound. t, m and L are
    functions of global means, equal on all ranks, and are part of the checkpoint.
    """

    Options: ClassVar[type[AlgorithmConfig]] = TAIDConfig

    def __init__(self, config: Config):
        super().__init__(config)
        self.t = self.options.t_start
        self.momentum = 0.0
        self.before: float | None = None
        """The loss of the last iteration."""

    @property
    def options(self) -> TAIDConfig:
        assert isinstance(self.config.algorithm, TAIDConfig)
        return self.config.algorithm

    @property
    def blend(self) -> float | None:
        return self.t

    def iteration_ended(self, iteration: int, row: Mapping[str, float]) -> dict[str, float]:
        used, loss, options = self.t, row["loss/kd"], self.options
        if not math.isfinite(loss):
            return {"taid/t": used}  # its updates were skipped, so t does not change either
        if self.before is not None:  # the first iteration only records its loss
            self.momentum = options.momentum * self.momentum + (1.0 - options.momentum) * _change(self.before, loss)
            sigmoid = 0.5 * (1.0 + math.tanh(0.5 * self.momentum))  # finite for any momentum
            line = options.t_start + (options.t_end - options.t_start) * min(iteration / options.over, 1.0)
            self.t = min(options.t_end, max(line, self.t + options.step * sigmoid * (1.0 - self.t)))
        self.before = loss
        return {"taid/t": used}

    def state_dict(self) -> dict[str, Any]:
        return {"taid": {"t": self.t, "momentum": self.momentum, "before": self.before}}

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        state = checkpoint["taid"]
        self.t, self.momentum, self.before = state["t"], state["momentum"], state["before"]


def _change(before: float, loss: float) -> float:
    """δ: the relative decrease of the loss since the last iteration, in [−1, 1]."""
    change = (before - loss) / max(abs(before), 1e-15)  # a loss whose entries are capped may be negative
    return min(max(change, -1.0), 1.0)
