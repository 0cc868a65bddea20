"""Schedules: numbers that change over a run.

A schedule depends on the iteration (counted from 0) and not on the length of the run, so that a finished run can be
continued with more iterations. In YAML it is a number (constant) or a mapping with `kind`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class _Schedule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Constant(_Schedule):
    """Always `value`."""

    kind: Literal["constant"] = "constant"
    value: float = Field(ge=0, description="the value")

    def __call__(self, iteration: int) -> float:
        return self.value


class Linear(_Schedule):
    """Linear from start to end over `over` iterations, then end.

    KDRL (arXiv 2506.02208, §3.3): max(5e-3 − 5e-5·t, 1e-3) is {start: 5e-3, end: 1e-3, over: 80}.
    """

    kind: Literal["linear"]
    start: float = Field(ge=0, description="value at iteration 0")
    end: float = Field(ge=0, description="value from iteration `over` on")
    over: int = Field(gt=0, description="iterations from start to end")

    def __call__(self, iteration: int) -> float:
        return self.start + (self.end - self.start) * min(iteration / self.over, 1.0)


class Cosine(_Schedule):
    """Half a cosine from start to end over `over` iterations, then end."""

    kind: Literal["cosine"]
    start: float = Field(ge=0, description="value at iteration 0")
    end: float = Field(ge=0, description="value from iteration `over` on")
    over: int = Field(gt=0, description="iterations from start to end")

    def __call__(self, iteration: int) -> float:
        progress = min(iteration / self.over, 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Step(_Schedule):
    """start before iteration `at`, then end."""

    kind: Literal["step"]
    start: float = Field(ge=0, description="value before iteration `at`")
    end: float = Field(ge=0, description="value from iteration `at` on")
    at: int = Field(ge=0, description="first iteration with the end value")

    def __call__(self, iteration: int) -> float:
        return self.end if iteration >= self.at else self.start


class Piecewise(_Schedule):
    """Linear and cosine pieces in sequence, each over its own iterations; then the end value of the last piece.

    A warm-up over 10 iterations, then a cosine to 0 over 90: {kind: piecewise, pieces: [{kind: linear, start: 0,
    end: 1e-5, over: 10}, {kind: cosine, start: 1e-5, end: 0, over: 90}]}. Where two pieces meet, the later one applies.
    """

    kind: Literal["piecewise"]
    pieces: list[Annotated[Linear | Cosine, Field(discriminator="kind")]] = Field(
        min_length=1, description="linear and cosine schedules; each starts where the previous one ends"
    )

    def __call__(self, iteration: int) -> float:
        for piece in self.pieces[:-1]:
            if iteration < piece.over:
                return piece(iteration)
            iteration -= piece.over
        return self.pieces[-1](iteration)


def _number_is_constant(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"kind": "constant", "value": value}
    return value


Schedule = Annotated[
    Annotated[Constant | Linear | Cosine | Step | Piecewise, Field(discriminator="kind")],
    BeforeValidator(_number_is_constant),
]
"""A number, or {kind: constant | linear | cosine | step | piecewise, …}."""
