"""The section `feedback` of ThinkTuning: the teacher's instructions and few-shot examples."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from rlkd.config.schema import Section

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
    """One few-shot example of feedback, demonstrating a cognitive behaviour."""

    question: str = Field(description="a question")
    response: str = Field(description="a student's response")
    feedback: str = Field(description="the teacher's feedback on it, in the format that `pattern` matches")


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
    """How the teacher is prompted for feedback and how its answer is parsed."""

    system: str | None = Field(SYSTEM, description="the teacher's system message; null: none")
    user: str = Field(
        USER, description="the user message; {question} and {response} are filled in, other braces are kept"
    )
    behaviours: list[Behaviour] = Field(
        BEHAVIOURS, description="few-shot examples, placed before the question as chat turns; []: none"
    )
    chat_template: bool = Field(True, description="apply the student's chat template; false: plain text")
    pattern: str = Field(
        PATTERN,
        description="regular expression that must match the full answer; its groups `reason` and `phrase` are used",
    )
    glue: str = Field("\n\n", description="separator between response, reason and phrase")
    max_tokens: int = Field(1024, ge=1, description="longest answer of the teacher, in tokens")
    max_prompt_tokens: int = Field(
        3072, ge=1, description="longest prompt to the teacher, examples included, in tokens"
    )
    temperature: float = Field(0.0, ge=0, description="the teacher's sampling temperature; 0: greedy")

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str) -> str:
        try:
            groups = re.compile(value).groupindex
        except re.error as error:
            raise ValueError(f"expected a regular expression ({error})") from error
        missing = [name for name in ("reason", "phrase") if name not in groups]
        if missing:
            raise ValueError(
                f"expected a group named {missing[0]}; put (?P<{missing[0]}>…) around that part of the answer"
            )
        return value

    @field_validator("user")
    @classmethod
    def _check_user(cls, value: str) -> str:
        if "{response}" not in value:
            raise ValueError("expected a text with {response}; the teacher must see the response to judge it")
        return value
