"""Teacher feedback on rollouts: builds the request, parses the answer and appends it to the completion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlkd.algorithms.feedback_options import FeedbackConfig
from rlkd.data.chat import completion_text, encode_after, filled, read_prompt, refusing
from rlkd.data.control import spelled
from rlkd.types import Author, Completion, Prompt, Rollout, Segment

Failure = Literal["format", "budget"]
"""Why a teacher's answer is not appended: it has the wrong format, or is too long."""

_CONTEXT_CHARS = 64
"""Characters of the response used as context when tokenizing what follows; using all of a long one is slow."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """The parts of a teacher's answer that are appended."""

    reason: str
    phrase: str


def question_text(prompt: Prompt) -> str:
    """The student's question: the contents of all messages except system messages."""
    return "\n\n".join(m["content"] for m in prompt.messages if m["role"] != "system" and m["content"])


def _user_message(options: FeedbackConfig, question: str, response: str) -> str:
    return filled(options.user, {"question": question, "response": response})


def chat(options: FeedbackConfig, question: str, response: str) -> list[dict[str, str]]:
    """The chat messages of a feedback request; the teacher writes the next turn."""
    messages = [] if options.system is None else [{"role": "system", "content": options.system}]
    for example in options.behaviours:
        messages.append({"role": "user", "content": _user_message(options, example.question, example.response)})
        messages.append({"role": "assistant", "content": example.feedback})
    return [*messages, {"role": "user", "content": _user_message(options, question, response)}]


def parse(pattern: str, text: str) -> Feedback | None:
    """Reason and phrase, stripped; None if `text` does not match `pattern` or either is empty."""
    found = re.fullmatch(pattern, text, flags=re.DOTALL)
    if found is None:
        return None
    parts = {name: (found[name] or "").strip() for name in ("reason", "phrase")}
    return Feedback(**parts) if all(parts.values()) else None


def question_ids(options: FeedbackConfig, tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> tuple[int, ...]:
    """Token ids of the feedback request for `rollout`."""
    response = completion_text(tokenizer, rollout.token_ids, rollout.finish_reason)
    messages = chat(options, question_text(rollout.prompt), response)
    with refusing(rollout.prompt):
        if options.chat_template:
            variables = {name: value for name, value in rollout.prompt.variables.items() if name != "tools"}
            return read_prompt(tokenizer, messages, variables=variables).token_ids
        return read_prompt(tokenizer, messages[0]["content"], chat_template=False).token_ids


def answered(
    options: FeedbackConfig, tokenizer: PreTrainedTokenizerBase, rollout: Rollout, answer: Completion, budget: int
) -> Rollout | Failure:
    """`rollout` with the teacher's `answer` appended (at most `budget` completion tokens), or why it is rejected."""
    found = parse(options.pattern, completion_text(tokenizer, answer.token_ids, answer.finish_reason))
    if answer.finish_reason != "stop" or found is None:
        return "format"
    if spelled(tokenizer, [found.reason, found.phrase])[0]:  # text that spells a special token, e.g. end of sequence
        return "format"
    response = completion_text(tokenizer, rollout.token_ids, rollout.finish_reason)
    texts: list[tuple[Author, str]] = [
        ("glue", options.glue),
        ("teacher", found.reason),
        ("glue", options.glue),
        ("teacher", found.phrase),
    ]
    ids = encode_after(tokenizer, response[-_CONTEXT_CHARS:], [text for _, text in texts])
    if len(rollout.token_ids) + sum(map(len, ids)) > budget:
        return "budget"
    return append(rollout, [(author, part) for (author, _), part in zip(texts, ids, strict=True)])


def append(rollout: Rollout, parts: Sequence[tuple[Author, Sequence[int]]]) -> Rollout:
    """Append `parts` to `rollout`, before its end-of-sequence token.

    The student's other token ids do not change. The moved end of sequence is attributed to the author of the last
    part, because the student sampled it in a different place. Appended tokens have no sampler log-prob.
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
