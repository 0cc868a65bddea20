"""The section `reward`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rlkd.config.sections.base import Section


class RewardFunction(Section):
    """One reward and its weight."""

    name: str = Field(description="exact_match, math, format, or module:function of your own")
    weight: float = Field(1.0, description="factor in the sum of rewards")
    options: dict[str, Any] = Field({}, description="keyword arguments of the function")


class RewardConfig(Section):
    """What a completion is worth."""

    functions: list[RewardFunction] = Field(
        [RewardFunction(name="exact_match")], min_length=1, description="rewards, added up with their weights"
    )
    workers: int = Field(1, ge=1, description="worker processes of each rank")
    timeout_s: float = Field(10.0, gt=0, description="seconds per completion and function; then the worker is killed")
    max_error_rate: float = Field(
        0.1, ge=0, le=1, description="share of failed rewards in an iteration above which the run stops"
    )
    correct_at: float = Field(
        1.0, description="a completion counts as correct (accuracy, KD masks) from this reward on"
    )
