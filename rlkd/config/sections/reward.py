"""The section `reward`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rlkd.config.sections.base import Section


class RewardFunction(Section):
    """One reward and its weight."""

    name: str = Field(description="exact_match, math, format, or your own module:function")
    weight: float = Field(1.0, description="weight in the sum of rewards")
    options: dict[str, Any] = Field({}, description="keyword arguments of the function")


class RewardConfig(Section):
    """How completions are rewarded."""

    functions: list[RewardFunction] = Field(
        [RewardFunction(name="exact_match")],
        min_length=1,
        description="reward functions; the reward is their weighted sum",
    )
    workers: int = Field(1, ge=1, description="worker processes per rank")
    timeout_s: float = Field(
        10.0, gt=0, description="seconds allowed per completion and function, after which the worker is killed"
    )
    max_error_rate: float = Field(
        0.1, ge=0, le=1, description="the run stops if a larger share of rewards fails in an iteration"
    )
    correct_at: float = Field(
        1.0, description="a completion counts as correct (accuracy, KD masks) if its reward is at least this"
    )
