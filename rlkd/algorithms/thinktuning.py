"""ThinkTuning: a teacher's feedback is appended to some of the student's rollouts, and trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, get_args

import torch
from torch import Tensor

from rlkd.algorithms import feedback
from rlkd.algorithms.base import Loss
from rlkd.algorithms.feedback import Failure
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.thinktuning_options import Rule, ThinkTuningConfig
from rlkd.data import seeds
from rlkd.generation.sampler import AsyncSampler, Sampling
from rlkd.losses import advantage_shaping, weighted_sum
from rlkd.metrics import MetricAccumulator
from rlkd.models.logprob_head import PolicyOutput
from rlkd.teachers.teacher import AsyncTeacher, ScoreRequest
from rlkd.types import AUTHORS, Batch, Prompt, Rollout, ScoredRollout

RARE = 0.01
"""Shaped tokens with negative advantage and a lower probability than this get the clipped surrogate."""


class ThinkTuning(GRPO):
    """GRPO on a mixed group: y_i, or for k of the completions that ended, y_i + glue + reason + glue + phrase.

    arXiv 2508.07616. k = max(1, ⌊γ(t) · ended⌋), chosen at random; the teacher (a frozen copy of the same model, shown
    examples of reflection) sees neither the right answer nor the reward. The reward is the whole completion's, and
    advantages are over the mixed group. Student tokens have GRPO's loss. The teacher's have the trainer's own log-probs
    as old ones, importance weight 1, and the loss that `teacher_tokens` names; the KL to a reference acts where the
    clipped surrogate does.

    Unlike the released code we never tokenise the student's text again, check the length before appending, shape
    the teacher's tokens only, and keep γ's bounds (there `clamp(γ, 0.001, −0.001)` makes it −0.001 always).
    """

    Options: ClassVar[type[ThinkTuningConfig]] = ThinkTuningConfig
    uses_teacher = True

    @property
    def options(self) -> ThinkTuningConfig:
        assert isinstance(self.config.algorithm, ThinkTuningConfig)
        return self.config.algorithm

    async def rollout(
        self, prompt: Prompt, policy: AsyncSampler, teacher: AsyncTeacher | None, iteration: int
    ) -> list[Rollout]:
        group = await super().rollout(prompt, policy, teacher, iteration)
        share = self.options.guided(iteration)
        if share <= self.options.off_below:
            return group
        asked, budget = self.options.feedback, self.options.augmented_tokens(self.config)
        questions: dict[int, ScoreRequest] = {}
        for i in self._chosen(group, share, iteration):
            ids = feedback.question_ids(asked, self.tokenizer, group[i])
            if len(ids) > asked.max_prompt_tokens:
                group[i] = replace(group[i], note="budget")
            else:
                questions[i] = ScoreRequest(ids, name=f"{prompt.id}/{i}", meta=prompt.meta)
        assert teacher is not None
        sampling = Sampling(temperature=asked.temperature, max_tokens=asked.max_tokens, seed=self.config.run.seed)
        answers = await teacher.write(list(questions.values()), sampling, iteration)
        for i, answer in zip(questions, answers, strict=True):
            made = feedback.answered(asked, self.tokenizer, group[i], answer, budget)
            group[i] = made if isinstance(made, Rollout) else replace(group[i], note=made)
        return group

    def limit(self, rollout: Rollout) -> int:
        """The teacher's text has a budget of its own: the student is not penalised for it."""
        return self.longest_completion if rollout.segments else super().limit(rollout)

    def _chosen(self, group: Sequence[Rollout], share: float, iteration: int) -> list[int]:
        """Which completions of a prompt get feedback, drawn by (seed, iteration, prompt)."""
        ended = [i for i, r in enumerate(group) if r.finish_reason == "stop" and len(r.token_ids) > 1]
        count = min(len(ended), max(self.options.at_least, math.floor(len(ended) * share + 1e-9)))
        draw = seeds.generator(self.config.run.seed, iteration, "guided", group[0].prompt.id)
        return sorted(draw.choice(ended, count, replace=False).tolist()) if count else []

    def teacher_prompt(self, scored: ScoredRollout, group: Sequence[ScoredRollout]) -> None:
        """None: the teacher writes, and scores nothing."""

    async def diagnose(
        self,
        trained: Sequence[Sequence[ScoredRollout]],
        drawn: Sequence[Sequence[ScoredRollout]],
        teacher: AsyncTeacher | None,
        iteration: int,
        meter: MetricAccumulator,
    ) -> None:
        for scored in (s for group in trained for s in group):
            guided = bool(scored.rollout.segments)
            meter.mean("guided/fraction", float(guided), 1.0)
            for name, counts in (("guided/reward", guided), ("guided/plain_reward", not guided)):
                known = counts and scored.reward is not None
                meter.mean(name, scored.reward or 0.0 if known else 0.0, float(known))
        notes = [scored.rollout.note for group in drawn for scored in group]
        for failure in get_args(Failure):
            meter.total(f"guided/{failure}_failures", float(notes.count(failure)))

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        advantages, weights = batch.advantages, batch.loss_weights["policy"]
        rare = (advantages < 0) & (output.logprobs.detach() < math.log(RARE))
        shaped, sft = self._under("shaped", batch) & ~rare, self._under("sft", batch)
        elsewhere = shaped | sft | self._under("mask", batch)
        policy = self.policy_loss(output, batch.weighted(policy=torch.where(elsewhere, 0.0, weights)), advantages)
        aware = advantage_shaping(output.logprobs, advantages, self.options.shaping[0], self.options.shaping[1])
        imitated = torch.where(advantages > 0, -output.logprobs, 0.0)
        guided = weighted_sum(torch.where(shaped, aware, imitated), torch.where(shaped | sft, weights, 0.0))
        return Loss(total=policy.total + guided, metrics=policy.metrics | {"loss/guided": guided.detach()})

    def _under(self, rule: Rule, batch: Batch) -> Tensor:
        """[B, T] bool: the tokens by the teacher or glue to which `rule` applies."""
        rules = {"teacher": self.options.teacher_tokens, "glue": self.options.glue_tokens}
        rules["glue"] = rules["glue"] or rules["teacher"]
        authors = [AUTHORS.index(author) for author in ("teacher", "glue") if rules[author] == rule]
        return torch.isin(batch.authors, torch.tensor(authors, device=batch.authors.device, dtype=batch.authors.dtype))
