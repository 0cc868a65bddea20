"""Advantages from the rewards of one group, and the mask of tokens on which a teacher is imitated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlkd.types import Rollout


def group_relative(rewards: Sequence[float | None], normalise: bool) -> list[float]:
    """A_i = (r_i − mean) / (std + 1e-4), or r_i − mean without `normalise`.

    GRPO, arXiv 2402.03300, §4.1; mean-only as in Dr. GRPO, arXiv 2503.20783. The standard deviation has n − 1 in its
    denominator. A reward of None is excluded from mean and standard deviation and gets advantage 0. Equal rewards get
    exactly 0, regardless of rounding.
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

    RLOO, arXiv 2402.14740: unbiased, whereas a mean that includes r_i shrinks the gradient by 1 − 1/n. This holds for
    a sum over tokens with a constant factor (`reduction: dr_grpo`); a mean divides by lengths, which are random too. A
    reward of None is excluded and gets advantage 0.
    """
    known = sum(r is not None for r in rewards)
    return [a * known / max(known - 1, 1) for a in group_relative(rewards, normalise=False)]


def overlong_penalty(length: int, max_tokens: int, cache: int) -> float:
    """0 up to max_tokens − cache tokens, then falling linearly to −1 at max_tokens; always 0 if cache is 0.

    DAPO's soft overlong punishment, arXiv 2503.14476, Eq. 13; it is added to the reward.
    """
    over = length - (max_tokens - cache)
    return 0.0 if cache == 0 or over <= 0 else -min(over / cache, 1.0)


def distilled(rollout: Rollout, keep: bool, mask_eos: bool) -> tuple[bool, ...]:
    """Per token, whether the teacher is imitated there: all tokens if `keep`, else none.

    `mask_eos` excludes the end of sequence: student and teacher may end a turn with different tokens, and then each
    gives the other's a very low probability.
    """
    tokens = [keep] * len(rollout.token_ids)
    if mask_eos and rollout.finish_reason == "stop":
        tokens[-1] = False
    return tuple(tokens)
