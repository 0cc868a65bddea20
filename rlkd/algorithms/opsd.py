"""OPSD: on-policy self-distillation. The student under a privileged prompt is its own teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rlkd.algorithms.opd import OPD
from rlkd.algorithms.opsd_options import OPSDConfig
from rlkd.algorithms.privileged_prompt import privileged_prompt
from rlkd.config.schema import AlgorithmConfig
from rlkd.metrics import MetricAccumulator
from rlkd.teachers.teacher import AsyncTeacher, ScoreRequest
from rlkd.types import Prompt, ScoredRollout, Signal

LEAKAGE_ROLLOUTS = 32
"""Maximum rollouts per rank that a leakage check scores, each twice."""


class OPSD(OPD):
    """L(θ) = E_{(x, y*)} E_{y ~ π_θ(·|x)} [ 1/|y| Σ_t D( π_θ₀(·|x, y*, y_<t), π_θ(·|x, y_<t) ) ]

    arXiv 2601.18734, Eq. 6: the teacher is the student itself, reading the solution y* before the same completion; no
    gradient flows into it. `teacher.weights` selects which student: the initial policy θ₀ (the paper's experiments), a
    moving average, or the live one. D is the forward KL with each vocabulary entry's share capped at τ = 0.05 (v3); for
    JSD or the reverse KL set `divergence`. A completion without context is masked.
    """

    Options: ClassVar[type[AlgorithmConfig]] = OPSDConfig

    @property
    def options(self) -> OPSDConfig:
        assert isinstance(self.config.algorithm, OPSDConfig)
        return self.config.algorithm

    @property
    def needs_rewards(self) -> bool:
        """Rewards decide which sibling is correct, and return the feedback."""
        context = self.options.context
        return context.sibling is not None or context.feedback is not None

    def teacher_prompt(self, scored: ScoredRollout, group: Sequence[ScoredRollout]) -> tuple[int, ...] | None:
        return self._shown(scored.rollout.prompt, self.parts(scored, group))

    def parts(self, scored: ScoredRollout, group: Sequence[ScoredRollout]) -> list[str]:
        """What the teacher is shown in addition to the prompt."""
        correct_at = self.config.reward.correct_at
        siblings = [s for s in group if s is not scored and s.is_correct(correct_at)]
        text = self.text(siblings[0].rollout) if siblings else None
        return self.options.context.parts(scored.rollout.prompt.privileged, text, scored.feedback)

    def _shown(self, prompt: Prompt, parts: Sequence[str]) -> tuple[int, ...] | None:
        context = self.options.context
        if "{context}" in context.template and not parts:
            return None
        ids = privileged_prompt(self.tokenizer, prompt, context.template, parts, self.config.data)
        return ids if len(ids) <= context.max_tokens else None

    async def diagnose(
        self,
        trained: Sequence[Sequence[ScoredRollout]],
        drawn: Sequence[Sequence[ScoredRollout]],
        teacher: AsyncTeacher | None,
        iteration: int,
        meter: MetricAccumulator,
    ) -> None:
        rows = [scored for group in trained for scored in group]
        meter.mean("context/share", sum(s.teacher is not None for s in rows), len(rows))
        if self.options.leakage_every and iteration % self.options.leakage_every == 0:
            assert teacher is not None
            await self._leakage([group[0] for group in trained][:LEAKAGE_ROLLOUTS], teacher, meter)

    async def _leakage(self, rows: Sequence[ScoredRollout], teacher: AsyncTeacher, meter: MetricAccumulator) -> None:
        """log π − log T per token, an estimate of KL(π‖T), under the right hint and under another prompt's.

        If a hint only changes the style, the right one and a wrong one move the teacher equally far.
        """
        hints = [s.rollout.prompt.privileged for s in rows]
        for name, shown in (("right", hints), ("shuffled", [*hints[1:], *hints[:1]])):
            asked = []
            for scored, hint in zip(rows, shown, strict=True):
                ids = self._shown(scored.rollout.prompt, self.options.context.parts(hint, None, None))
                if ids is not None and scored.rollout.oldest_version is not None:
                    asked.append((scored, ScoreRequest(ids, scored.rollout.token_ids, meta=scored.rollout.prompt.meta)))
            scores = await teacher.score([question for _, question in asked], Signal())
            gaps = [
                own - other
                for (scored, _), theirs in zip(asked, scores, strict=True)
                for own, other in zip(scored.rollout.logprobs, theirs.logprobs, strict=True)
                if own is not None
            ]
            meter.mean(f"leakage/kl_{name}", sum(gaps), len(gaps))
