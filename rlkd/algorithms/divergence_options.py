"""The section `divergence` of the algorithms that compare whole distributions: OPD, OPSD, TAID."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlkd.config.kinds import DivergenceKind
from rlkd.config.schema import Config, NoTeacherConfig, Section, SelfTeacherConfig, ServedTeacherConfig, ServerConfig

if TYPE_CHECKING:  # these import torch, which reading a configuration does not need
    from rlkd.models.logprob_head import DivergenceSpec
    from rlkd.types import Signal


class DivergenceConfig(Section):
    """How student and teacher are compared at each token."""

    tier: Literal["full", "top_k", "sampled"] = Field(
        "full",
        description="full: the full vocabulary (local teachers); top_k: k tokens and the rest; sampled: only the "
        "sampled token",
    )
    kind: DivergenceKind = Field(
        "reverse_kl", description="full, top_k: KL(T‖S), KL(S‖T), or β·KL(T‖M) + (1−β)·KL(S‖M) with M = βT + (1−β)S"
    )
    beta: float = Field(0.5, gt=0, lt=1, description="β in the jsd")
    rescale: bool = Field(
        False, description="divide the jsd by β(1−β), so that it tends to KL(T‖S) as β → 0 and to KL(S‖T) as β → 1"
    )
    clip: float | None = Field(
        None, gt=0, description="full, top_k: cap on the contribution of each vocabulary entry; null: none"
    )
    k: int = Field(100, ge=1, description="top_k: number of tokens")
    support: Literal["teacher", "student", "sampler"] = Field(
        "teacher",
        description="top_k: whose most likely tokens; student: recomputed at each update, needs a local teacher; "
        "sampler: the "
        "student's at sampling time, needs a local teacher or vLLM servers on GPUs",
    )
    tail: bool = Field(
        True, description="top_k: treat all other tokens as one extra entry; false: renormalise over the k tokens"
    )
    form: Literal["advantage", "k2"] = Field(
        "advantage", description="sampled: log T − log π as a detached advantage, or ½(log T − log π)² back-propagated"
    )

    @property
    def signal(self) -> Signal:
        """What the teacher must return per token."""
        from rlkd.types import Signal

        if self.tier == "sampled":
            return Signal()
        if self.needs_distribution:
            return Signal(tier="hidden")
        return Signal(tier="top_k", k=self.k) if self.support == "teacher" else Signal(tier="given")

    @property
    def needs_distribution(self) -> bool:
        """Whether the teacher must return its full distribution at each token."""
        return self.tier == "full" or (self.tier == "top_k" and self.support == "student")

    @property
    def sampler_top_k(self) -> int:
        """Number of most likely tokens that the sampler must record at each position; 0: none."""
        return self.k if self.tier == "top_k" and self.support == "sampler" else 0

    def comparison(
        self, temperature: float, *, blend: float | None = None, ratio_cap: float | None = None
    ) -> DivergenceSpec | None:
        """What the forward pass must compute; None if the log-probs of the sampled tokens suffice."""
        if self.tier == "sampled":
            return None
        from rlkd.models.logprob_head import DivergenceSpec

        top: Literal["given", "student_top_k"] = "student_top_k" if self.support == "student" else "given"
        return DivergenceSpec(
            kind=self.kind,
            temperature=temperature,
            beta=self.beta,
            clip=self.clip,
            support="full" if self.tier == "full" else top,
            k=self.k,
            tail=self.tail,
            blend=blend,
            ratio_cap=ratio_cap,
        )

    @property
    def scale(self) -> float:
        """Constant factor on the loss."""
        return 1.0 / (self.beta * (1.0 - self.beta)) if self.rescale and self.kind == "jsd" else 1.0

    def problems(self, config: Config) -> list[tuple[str, str]]:
        """Contradictions with the teacher's settings: (key, one-line message)."""
        teacher = config.teacher
        if isinstance(teacher, NoTeacherConfig):
            return [
                (
                    "teacher.backend",
                    f"is none, but algorithm.name {config.algorithm.name} imitates one; configure one",
                )
            ]
        found = []
        servers = scoring_servers(config)
        if self.needs_distribution and servers:
            why = (
                f"is {self.tier}, which needs the teacher's full distribution, but the teacher runs on a server; "
                "use top_k with support: teacher or sampler, or sampled, or a local teacher"
            )
            found.append(("algorithm.divergence.tier", why))
        on_this_cpu = config.trainer.accelerator == "cpu" and any(server.launch for server in servers)
        if self.sampler_top_k and on_this_cpu:
            why = "is sampler, but vLLM on a CPU cannot score given tokens; set it to teacher, or use a local teacher"
            found.append(("algorithm.divergence.support", why))
        if self.tier == "sampled" and self.kind != "reverse_kl":
            why = f"is {self.kind}, but tier: sampled supports only reverse_kl; change one of them"
            found.append(("algorithm.divergence.kind", why))
        if self.tier == "sampled" and teacher.temperature != config.rollout.temperature:
            why = (
                f"is {teacher.temperature}, but rollout.temperature is {config.rollout.temperature}; on sampled tokens "
                "log T − log π has the gradient of a KL only at the sampling temperature; make them equal"
            )
            found.append(("teacher.temperature", why))
        return found


def scoring_servers(config: Config) -> list[ServerConfig]:
    """Settings of the servers that score for the teacher; empty if all teachers run in the trainer processes."""
    if isinstance(config.teacher, SelfTeacherConfig):
        return [config.rollout.server] if config.teacher.scorer == "policy_server" else []
    return [teacher.server for _, teacher in config.teachers if isinstance(teacher, ServedTeacherConfig)]
