"""The section `algorithm` of KDRL: GRPO's options and the distillation term."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from rlkd.algorithms.grpo_options import GRPOConfig
from rlkd.config.schedules import Constant, Linear, Schedule
from rlkd.config.schema import Config, NoTeacherConfig, Section


class DistillationConfig(Section):
    """The distillation term of KDRL."""

    form: Literal["joint", "advantage"] = Field(
        "joint",
        description="joint: a loss added to the surrogate; advantage: β·log(T/π) added to each token's advantage",
    )
    estimator: Literal["k2", "k3"] = Field(
        "k2", description="joint form: k2 has the gradient of KL(π‖T), k3 that of KL(T‖π); k1 has none and is rejected"
    )
    coef: Schedule = Field(
        Linear(kind="linear", start=5e-3, end=1e-3, over=80), description="β, a number or a schedule over iterations"
    )
    mask: Literal["none", "response", "group"] = Field(
        "none",
        description="none: imitate on all completions; response: on failed ones; group: only in groups where all "
        "failed",
    )
    denominator: Literal["all", "kept"] = Field(
        "all", description="average over all completion tokens (β keeps its meaning) or over those that the mask keeps"
    )
    mask_eos: bool = Field(
        False, description="do not imitate on the end-of-sequence token, in case chat templates differ"
    )

    @field_validator("estimator", mode="before")
    @classmethod
    def _no_k1(cls, value: Any) -> Any:
        if value == "k1":
            raise ValueError(
                "k1 = log π − log T has zero expected gradient when back-propagated (it only adds noise); "
                "use k2, or form: advantage, which uses it detached"
            )
        return value


class KDRLConfig(GRPOConfig):
    """KDRL (arXiv 2506.02208): GRPO and on-policy distillation in one objective."""

    name: Literal["kdrl"] = Field(description="kdrl")  # type: ignore[assignment]
    policy_coef: Schedule = Field(
        Constant(value=1.0), description="factor on the advantages from rewards; 0: distillation only"
    )
    kd: DistillationConfig = Field(DistillationConfig(), description="the distillation term")

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config)
        teacher, temperature = config.teacher, config.rollout.temperature
        if isinstance(teacher, NoTeacherConfig):
            why = "is none, but algorithm.name kdrl imitates a teacher; set local or served"
            found.append(("teacher.backend", why))
        elif teacher.temperature != temperature:
            why = (
                f"is {teacher.temperature}, but rollout.temperature is {temperature}; k2, k3 and log T − log π have "
                "the gradient of a KL only at the sampling temperature; make them equal"
            )
            found.append(("teacher.temperature", why))
        if self.kd.form == "advantage" and self.kd.estimator != "k2":
            why = f"is {self.kd.estimator}, but algorithm.kd.form: advantage uses log T − log π; remove the estimator"
            found.append(("algorithm.kd.estimator", why))
        return found
