"""ThinkTuning: a teacher's feedback is appended to some of the student's rollouts, and trained on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlkd import noise
from rlkd.algorithms import feedback
from rlkd.algorithms.feedback import Failure, FeedbackConfig
from rlkd.algorithms.grpo import GRPO, GRPOConfig
from rlkd.config import Config, NoTeacher
from rlkd.losses import advantage_shaping, weighted_sum
from rlkd.metrics import Meter
from rlkd.module import Loss
from rlkd.policy_head import PolicyOutput
from rlkd.rollout.sampler import Sampler, Sampling
from rlkd.schedules import Linear, Schedule
from rlkd.teachers.teacher import Question, Teacher
from rlkd.types import AUTHORS, Batch, Prompt, Rollout, ScoredRollout

Rule = Literal["ppo", "shaped", "sft", "mask"]
RARE = 0.01
"""Shaped tokens of negative advantage with less probability than this are left to the clipped surrogate."""


class ThinkTuningConfig(GRPOConfig):
    """ThinkTuning (arXiv 2508.07616): GRPO in which a teacher's feedback goes on with some of the rollouts."""

    name: Literal["thinktuning"] = Field(description="thinktuning")  # type: ignore[assignment]
    guided: Schedule = Field(
        Linear(kind="linear", start=0.1, end=0.01, over=100),
        description="share of a prompt's ended completions that get feedback, a number or a schedule over iterations",
    )
    off_below: float = Field(0.06, ge=0, description="at this share or below the teacher is not asked: plain GRPO")
    at_least: int = Field(1, ge=0, description="completions of a prompt that get feedback however small the share is")
    feedback: FeedbackConfig = Field(FeedbackConfig(), description="what the teacher is asked")
    max_augmented_tokens: int | None = Field(
        None,
        ge=1,
        description="longest completion with its feedback; null: rollout.max_tokens + algorithm.feedback.max_tokens",
    )
    teacher_tokens: Rule = Field(
        "ppo",
        description="loss on the teacher's tokens: ppo (clipped surrogate, old = the trainer's own), shaped (advantage-"
        "aware shaping), sft (cross-entropy where the advantage is positive), or mask (none)",
    )
    glue_tokens: Rule | None = Field(
        None, description="loss on the glue before them; null: as algorithm.teacher_tokens"
    )
    shaping: list[float] = Field(
        [0.0, 0.1], min_length=2, max_length=2, description="shaped: γ at advantages of 4 and of −4; the more, the less"
    )

    def augmented_tokens(self, config: Config) -> int:
        """The longest completion with its feedback."""
        default = config.rollout.max_tokens + self.feedback.max_tokens
        return default if self.max_augmented_tokens is None else self.max_augmented_tokens

    def trained_lengths(self, config: Config) -> dict[str, int]:
        completion = max(self.augmented_tokens(config), config.rollout.max_tokens)
        return {"data.max_prompt_tokens": config.data.max_prompt_tokens, "algorithm.max_augmented_tokens": completion}

    def teacher_lengths(self, config: Config) -> dict[str, int]:
        asked = self.feedback
        return {
            "algorithm.feedback.max_prompt_tokens": asked.max_prompt_tokens,
            "algorithm.feedback.max_tokens": asked.max_tokens,
        }

    def longest_teacher_prompt(self, config: Config) -> int:
        # A server adds rollout.max_tokens, for a completion that it scores; ours writes feedback.max_tokens instead.
        return sum(self.teacher_lengths(config).values()) - config.rollout.max_tokens

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config)
        asked, (low, high) = self.feedback, self.shaping
        if isinstance(config.teacher, NoTeacher):
            why = "is none, but algorithm.name thinktuning wants feedback; set local, served or self"
            found.append(("teacher.backend", why))
        if not asked.chat_template and (asked.system is not None or asked.behaviours):
            why = "is false, but a system message and examples are turns of a chat; set system: null, behaviours: []"
            found.append(("algorithm.feedback.chat_template", why))
        if not 0 <= low <= high:
            why = f"is [{low}, {high}], wants 0 ≤ first ≤ second: else π / (π + γ) has no bound"
            found.append(("algorithm.shaping", why))
        return found


class ThinkTuning(GRPO):
    """GRPO on a mixed group: y_i, or for k of the completions that ended, y_i + glue + reason + glue + phrase.

    arXiv 2508.07616. k = max(1, ⌊γ(t) · ended⌋), chosen blindly; the teacher (a frozen copy of the same model, shown
    examples of reflection) sees neither the right answer nor the reward. The reward is the whole completion's, and
    advantages are over the mixed group. Student tokens have GRPO's loss. The teacher's have the trainer's own log-probs
    for old ones, importance weight 1, and the loss that `teacher_tokens` names; the KL to a reference acts where the
    clipped surrogate does.

    Other than the released code we never tokenise the student's text again, check the length before appending, shape
    the teacher's tokens only, and keep γ's bounds (there `clamp(γ, 0.001, −0.001)` makes it −0.001 for ever).
    """

    Options: ClassVar[type[ThinkTuningConfig]] = ThinkTuningConfig
    uses_teacher = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.failures: Counter[Failure] = Counter()
        """Of the last `rollout`, for `diagnose`."""

    @property
    def algorithm(self) -> ThinkTuningConfig:
        assert isinstance(self.config.algorithm, ThinkTuningConfig)
        return self.config.algorithm

    def rollout(
        self, prompts: Sequence[Prompt], policy: Sampler, teacher: Teacher | None, iteration: int
    ) -> list[list[Rollout]]:
        groups = super().rollout(prompts, policy, teacher, iteration)
        self.failures = Counter()
        share = self.algorithm.guided(iteration)
        if share <= self.algorithm.off_below:
            return groups
        asked, budget = self.algorithm.feedback, self.algorithm.augmented_tokens(self.config)
        questions: dict[tuple[int, int], Question] = {}
        for g, i in [(g, i) for g, group in enumerate(groups) for i in self._chosen(group, share, iteration)]:
            prompt, ids = groups[g][i].prompt, feedback.question_ids(asked, self.tokenizer, groups[g][i])
            if len(ids) > asked.max_prompt_tokens:
                self.failures["budget"] += 1
            else:
                questions[g, i] = Question(ids, name=f"{prompt.id}/{i}", meta=prompt.meta)
        assert teacher is not None
        sampling = Sampling(temperature=asked.temperature, max_tokens=asked.max_tokens, seed=self.config.run.seed)
        answers = teacher.write(list(questions.values()), sampling, iteration)
        for (g, i), answer in zip(questions, answers, strict=True):
            made = feedback.answered(asked, self.tokenizer, groups[g][i], answer, budget)
            if isinstance(made, Rollout):
                groups[g][i] = made
            else:
                self.failures[made] += 1
        return groups

    def _chosen(self, group: Sequence[Rollout], share: float, iteration: int) -> list[int]:
        """Which completions of a prompt get feedback, drawn by (seed, iteration, prompt)."""
        ended = [i for i, r in enumerate(group) if r.finish_reason == "stop" and len(r.token_ids) > 1]
        count = min(len(ended), max(self.algorithm.at_least, math.floor(len(ended) * share + 1e-9)))
        draw = noise.generator(self.config.run.seed, iteration, "guided", group[0].prompt.id)
        return sorted(draw.choice(ended, count, replace=False).tolist()) if count else []

    def teacher_prompt(self, scored: ScoredRollout, group: Sequence[ScoredRollout]) -> None:
        """The teacher writes, and scores nothing."""

    def diagnose(self, groups: Sequence[Sequence[ScoredRollout]], teacher: Teacher | None, meter: Meter) -> None:
        for scored in (s for group in groups for s in group):
            guided = bool(scored.rollout.segments)
            meter.mean("guided/fraction", float(guided), 1.0)
            for name, counts in (("guided/reward", guided), ("guided/plain_reward", not guided)):
                known = counts and scored.reward is not None
                meter.mean(name, scored.reward or 0.0 if known else 0.0, float(known))
        for kind in ("format", "budget"):
            meter.total(f"guided/{kind}_failures", float(self.failures[kind]))

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        assert batch.weights is not None
        advantages = batch.advantages
        rare = (advantages < 0) & (output.logprobs.detach() < math.log(RARE))
        shaped, sft = self._under("shaped", batch) & ~rare, self._under("sft", batch)
        elsewhere = shaped | sft | self._under("mask", batch)
        policy = self.policy_loss(
            output, replace(batch, weights=torch.where(elsewhere, 0.0, batch.weights)), advantages
        )
        aware = advantage_shaping(output.logprobs, advantages, self.algorithm.shaping[0], self.algorithm.shaping[1])
        imitated = torch.where(advantages > 0, -output.logprobs, 0.0)
        guided = weighted_sum(torch.where(shaped, aware, imitated), torch.where(shaped | sft, batch.weights, 0.0))
        return Loss(total=policy.total + guided, metrics=policy.metrics | {"loss/guided": guided.detach()})

    def _under(self, rule: Rule, batch: Batch) -> Tensor:
        """[B, T] bool: the tokens of others that `rule` is for."""
        rules = {"teacher": self.algorithm.teacher_tokens, "glue": self.algorithm.glue_tokens}
        rules["glue"] = rules["glue"] or rules["teacher"]
        authors = [AUTHORS.index(author) for author in ("teacher", "glue") if rules[author] == rule]
        return torch.isin(batch.authors, torch.tensor(authors, device=batch.authors.device, dtype=batch.authors.dtype))
