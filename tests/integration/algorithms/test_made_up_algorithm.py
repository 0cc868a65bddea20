"""A new algorithm needs only one file, like this one. Its config is known and it trains without other changes."""

from dataclasses import replace
from typing import ClassVar, Literal

import pytest
from builders import Captured, config, real_batch
from pydantic import Field

from rlkd.algorithms.base import Algorithm, Loss, Term
from rlkd.algorithms.registry import ALGORITHMS
from rlkd.config.schema import AlgorithmConfig
from rlkd.losses import weighted_sum

pytestmark = pytest.mark.long


class ShortestConfig(AlgorithmConfig):
    """Imitate the shortest completion of a group."""

    name: Literal["shortest"] = Field(description="shortest")
    group_size: int = Field(4, ge=2, description="completions per prompt")
    scale: float = Field(1.0, gt=0, description="factor of the loss")


class Shortest(Algorithm):
    """L(θ) = −scale · E[ Σ_t log π_θ(y*_t) / N ], y* the shortest completion of its group."""

    Options: ClassVar[type[AlgorithmConfig]] = ShortestConfig

    def advantages(self, group):
        shortest = min(len(s.rollout.token_ids) for s in group)
        return [replace(s, advantage=float(len(s.rollout.token_ids) == shortest)) for s in group]

    @property
    def terms(self):
        return {"imitation": Term()}

    def loss(self, output, batch, iteration):
        total = weighted_sum(-output.logprobs * batch.advantages, batch.loss_weights["imitation"])
        return Loss(total=self.config.algorithm.scale * total)


del ALGORITHMS["shortest"]  # defining the class registers it; other tests of the session must not see it


def test_a_made_up_algorithm_trains_from_a_config(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "shortest", Shortest)
    made = config("algorithm={name: shortest, scale: 2.0}", "teacher=null", "data.limit=16", "rollout.prompts=4")
    captured = Captured(made, real_batch(made))
    assert captured.row["loss"] > 0 and max(g.abs().max() for g in captured.gradients.values()) > 1e-3
