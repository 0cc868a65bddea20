"""What a teacher is asked about a finished rollout, how its answer is read, and how the two become one completion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field, field_validator
from transformers import PreTrainedTokenizerBase

from rlkd.config.schema import Section
from rlkd.data.chat import completion_text, encode_after, filled, read_prompt, refusing
from rlkd.data.control import spelled
from rlkd.types import Author, Completion, Prompt, Rollout, Segment

Failure = Literal["format", "budget"]
"""Why a teacher's answer is not appended: another form than wanted, or too long."""

_NEIGHBOURHOOD = 64
"""Characters of a response that decide how what follows is encoded; all of a long one would cost time."""

SYSTEM = r"""You are a teacher who shows a student how to reflect. You get a question and the student's response. Go on
as if you were the student, who now looks back at the response, and keep to this form:
<opinion>correct</opinion> or <opinion>incorrect</opinion>
<reason>what you think of the response, in the first person</reason>
<phrase>how the response goes on from there; it ends with the final answer in \boxed{}</phrase>"""

USER = r"""Question:
{question}

Response:
{response}"""

PATTERN = (
    r"\s*<opinion>\s*(?P<opinion>correct|incorrect)\s*</opinion>"
    r"\s*<reason>(?P<reason>(?:(?!</?(?:opinion|reason|phrase)>).)+)</reason>"
    r"\s*<phrase>(?P<phrase>(?:(?!</?(?:opinion|reason|phrase)>).)+)</phrase>\s*"
)


class Behaviour(Section):
    """One example of feedback: a cognitive behaviour that the teacher is to show."""

    question: str = Field(description="a question")
    response: str = Field(description="what a student answers")
    feedback: str = Field(description="what the teacher writes about it, in the form that the pattern reads")


def _feedback(opinion: str, reason: str, phrase: str) -> str:
    return f"<opinion>{opinion}</opinion>\n<reason>{reason}</reason>\n<phrase>{phrase}</phrase>"


BEHAVIOURS = [
    Behaviour(  # self-agreement
        question="A shelf holds 4 rows of 9 jars. How many jars are there?",
        response=r"There are 4 rows with 9 jars each, so 4 * 9 = 36 jars. The answer is \boxed{36}.",
        feedback=_feedback(
            "correct",
            "I counted rows times jars, which is what the question asks for. Adding 9 + 9 + 9 + 9 gives 36 too, so I "
            "stand by it.",
            r"Both ways give the same number, so I keep my answer: \boxed{36}.",
        ),
    ),
    Behaviour(  # self-conflict
        question="A coat costs 80 euros. In the sale it is 25 % cheaper. What does it cost now?",
        response=r"25 % of 80 is 20. So it costs \boxed{20} euros.",
        feedback=_feedback(
            "incorrect",
            "Hold on, that does not fit: 20 euros is what the price falls by, not the price. I stopped one step early.",
            r"The coat costs 80 - 20 = 60 euros, so the answer is \boxed{60}.",
        ),
    ),
    Behaviour(  # self-consultation
        question="The sum of two consecutive whole numbers is 47. What is the larger one?",
        response=r"Half of 47 is 23.5, so the larger number must be \boxed{25}.",
        feedback=_feedback(
            "incorrect",
            "What would another method tell me? With an equation, n + (n + 1) = 47, so n = 23. That disagrees with "
            "what I wrote.",
            r"From n = 23 the numbers are 23 and 24, and 23 + 24 = 47. The larger one is \boxed{24}.",
        ),
    ),
    Behaviour(  # self-critique
        question="A train leaves at 9:40 and arrives at 11:15. How many minutes does it travel?",
        response=r"From 9 to 11 are 2 hours, and 40 - 15 = 25, so 120 + 25 = \boxed{145} minutes.",
        feedback=_feedback(
            "incorrect",
            "My weak point is the minutes: I took hours and minutes apart, and added where the clock goes back. I "
            "should walk along the clock in steps.",
            r"From 9:40 to 10:00 are 20 minutes, to 11:00 are 60 more, to 11:15 are 15 more: \boxed{95} minutes.",
        ),
    ),
]


class FeedbackConfig(Section):
    """How a teacher is asked for feedback, and how its answer is read."""

    system: str | None = Field(SYSTEM, description="the teacher's system message; null: none")
    user: str = Field(USER, description="what it is asked; {question} and {response} are filled in, other braces stay")
    behaviours: list[Behaviour] = Field(
        BEHAVIOURS, description="examples, put before the question as turns of the chat; []: none"
    )
    chat_template: bool = Field(True, description="ask in the student's chat template; false: as plain text")
    pattern: str = Field(
        PATTERN,
        description="regular expression that the whole answer must match; its groups `reason` and `phrase` are used",
    )
    glue: str = Field("\n\n", description="text between response, reason and phrase")
    max_tokens: int = Field(1024, ge=1, description="longest answer of the teacher, in tokens")
    max_prompt_tokens: int = Field(3072, ge=1, description="longest question to the teacher, examples included")
    temperature: float = Field(0.0, ge=0, description="at which the teacher writes; 0: greedily")

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str) -> str:
        try:
            groups = re.compile(value).groupindex
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        missing = [name for name in ("reason", "phrase") if name not in groups]
        if missing:
            raise ValueError(f"has no group {missing[0]}; write (?P<{missing[0]}>…) around that part of the answer")
        return value

    @field_validator("user")
    @classmethod
    def _check_user(cls, value: str) -> str:
        if "{response}" not in value:
            raise ValueError("has no {response}; the teacher must see what it is to judge")
        return value


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
    with refusing(rollout.prompt):
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
