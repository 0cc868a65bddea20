"""Who gets credit: rewards of one group in, advantages out; and on which tokens a teacher is imitated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlkd.types import Rollout


def group_relative(rewards: Sequence[float | None], normalise: bool) -> list[float]:
    """A_i = (r_i − mean) / (std + 1e-4), or r_i − mean without `normalise`.

    GRPO, arXiv 2402.03300, §4.1; mean-only as in Dr. GRPO, arXiv 2503.20783. The standard deviation has n − 1 in its
    denominator. A reward of None takes no part in mean and deviation and gets advantage 0. Equal rewards get exactly
    0, however their sum rounds.
    """
    known = [r for r in rewards if r is not None]
    if len(known) < 2 or min(known) == max(known):
        return [0.0] * len(rewards)
    mean = math.fsum(known) / len(known)
    scale = 1.0
    if normalise:
        scale = math.sqrt(math.fsum((r - mean) ** 2 for r in known) / (len(known) - 1)) + 1e-4
    return [0.0 if r is None else (r - mean) / scale for r in rewards]


def leave_one_out(rewards: Sequence[float | None]) -> list[float]:
    """A_i = r_i − mean of the others = n/(n − 1) · (r_i − mean): a baseline that does not depend on r_i.

    RLOO, arXiv 2402.14740: unbiased, where a mean that has r_i in it shrinks the gradient by 1 − 1/n. That holds for
    a sum over tokens with a constant factor (`reduction: dr_grpo`); a mean divides by lengths, which are random too. A
    reward of None takes no part and gets advantage 0.
    """
    known = sum(r is not None for r in rewards)
    return [a * known / max(known - 1, 1) for a in group_relative(rewards, normalise=False)]


def overlong_penalty(length: int, max_tokens: int, cache: int) -> float:
    """0 up to max_tokens − cache tokens, then in a straight line down to −1 at max_tokens; cache 0: always 0.

    DAPO's soft overlong punishment, arXiv 2503.14476, Eq. 13, which is added to the reward.
    """
    over = length - (max_tokens - cache)
    return 0.0 if cache == 0 or over <= 0 else -min(over / cache, 1.0)


def distilled(rollout: Rollout, keep: bool, mask_eos: bool) -> tuple[bool, ...]:
    """Per token, whether the teacher is imitated there: on all or none; `mask_eos`: not on an end of sequence.

    Student and teacher may end a turn with different tokens; then each finds the other's end very unlikely.
    """
    tokens = [keep] * len(rollout.token_ids)
    if mask_eos and rollout.finish_reason == "stop":
        tokens[-1] = False
    return tuple(tokens)
