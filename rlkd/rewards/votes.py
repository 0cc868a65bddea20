"""The answer in a completion, for majority votes: what the reward compares, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlkd.rewards.exact_match import judged
from rlkd.rewards.math_answer import last_box

if TYPE_CHECKING:  # as in `registry`
    from rlkd.config.schema import RewardFunction


def vote(functions: Sequence[RewardFunction], completion: str) -> str | None:
    r"""The answer that `completion` gives, without white space; None: it gives none.

    With `math`, the content of its last \boxed{…}; with `exact_match`, the text that is compared. Votes count as the
    same if their texts are, so 1/2 and 0.5 are two. A reward of one's own tells no answer, so there are no votes.
    """
    for function in functions:
        if function.name == "math":
            text = last_box(completion) or ""
        elif function.name == "exact_match":
            text = judged(completion, function.options.get("after"))
        else:
            continue
        return "".join(text.split()) or None
    return None
