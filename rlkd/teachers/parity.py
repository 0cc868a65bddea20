"""The start-up check behind `teacher.check_parity`: does the teacher path score tokens as it should?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlkd import distributed
from rlkd.config.schema import Config, ServedTeacherConfig
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import Sampler, Sampling
from rlkd.teachers.local import LocalScorer
from rlkd.teachers.teacher import Question, Teacher
from rlkd.types import Prompt, Signal

PROMPTS = 8


def check_parity(
    config: Config, prompts: Sequence[Prompt], policy: Sampler, reference: LocalScorer, teacher: Teacher | None
) -> dict[str, float]:
    """Score fresh samples of the untrained student twice and compare.

    Student as teacher: the frozen start must score the student's samples as its sampler did (an off-by-one, another
    chat template or temperature shows here). Served against local: a served teacher must score them as the same
    model does in this process.

    Args:
        prompts: of this rank; the first few are used.
        policy: holds the student's start weights.
        reference: the student's start, opened.
        teacher: the run's teacher, opened.

    Returns: the mean gap a token in nats, of the worst rank. Raises: RunStopped above `rollout.max_mismatch`.
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
                f"teacher.check_parity: {name} differ by {gap:.3g} nats a token on average, more than "
                f"rollout.max_mismatch = {config.rollout.max_mismatch}; check the model folders, dtypes and "
                "temperatures of both sides"
            )
    return worst


def sampler_gap(
    config: Config, prompts: Sequence[Prompt], policy: Sampler, same: LocalScorer
) -> tuple[list[Question], float]:
    """A fresh sample of each of the first few prompts, and the mean gap a token, in nats, between its log-probs by the
    sampler and by the `same` model in this process, which is open."""
    sampling = Sampling(
        temperature=config.rollout.temperature, max_tokens=config.rollout.max_tokens, seed=config.run.seed
    )
    rollouts = [group[0] for group in policy.sample(prompts[:PROMPTS], n=1, iteration=0, sampling=sampling)]
    questions = [Question(rollout.prompt.token_ids, rollout.token_ids) for rollout in rollouts]
    scores = [s.logprobs for s in same.score(questions, Signal())]
    return questions, _gap(scores, [[p or 0.0 for p in r.logprobs] for r in rollouts])


def _gap(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """Mean |a − b| over all tokens, as `mismatch/mean` is one."""
    gaps = [abs(x - y) for row_a, row_b in zip(a, b, strict=True) for x, y in zip(row_a, row_b, strict=True)]
    return math.fsum(gaps) / len(gaps)
