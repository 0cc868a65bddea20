"""The reward functions' values, and how the registry finds them."""

import re
import signal
import subprocess
import sys
import textwrap
import time
from math import factorial

import pytest
from lines import assert_lines, one_line

from rlkd.config.schema import RewardFunction
from rlkd.rewards import registry
from rlkd.rewards.answers import check_answers
from rlkd.rewards.exact_match import exact_match
from rlkd.rewards.format_match import format
from rlkd.rewards.math_answer import last_box, math
from rlkd.rewards.math_bounds import OutOfTime, processor_time
from rlkd.rewards.votes import vote

NOTHING = {"prompt": "", "meta": {}}


def box(content: str) -> str:
    return r"So \boxed{" + content + "}."


@pytest.mark.parametrize(("completion", "value"), [("cba", 1.0), (" cba\n", 1.0), ("cb", 0.0), ("CBA", 0.0), ("", 0.0)])
def test_exact_match(completion, value):
    assert exact_match(completion, answer="cba ", **NOTHING) == value


@pytest.mark.parametrize(
    ("completion", "value"),
    [("cba", 1.0), ("cbb wait so: cba ", 1.0), ("so: cbb so: cba", 1.0), ("cba so: cbb", 0.0), ("cba so: ", 0.0)],
)
def test_exact_match_of_what_follows_the_last_mark(completion, value):
    assert exact_match(completion, answer="cba", after="so: ", **NOTHING) == value


@pytest.mark.parametrize(
    ("functions", "completion", "answer"),
    [
        ([("exact_match", {})], " c ba\n", "cba"),
        ([("exact_match", {"after": "so: "})], "no, so: cba", "cba"),
        ([("exact_match", {})], " \n", None),
        ([("format", {"pattern": ".*"}), ("math", {})], r"\boxed{7} or \boxed{\frac{1}{ 2}}", r"\frac{1}{2}"),
        ([("math", {})], r"\boxed{7} or \boxed{8", None),
        ([("mine:own", {})], "7", None),
    ],
)
def test_a_completion_votes_for_what_its_reward_compares(functions, completion, answer):
    assert vote([RewardFunction(name=name, options=options) for name, options in functions], completion) == answer


def test_exact_match_refuses_an_empty_mark():
    (line,) = registry.check([RewardFunction(name="exact_match", options={"after": ""})])
    assert "option after is empty; give the text" in line
    assert registry.check([RewardFunction(name="exact_match", options={"after": None})]) == []


@pytest.mark.parametrize("function", [exact_match, math])
def test_no_answer_is_an_error_and_no_zero(function):
    with pytest.raises(ValueError, match="data.answer_column"):
        function(box("1"), answer=None, **NOTHING)


def test_format_matches_the_whole_text_over_line_ends():
    options = {"pattern": "<think>.*</think>.*", "answer": None, **NOTHING}
    assert format("<think>a\nb</think>c\n", **options) == 1.0
    assert format("x<think>a</think>", **options) == 0.0
    assert format("", **options) == 0.0


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} done {}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed {3}", "3"),
        (r"\boxed{a + \boxed{b}}", r"a + \boxed{b}"),
        (r"\boxed{1} but \boxed{2", None),
        (r"\boxed{ no \boxed{2}", "2"),
        (r"\boxed{}", ""),
        ("no box", None),
    ],
)
def test_last_box(text, content):
    assert last_box(text) == content


@pytest.mark.parametrize(
    ("answer", "completion", "value"),
    [
        ("2", r"first \boxed{1}, no: \boxed{2}", 1.0),
        ("1", r"first \boxed{1}, no: \boxed{2}", 0.0),
        ("1", r"\boxed{1} and cut off \boxed{2", 0.0),
        (r"\frac{1}{2}", box("0.5"), 1.0),
        ("1/2", box(r"\dfrac{2}{4}"), 1.0),
        ("12", box("12."), 1.0),
        ("12", box("$12$"), 1.0),
        ("12", box("\n12\n"), 1.0),
        ("1234", box("1,234"), 1.0),
        (r"\{1, 2\}", box(r"\{2, 1\}"), 1.0),
        (r"\{1, 2\}", box("1"), 0.0),
        ("(1, 2)", box("(2, 1)"), 0.0),
        ("[0, 1)", box("[0,1)"), 1.0),
        ("[0, 1)", box("[0,1]"), 0.0),
        ("x^2 + 1", box("1 + x^2"), 1.0),
        (r"3\sqrt{2}", box(r"\sqrt{18}"), 1.0),
        (r"$\boxed{7}$", box("7"), 1.0),
        ("5", box("x = 5"), 1.0),
        ("7", "the answer is 7", 0.0),
        ("7", box(""), 0.0),
        ("7", box("???"), 0.0),
        ("7", "", 0.0),
    ],
)
def test_math(answer, completion, value):
    assert math(completion, answer=answer, **NOTHING) == value


def test_math_without_a_box_only_where_it_is_allowed():
    assert math("the answer is 7", answer="7", require_box=False, **NOTHING) == 1.0
    assert math("the answer is 8", answer="7", require_box=False, **NOTHING) == 0.0
    assert math(r"the answer is 7, no: \boxed{8}", answer="7", require_box=False, **NOTHING) == 0.0
    assert math(r"the answer is 7, no: \boxed{7", answer="7", require_box=False, **NOTHING) == 0.0


def test_math_names_an_answer_that_it_cannot_read():
    with pytest.raises(ValueError, match=one_line("'  '", "math-verify")):
        math(box("1"), answer="  ", **NOTHING)


def test_an_answer_that_math_verify_fails_on_is_an_error_and_such_a_completion_is_wrong():
    with pytest.raises(ValueError, match=one_line("'1/0'", "ValueError: Can't evaluate nan")):
        math(box("7"), answer="1/0", **NOTHING)
    assert math(box("1/0"), answer="7", **NOTHING) == 0.0
    from math_verify import parse, verify

    gold, found = parse("$1<x<2$", parsing_timeout=None), parse("$1<x<2<3$", parsing_timeout=None)
    with pytest.raises(ValueError, match="zip"):  # so it does raise
        verify(gold, found, timeout_seconds=None, raise_on_error=True)
    assert math(box("1<x<2<3"), answer="1<x<2", **NOTHING) == 0.0


FACTORIAL_100 = str(factorial(100))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("10^{20}", str(10**20)),
        ("2^{100}", str(2**100)),
        ("100!", FACTORIAL_100),
        ("2^{2023}", r"2 \cdot 2^{2022}"),
        ("3^{2023} - 1", "-1 + 3^{2023}"),
        (r"\binom{100}{50}", "100891344545564193334812497256"),
        (r"\frac{10!}{5! 5!}", "252"),
        ("e^{-50}", r"\frac{1}{e^{50}}"),
        (r"2 \times 10^{-20}", r"0.2 \times 10^{-19}"),
        ("0.0000001", "0.00000010"),
        (r"\frac{1}{3}", "0.333333"),
        (r"\frac{1}{30}", "0.033333"),
        ("0", r"\sin(\pi)"),
        ("0", r"(\sqrt{2} + 1)(\sqrt{2} - 1) - 1"),
        (r"9.5\%", "0.095"),
        (r"9\%", "9"),
        ("0.0000001", "x = 0.0000001"),
        (r"\{2^{100}, 1\}", r"\{1, 2^{100}\}"),
        (r"[0, 10^{20}]", "[0, 100000000000000000000]"),
        (r"1 \frac{1}{2}", "1.5"),
        (r"1 + \frac{1}{1 + \frac{1}{1 + \frac{1}{2}}}", r"\frac{8}{5}"),
        (r"\sqrt{2 + \sqrt{3}}", r"\frac{\sqrt{6} + \sqrt{2}}{2}"),
    ],
)
def test_math_equal_whoever_is_the_answer(one, other):
    assert math(box(other), answer=one, **NOTHING) == 1.0
    assert math(box(one), answer=other, **NOTHING) == 1.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("0.0000001", "0.0000002"),
        ("0", "0.0000001"),
        ("10^{-20}", r"2 \times 10^{-20}"),
        (r"1.602 \times 10^{-19}", r"6.626 \times 10^{-34}"),
        ("e^{-50}", "e^{-51}"),
        (r"\{0.0000001, 1\}", r"\{1, 0.0000002\}"),
        ("(0.0000001, 1)", "(0.0000002, 1)"),
        ("[0.0000001, 1)", "[0.0000002, 1)"),
        ("x = 0.0000001", "0.0000002"),
        ("1234567890.1", "1234567890.2"),
        (r"\begin{pmatrix} 0.0000001 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 0.0000002 \\ 1 \end{pmatrix}"),
    ],
)
def test_math_tells_small_numbers_apart(one, other):
    assert math(box(other), answer=one, **NOTHING) == 0.0
    assert math(box(one), answer=other, **NOTHING) == 0.0


TOWERS = [
    "9^9^9^9",
    "9^{9^{9^9}}",
    r"10^{10^{10}}",
    r"10^{-10^{10}}",
    r"\frac{10^{10^{10}}}{10^{10^{10}}}",
    "1000000000!",
    "10!!!",
    r"\binom{10^9}{5 \cdot 10^8}",
    r"\Gamma(100000000)",
    "e^{e^{e^{e^{e}}}}",
    r"\sqrt[9999999]{2^{99999999}}",
    r"\sqrt{7^{3001} + 1}",
    "(x + 1)^{100000}",
    "(x + y + z)^{40}",
    r"5 \mod 10^{10^{10}}",
    r"\sin(10^{10^{10}})",
    r"\lfloor 10^{10^{10}} \rfloor",
    r"\sum_{i=1}^{1000000000} i^i",
    r"\prod_{i=1}^{1000000} i",
    r"[0, 10^{10^{10}}]",
    r"\{10^{10^{10}}, 1\}",
    r"\operatorname{eye}(100000)",
    "9" * 100_000,
    r"\frac{1}{1 + " * 30 + "2" + "}" * 30,
    "(" * 30 + "1" + ")" * 30,
    "1 + " * 2000 + "1",
]


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower[:24])
def test_math_answers_fast_whatever_the_size(tower):
    math(box("1 + 1"), answer="2", **NOTHING)  # imports
    start = time.process_time()
    assert math(box(tower), answer="7", **NOTHING) == 0.0
    assert math(box(tower), answer=tower, **NOTHING) == 1.0, "the same text needs no arithmetic"
    assert math(box("7"), answer=tower, **NOTHING) == 0.0
    assert time.process_time() - start < 2.5, "below the limit of processor time: the size limit has stopped it"


def test_processor_time_ends_a_comparison_that_no_size_limit_stops():
    """Even if other code catches the exception once; afterwards the previous timer and handler are restored."""
    before = signal.getsignal(signal.SIGVTALRM)
    start, caught = time.process_time(), 0
    with pytest.raises(OutOfTime), processor_time(0.2):
        while True:
            try:
                while True:
                    pass
            except OutOfTime:
                caught += 1
                if caught > 1:
                    raise
    assert 0.2 < time.process_time() - start < 1.0
    assert signal.getsignal(signal.SIGVTALRM) is before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


# ---------------------------------------------------------------- registry


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A working directory with the user's module `my_rewards_x`, which is not on sys.path."""
    (tmp_path / "my_rewards_x.py").write_text(
        textwrap.dedent(
            """
            def length(completion, *, answer, prompt, meta, scale, offset=0.0):
                return len(completion) * scale + offset

            def anything(completion, **given):
                return 1.0

            def narrow(completion, answer):
                return 1.0

            def trl(prompts, completions, solution, **kwargs):
                return [1.0 for _ in completions]

            def trl_completions(completions, **kwargs):
                return [1.0 for _ in completions]

            def verl(data_source, solution_str, ground_truth, extra_info=None):
                return 1.0

            def batched(completion, *, answer, prompt, meta) -> list[float]:
                return [1.0]

            def by_column(completion, *, answer, prompt, meta, difficulty):
                return 1.0

            def chat(completion, *, answer, prompt, messages, meta):
                return 1.0

            def words(completion, *, answer, prompt, meta) -> tuple[float, str]:
                return 1.0, "well"

            async def waiting(completion, *, answer, prompt, meta):
                return 1.0

            NUMBER = 3
            """
        )
    )
    (tmp_path / "my_broken_x.py").write_text("import nosuchmodule\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_rewards_x", None)


def check(name: str, **options: object) -> list[str]:
    return registry.check([RewardFunction(name=name, options=options)])


def test_good_functions_have_no_problems(mine):
    assert check("exact_match") == check("math", require_box=False) == check("format", pattern="a.*") == []
    assert [check(f"my_rewards_x:{name}") for name in ("chat", "words", "waiting")] == [[]] * 3
    assert check("my_rewards_x:length", scale=2.0) == check("my_rewards_x:anything", whatever=1) == []


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("exact_mach", {}, ("'exact_mach'", "did you mean exact_match?", "exact_match, math")),
        ("module.function", {}, ("'module.function'", "module:function")),
        ("my_rewards_x:", {}, ("'my_rewards_x:'", "module:function")),
        ("my_rewards_y:length", {}, ("my_rewards_y", "ModuleNotFoundError")),
        ("my_broken_x:f", {}, ("my_broken_x", "nosuchmodule")),
        ("my_rewards_x:lenght", {}, ("lenght", "did you mean length?")),
        ("my_rewards_x:NUMBER", {}, ("no function NUMBER",)),
        ("my_rewards_x:length", {"scal": 1}, ("'scal'", "did you mean scale?")),
        ("my_rewards_x:length", {}, ("missing a required argument: 'scale'",)),
        ("my_rewards_x:narrow", {}, ("cannot be called",)),
        ("my_rewards_x:length", {"scale": 1, "answer": "x"}, ("answer", "data")),
        ("format", {}, ("missing a required argument: 'pattern'",)),
        ("format", {"pattern": "(a"}, ("missing ), unterminated subpattern",)),
        ("format", {"pattern": 3}, ("TypeError",)),
        ("math", {"require_box": "yes"}, ("require_box", "'yes'", "true or false")),
        ("my_rewards_x:trl", {}, ("prompts", "batch", "TRL", "f(completion, *, answer")),
        ("my_rewards_x:trl_completions", {}, ("completions", "one completion", "meta")),
        ("my_rewards_x:verl", {}, ("solution_str", "verl", "f(completion, *, answer, prompt")),
        ("my_rewards_x:batched", {}, ("list", "batch", "f(")),
        ("my_rewards_x:by_column", {}, ("missing a required argument: 'difficulty'", "meta")),
        ("my_rewards_x:chat", {"messages": []}, ("messages", "data")),
        ("__main__:f", {}, ("module",)),
    ],
)
def test_each_wrong_name_or_option_is_one_line(mine, name, options, parts):
    (problem,) = check(name, **options)
    assert re.search(one_line(*parts), problem), problem


def test_all_problems_at_once():
    names = ["mth", "exact_match", "frmat"]
    assert len(registry.check([RewardFunction(name=name) for name in names])) == 2


@pytest.mark.process
def test_a_worker_imports_nothing_heavy():
    heavy = "torch lightning transformers numpy pydantic sympy math_verify multiprocessing rlkd.types rlkd.config"
    code = (
        "import sys; import rlkd.rewards.worker; from rlkd.rewards import registry; registry.resolve('exact_match');"
        f"registry.resolve('math'); print([m for m in '{heavy}'.split() if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---------------------------------------------------------------- answers before a run


def answers(name: str, *given: str | None) -> list[str]:
    return check_answers([RewardFunction(name=name)], [(f"q{i}", answer) for i, answer in enumerate(given)])


def test_answers_that_math_cannot_use_are_named_before_a_run():
    assert answers("math", "7", "1,234.5", r"\frac{1}{2}", r"\text{yes}", r"10^{10^{10}}") == []
    assert answers("exact_match", "1/0", "  ") == answers("format", None) == []
    (line,) = answers("math", "7", "1/0", " ", "1/0", "1/0", " ")
    assert_lines([line], ("reward 'math'", *(f"'q{i}' (answer '1/0'" for i in (1, 3, 4)), 2))
    assert "'q2'" not in line and line.count("Can't evaluate nan or zoo") == 3


def test_an_answer_that_is_too_long_to_be_read_is_named_before_a_run():
    """In any row, not only in those that are read in full."""
    fractions = [rf"\frac{{{i}}}{{7}}" for i in range(300)]
    solution = "so " * 1400
    (line,) = answers("math", *fractions[:150], solution, *fractions[150:])
    assert line == (
        f"reward 'math' cannot use the answers of the data: 'q150' (answer '{solution[:40]}' has 4200 characters, more "
        "than 4000, so it is never read); correct them or drop them"
    )
    assert answers("math", solution + r"\boxed{\frac{1}{2}}") == []  # the box is the answer
    assert answers("exact_match", solution) == []


def test_rows_without_an_answer_are_named_before_a_run():
    assert_lines(answers("math", "7", None), ("reward 'math'", "'q1'", "data.answer_column"))
    assert_lines(answers("exact_match", "7", None), ("reward 'exact_match'", "'q1'", "data.answer_column"))
    assert_lines(answers("math", *[None] * 9), ("reward 'math'", "'q0'; 'q1'; 'q2'", 6))


def test_a_hundred_thousand_answers_are_checked_quickly():
    start = time.process_time()
    assert answers("math", *map(str, range(100_000))) == []
    assert time.process_time() - start < 3
