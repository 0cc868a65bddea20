"""The start-up check behind `teacher.check_parity`: does the teacher score tokens correctly?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlkd import distributed
from rlkd.config.schema import Config, ServedTeacherConfig
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import Sampler, Sampling
from rlkd.teachers.local import LocalScorer
from rlkd.teachers.teacher import ScoreRequest, Teacher
from rlkd.types import Prompt, Signal

PROMPTS = 8


def check_parity(
    config: Config, prompts: Sequence[Prompt], policy: Sampler, reference: LocalScorer, teacher: Teacher | None
) -> dict[str, float]:
    """Score fresh samples of the untrained student twice and compare the log-probs.

    Student as teacher: the frozen initial student must give the samples the same log-probs as the sampler, which finds
    shifted positions and differing chat templates or temperatures. Served against local: a served teacher must give
    the same log-probs as the same model in this process.

    Args:
        prompts: this rank's prompts; the first few are used.
        policy: a sampler with the student's initial weights.
        reference: the initial student, opened.
        teacher: the run's teacher, opened.

    Returns: the mean difference per token in nats, on the worst rank. Raises: RunStopped if it is above
        `rollout.max_mismatch`.
    """
    questions, gap = sampler_gap(config, prompts, policy, reference)
    gaps = {"student as teacher": gap}
    if isinstance(config.teacher, ServedTeacherConfig) and teacher is not None:
        local = LocalScorer(
            config.teacher.path,
            vocabulary=reference.vocabulary,
            temperature=1.0,
            batch_tokens=config.trainer.micro_batch_tokens,
            dtype=reference.dtype,
            accelerator=config.trainer.accelerator,
            attention=config.model.attention,
            trust_remote_code=config.model.trust_remote_code,
        )
        local.open()
        gaps["served against local teacher"] = _gap(
            [s.logprobs for s in teacher.score(questions, Signal())],
            [s.logprobs for s in local.score(questions, Signal())],
        )
        local.close()
    worst = dict(zip(gaps, distributed.all_reduce(list(gaps.values()), "max"), strict=True))
    for name, gap in worst.items():
        if not gap <= config.rollout.max_mismatch:
            raise RunStopped(
                f"teacher.check_parity: {name}: expected a mean difference of at most rollout.max_mismatch = "
                f"{config.rollout.max_mismatch} nats per token, got {gap:.3g}; check the model folders, dtypes and "
                "temperatures of both sides"
            )
    return worst


def sampler_gap(
    config: Config, prompts: Sequence[Prompt], policy: Sampler, same: LocalScorer
) -> tuple[list[ScoreRequest], float]:
    """Sample one completion of each of the first few prompts.

    Returns: (the samples as questions, the mean difference per token, in nats, between their log-probs by the sampler
        and by `same`, the same model opened in this process).
    """
    sampling = Sampling(
        temperature=config.rollout.temperature, max_tokens=config.rollout.max_tokens, seed=config.run.seed
    )
    rollouts = [group[0] for group in policy.sample(prompts[:PROMPTS], n=1, iteration=0, sampling=sampling)]
    questions = [ScoreRequest(rollout.prompt.token_ids, rollout.token_ids) for rollout in rollouts]
    scores = [s.logprobs for s in same.score(questions, Signal())]
    return questions, _gap(scores, [[p or 0.0 for p in r.logprobs] for r in rollouts])


def _gap(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """Mean |a − b| over all tokens, like `mismatch/mean`."""
    gaps = [abs(x - y) for row_a, row_b in zip(a, b, strict=True) for x, y in zip(row_a, row_b, strict=True)]
    return math.fsum(gaps) / len(gaps)
