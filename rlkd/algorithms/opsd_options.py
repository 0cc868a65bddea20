"""The section `algorithm` of OPSD, and of what refines it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.algorithms.divergence_options import DivergenceConfig
from rlkd.algorithms.opd_options import OPDConfig
from rlkd.algorithms.privileged_prompt_options import ContextConfig
from rlkd.config.kinds import Reduction
from rlkd.config.schema import Config, NoTeacherConfig


class OPSDConfig(OPDConfig):
    """On-policy self-distillation (arXiv 2601.18734): the student that is shown a solution teaches the one that is not.

    Usual teacher: {backend: self, weights: fixed}.
    """

    name: Literal["opsd"] = Field(description="opsd")  # type: ignore[assignment]
    group_size: int = Field(1, ge=1, description="completions per prompt")
    divergence: DivergenceConfig = Field(
        DivergenceConfig(kind="forward_kl", clip=0.05), description="what is minimised at each token"
    )
    reduction: Reduction = Field("sequence_mean", description="normaliser: tokens of a sequence, then sequences, or …")
    context: ContextConfig = Field(
        ContextConfig(reference="A reference solution:\n{text}"), description="what only the teacher is shown"
    )
    leakage_every: int = Field(
        0, ge=0, description="iterations between checks of the hints: divergence under the right and a shuffled one"
    )

    def teacher_lengths(self, config: Config) -> dict[str, int]:
        return {
            "algorithm.context.max_tokens": self.context.max_tokens,
            "rollout.max_tokens": config.rollout.max_tokens,
        }

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config)
        builtin = config.data.path.startswith("builtin:")  # it has a column of its own
        if self.context.reference is not None and config.data.privileged_column is None and not builtin:
            why = "is null, but algorithm.context.reference shows it to the teacher; name the column of the solutions"
            found.append(("data.privileged_column", why))
        if self.leakage_every and self.context.reference is None:
            why = f"is {self.leakage_every}, but algorithm.context.reference is null: there is no hint; set one"
            found.append(("algorithm.leakage_every", why))
        teacher, temperature = config.teacher, config.rollout.temperature
        if self.leakage_every and not isinstance(teacher, NoTeacherConfig) and teacher.temperature != temperature:
            why = (
                f"is {self.leakage_every}, but teacher.temperature is {teacher.temperature} and rollout.temperature "
                f"{temperature}: log π − log T estimates a KL at one temperature only; make them equal, or set "
                "algorithm.leakage_every: 0"
            )
            found.append(("algorithm.leakage_every", why))
        return found
