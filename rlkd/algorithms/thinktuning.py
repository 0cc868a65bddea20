"""ThinkTuning: a teacher's feedback is appended to some of the student's rollouts, and trained on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from rlkd.algorithms import feedback
from rlkd.algorithms.base import Loss
from rlkd.algorithms.feedback import Failure
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.thinktuning_options import Rule, ThinkTuningConfig
from rlkd.config.schema import Config
from rlkd.data import seeds
from rlkd.generation.sampler import Sampler, Sampling
from rlkd.losses import advantage_shaping, weighted_sum
from rlkd.metrics import MetricAccumulator
from rlkd.models.logprob_head import PolicyOutput
from rlkd.teachers.teacher import ScoreRequest, Teacher
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

    def __init__(self, config: Config):
        super().__init__(config)
        self._failed: dict[tuple[str, int], Failure] = {}
        """(prompt, completion) → why it has no feedback, in the iteration `_failed_in`; for `diagnose`."""
        self._failed_in: int | None = None

    @property
    def options(self) -> ThinkTuningConfig:
        assert isinstance(self.config.algorithm, ThinkTuningConfig)
        return self.config.algorithm

    def rollout(
        self, prompts: Sequence[Prompt], policy: Sampler, teacher: Teacher | None, iteration: int
    ) -> list[list[Rollout]]:
        groups = super().rollout(prompts, policy, teacher, iteration)
        if iteration != self._failed_in:  # an iteration may draw several blocks, or be repeated with the same draws
            self._failed, self._failed_in = {}, iteration
        share = self.options.guided(iteration)
        if share <= self.options.off_below:
            return groups
        asked, budget = self.options.feedback, self.options.augmented_tokens(self.config)
        questions: dict[tuple[int, int], ScoreRequest] = {}
        for g, i in [(g, i) for g, group in enumerate(groups) for i in self._chosen(group, share, iteration)]:
            prompt, ids = groups[g][i].prompt, feedback.question_ids(asked, self.tokenizer, groups[g][i])
            if len(ids) > asked.max_prompt_tokens:
                self._failed[prompt.id, i] = "budget"
            else:
                questions[g, i] = ScoreRequest(ids, name=f"{prompt.id}/{i}", meta=prompt.meta)
        assert teacher is not None
        sampling = Sampling(temperature=asked.temperature, max_tokens=asked.max_tokens, seed=self.config.run.seed)
        answers = teacher.write(list(questions.values()), sampling, iteration)
        for (g, i), answer in zip(questions, answers, strict=True):
            made = feedback.answered(asked, self.tokenizer, groups[g][i], answer, budget)
            if isinstance(made, Rollout):
                groups[g][i] = made
            else:
                self._failed[groups[g][i].prompt.id, i] = made
        return groups

    @property
    def failures(self) -> Counter[Failure]:
        """Number of completions of the last iteration without feedback, by reason, over all that were sampled."""
        return Counter(self._failed.values())

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

    def diagnose(
        self,
        groups: Sequence[Sequence[ScoredRollout]],
        teacher: Teacher | None,
        iteration: int,
        meter: MetricAccumulator,
    ) -> None:
        for scored in (s for group in groups for s in group):
            guided = bool(scored.rollout.segments)
            meter.mean("guided/fraction", float(guided), 1.0)
            for name, counts in (("guided/reward", guided), ("guided/plain_reward", not guided)):
                known = counts and scored.reward is not None
                meter.mean(name, scored.reward or 0.0 if known else 0.0, float(known))
        for kind in ("format", "budget"):
            meter.total(f"guided/{kind}_failures", float(self.failures[kind]))

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
