"""The section `algorithm` of OPSD, also the base of SDPO's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.algorithms.divergence_options import DivergenceConfig
from rlkd.algorithms.opd_options import OPDConfig
from rlkd.algorithms.privileged_prompt_options import ContextConfig
from rlkd.config.kinds import Reduction
from rlkd.config.schema import Config, NoTeacherConfig


class OPSDConfig(OPDConfig):
    """On-policy self-distillation (arXiv 2601.18734): the student, shown a solution, teaches itself without.

    Typical teacher: {backend: self, weights: fixed}.
    """

    name: Literal["opsd"] = Field(description="opsd")  # type: ignore[assignment]
    group_size: int = Field(1, ge=1, description="completions per prompt")
    divergence: DivergenceConfig = Field(
        DivergenceConfig(kind="forward_kl", clip=0.05), description="the divergence that is minimised at each token"
    )
    reduction: Reduction = Field(
        "sequence_mean",
        description="average over tokens per sequence then sequences, over all tokens, or over sequences × longest "
        "completion",
    )
    context: ContextConfig = Field(
        ContextConfig(reference="A reference solution:\n{text}"), description="context shown only to the teacher"
    )
    leakage_every: int = Field(
        0,
        ge=0,
        description="iterations between leakage checks: divergence with the correct and with a shuffled hint; 0: never",
    )

    def teacher_lengths(self, config: Config) -> dict[str, int]:
        return {
            "algorithm.context.max_tokens": self.context.max_tokens,
            "rollout.max_tokens": config.rollout.max_tokens,
        }

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config)
        builtin = config.data.path.startswith("builtin:")  # builtin data has a privileged column
        if self.context.reference is not None and config.data.privileged_column is None and not builtin:
            why = "is null, but algorithm.context.reference shows it to the teacher; set it to the column of solutions"
            found.append(("data.privileged_column", why))
        if self.leakage_every and self.context.reference is None:
            why = f"is {self.leakage_every}, but algorithm.context.reference is null, so there is no hint; set it"
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
