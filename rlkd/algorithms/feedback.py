"""What a teacher is asked about a finished rollout, how its answer is read, and how the two become one completion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlkd.algorithms.feedback_options import FeedbackConfig
from rlkd.data.chat import completion_text, encode_after, filled, read_prompt
from rlkd.data.control import spelled
from rlkd.types import Author, Completion, Prompt, Rollout, Segment

Failure = Literal["format", "budget"]
"""Why a teacher's answer is not appended: another form than wanted, or too long."""

_NEIGHBOURHOOD = 64
"""Characters of a response that decide how what follows is encoded; all of a long one would cost time."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """The parts of a teacher's answer that are appended."""

    reason: str
    phrase: str


def question_text(prompt: Prompt) -> str:
    """What the student was asked: its messages without a system message."""
    return "\n\n".join(m["content"] for m in prompt.messages if m["role"] != "system" and m["content"])


def _asked(options: FeedbackConfig, question: str, response: str) -> str:
    return filled(options.user, {"question": question, "response": response})


def chat(options: FeedbackConfig, question: str, response: str) -> list[dict[str, str]]:
    """The conversation that the teacher goes on with."""
    messages = [] if options.system is None else [{"role": "system", "content": options.system}]
    for example in options.behaviours:
        messages.append({"role": "user", "content": _asked(options, example.question, example.response)})
        messages.append({"role": "assistant", "content": example.feedback})
    return [*messages, {"role": "user", "content": _asked(options, question, response)}]


def parse(pattern: str, text: str) -> Feedback | None:
    """Reason and phrase, white space around them dropped; None where `text` has another form or one is empty."""
    found = re.fullmatch(pattern, text, flags=re.DOTALL)
    if found is None:
        return None
    parts = {name: (found[name] or "").strip() for name in ("reason", "phrase")}
    return Feedback(**parts) if all(parts.values()) else None


def question_ids(options: FeedbackConfig, tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> tuple[int, ...]:
    """What the teacher reads of `rollout`."""
    response = completion_text(tokenizer, rollout.token_ids, rollout.finish_reason)
    messages = chat(options, question_text(rollout.prompt), response)
    if options.chat_template:
        variables = {name: value for name, value in rollout.prompt.variables.items() if name != "tools"}
        return read_prompt(tokenizer, messages, variables=variables).token_ids
    return read_prompt(tokenizer, messages[0]["content"], chat_template=False).token_ids


def answered(
    options: FeedbackConfig, tokenizer: PreTrainedTokenizerBase, rollout: Rollout, answer: Completion, budget: int
) -> Rollout | Failure:
    """`rollout` with the teacher's `answer`, of at most `budget` tokens; or why there is none."""
    found = parse(options.pattern, completion_text(tokenizer, answer.token_ids, answer.finish_reason))
    if answer.finish_reason != "stop" or found is None:
        return "format"
    if spelled(tokenizer, [found.reason, found.phrase])[0]:  # a text that spells an end of sequence ends nothing
        return "format"
    said = completion_text(tokenizer, rollout.token_ids, rollout.finish_reason)
    texts: list[tuple[Author, str]] = [
        ("glue", options.glue),
        ("teacher", found.reason),
        ("glue", options.glue),
        ("teacher", found.phrase),
    ]
    ids = encode_after(tokenizer, said[-_NEIGHBOURHOOD:], [text for _, text in texts])
    if len(rollout.token_ids) + sum(map(len, ids)) > budget:
        return "budget"
    return append(rollout, [(author, part) for (author, _), part in zip(texts, ids, strict=True)])


def append(rollout: Rollout, parts: Sequence[tuple[Author, Sequence[int]]]) -> Rollout:
    """`rollout`, `parts`, end of sequence.

    The student's token ids stay as they were drawn. Its end of sequence moves to the end, where it is its new
    neighbour's: the student drew it elsewhere. Tokens of others have no sampler log-prob.
    """
    assert rollout.finish_reason == "stop" and parts and not rollout.segments
    kept = len(rollout.token_ids) - 1
    ids, segments = list(rollout.token_ids[:kept]), [Segment(start=0, end=kept, author="student")]
    for author, part in [*parts, (parts[-1][0], rollout.token_ids[kept:])]:
        segments.append(Segment(start=len(ids), end=len(ids) + len(part), author=author))
        ids += part
    return replace(
        rollout,
        token_ids=tuple(ids),
        logprobs=rollout.logprobs[:kept] + (None,) * (len(ids) - kept),
        weight_versions=tuple(replace(s, end=min(s.end, kept)) for s in rollout.weight_versions if s.start < kept),
        segments=tuple(segments),
        top_ids=None,
    )
