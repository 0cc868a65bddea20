"""The pool with rewards that hang, crash, fork and return wrong values: real processes that are really killed."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

from rlkd.config.schema import RewardConfig, RewardFunction
from rlkd.distributed import RunStopped
from rlkd.rewards.pool import RewardItem, RewardPool, part_names

pytestmark = pytest.mark.process

MODULE = '''
import ctypes, os, subprocess, sys, time

def act(completion, *, answer, prompt, meta):
    """Do what the completion says."""
    do, _, word = completion.partition(" ")
    if do == "hang":
        time.sleep(60)
    if do == "fork":
        if os.fork() == 0:
            time.sleep(60)
        time.sleep(60)
    if do == "leave":  # a child that outlives the call
        subprocess.Popen(["sleep", "60"])
    if do == "stray":  # a forked child that returns as if it were the worker
        os.fork()
    if do == "orphan":  # dies, and a child holds the pipes open
        if os.fork():
            os._exit(5)
        time.sleep(60)
    if do == "exit":
        os._exit(3)
    if do == "sysexit":
        sys.exit(4)
    if do == "crash":
        ctypes.string_at(0)
    if do == "raise":
        raise KeyError("no such thing")
    if do == "print":
        print('[0, 0, 1.0, null]\\n' * 2000, flush=True)
        os.write(1, b"raw")
        return float(len(sys.stdin.read()))
    if do == "nap":
        time.sleep(float(word))
    if do == "return":
        import numpy
        from decimal import Decimal
        from fractions import Fraction
        return eval(word)
    return float(word or 1)

def double(completion, *, answer, prompt, meta):
    return 2.0

def large(completion, *, answer, prompt, meta):
    return 1e15

def turns(completion, *, answer, prompt, messages, meta):
    messages[0]["seen"] = True
    return sum(len(message["content"]) for message in messages) + 100 * len(messages)

def anything(completion, **given):
    return len(given["messages"]) + 10 * len(given)

calls = []

async def waiting(completion, *, answer, prompt, meta):
    """Keeps something that belongs to the event loop from call to call."""
    import asyncio
    if not calls:
        calls.append(asyncio.get_running_loop().create_future())
    asyncio.get_running_loop().call_later(0.001, lambda: calls[0].done() or calls[0].set_result(3.0))
    return await calls[0]

def context(completion, *, answer, prompt, meta, factor):
    meta["seen"] = True  # its own copy
    return factor * len(meta["tags"]) + len(prompt) + len(answer)
'''


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """A working directory with the module above, and a marker in the environment of every process started here."""
    (tmp_path / "pool_rewards_x.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    mark = f"RLKD_TEST_MARK={uuid.uuid4()}"
    monkeypatch.setenv(*mark.split("="))
    return mark


def running(mark: str, wanted: int | None = None) -> int:
    """Processes with `mark` in their environment, this one and zombies left out; waits a little for `wanted`."""
    for _ in range(100):
        count = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:
                continue
            count += mark.encode() in environment and folder.name != str(os.getpid())
        if wanted is None or count == wanted:
            break
        time.sleep(0.05)
    return count


def pool(*names: str, timeout_s: float = 1.0, workers: int = 1, **options) -> RewardPool:
    """A pool of built-in functions and of those in MODULE, given by their bare names."""
    full = [f"pool_rewards_x:{name}" if f"def {name}(" in MODULE else name for name in names]
    functions = [RewardFunction(name=name, options=options) for name in full]
    return RewardPool(RewardConfig(functions=functions, timeout_s=timeout_s, workers=workers))


def items(*completions: str) -> list[RewardItem]:
    return [RewardItem(completion=c, answer="a", prompt="p") for c in completions]


def test_order_parts_and_weights():
    functions = [
        RewardFunction(name="exact_match", weight=2.0),
        RewardFunction(name="format", options={"pattern": "a"}),
        RewardFunction(name="format", weight=-0.5, options={"pattern": ".*"}),
    ]
    with RewardPool(RewardConfig(functions=functions, workers=2)) as scorer:
        results = scorer.score(items(*("a" if i % 3 == 0 else f"b{i}" for i in range(500))))
        assert scorer.score([]) == []
    assert [r.reward for r in results] == [2.5 if i % 3 == 0 else -0.5 for i in range(500)]
    assert results[0].parts == {"exact_match": 1.0, "format": 1.0, "format#2": 1.0}
    assert part_names(functions) == list(results[0].parts)
    assert all(r.error is None for r in results)


def test_a_reward_gets_prompt_answer_meta_and_options():
    item = RewardItem(completion="", answer="aa", prompt="ppp", meta={"tags": ["x", "\ud800ü"]})
    with pool("context", factor=10) as scorer:
        assert [r.reward for r in scorer.score([item, item])] == [25.0, 25.0]


NUMBERS = {
    "numpy.bool_(True)": 1.0,
    "numpy.float32(0.5)": 0.5,
    "numpy.int64(3)": 3.0,
    "numpy.array(1.5)": 1.5,
    "Decimal('0.5')": 0.5,
    "Fraction(1, 4)": 0.25,
    "True": 1.0,
    "(1.0, None)": 1.0,
    "(numpy.bool_(True), 'well')": 1.0,
    "1e15": 1e15,
}


def test_any_kind_of_number_is_a_reward():
    with pool("act", timeout_s=10.0) as scorer:
        results = scorer.score(items(*(f"return {value}" for value in NUMBERS)))
    assert [(r.reward, r.error) for r in results] == [(reward, None) for reward in NUMBERS.values()]
    assert [r.feedback for r in results] == ["well" if "well" in value else None for value in NUMBERS]


def test_a_sum_that_is_too_large_is_no_reward():
    functions = [RewardFunction(name="pool_rewards_x:large", weight=w) for w in (1.0, 0.5)]
    with RewardPool(RewardConfig(functions=functions)) as scorer:
        (result,) = scorer.score(items("a"))
    assert result.reward is None
    assert result.error == "expected a weighted sum of the rewards from -1e+15 to 1e+15, got 1.5e+15"


def test_messages_are_given_to_functions_that_accept_them():
    chat = ({"role": "system", "content": "abc"}, {"role": "user", "content": "de"})
    item = RewardItem(completion="", answer="a", prompt="de", messages=chat, meta={"tags": []})
    with pool("turns", "anything") as scorer:
        results = scorer.score([item, item])
    assert [list(r.parts.values()) for r in results] == [[205.0, 2.0 + 10 * 4]] * 2


def test_a_coroutine_function_is_awaited_on_one_loop():
    with pool("waiting") as scorer:
        assert [r.reward for r in scorer.score(items("a", "b", "c"))] == [3.0] * 3


def test_meta_that_is_not_json_is_named():
    with pool("double") as scorer:
        with pytest.raises(
            RunStopped, match="^prompt 'p': expected columns and messages that are JSON, [^\n]*; write such"
        ):
            scorer.score([RewardItem(completion="", answer=None, prompt="p", meta={"x": object()})])
        assert scorer.score(items("a"))[0].reward == 2.0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_hanging_reward_is_killed_in_time_and_the_others_get_theirs(workers, mine):
    with pool("act", "double", workers=workers) as scorer:
        start = time.monotonic()
        results = scorer.score(items(*["return 1"] * 20, "hang", *["return 3"] * 20, "hang"))
        assert 1.0 < time.monotonic() - start < 6
        assert [r.reward for r in results] == [*[3.0] * 20, None, *[5.0] * 20, None]
        assert results[20].error == "reward pool_rewards_x:act: gave no answer within 1 s"
        assert results[20].parts == {"pool_rewards_x:act": None, "pool_rewards_x:double": 2.0}
        assert scorer.score(items("return 7"))[0].reward == 9.0
    assert running(mine, 0) == 0


def test_a_reward_that_holds_the_interpreter_is_killed(mine):
    """A regular expression that backtracks for hours holds the interpreter lock, so only another process can end it."""
    with pool("format", pattern="(a+)+b") as scorer:
        bad, good = scorer.score(items("a" * 60, "aab"))
    assert (bad.reward, bad.error) == (None, "reward format: gave no answer within 1 s")
    assert good.reward == 1.0
    assert running(mine, 0) == 0


def test_the_limit_is_per_item_not_per_batch():
    with pool("act") as scorer:
        results = scorer.score(items(*["nap 0.15"] * 12))
    assert [r.reward for r in results] == [0.15] * 12


@pytest.mark.parametrize(
    ("completion", "error"),
    [
        ("fork", "gave no answer within 1 s"),
        ("orphan", "its process exited with status 5"),
        ("exit", "its process exited with status 3"),
        ("crash", f"its process was killed by signal {signal.SIGSEGV.value}"),
    ],
)
def test_a_worker_that_dies_is_no_reward_with_its_cause(mine, completion, error):
    with pool("act") as scorer:
        before, failed, after = scorer.score(items("return 1", completion, "return True"))
    assert (failed.reward, failed.error) == (None, f"reward pool_rewards_x:act: {error}")
    assert (before.reward, after.reward) == (1.0, 1.0)
    assert running(mine, 0) == 0, "something outlived the pool"


NO_REWARDS = {
    "sysexit": "raised SystemExit: 4",
    "raise": "raised KeyError: 'no such thing'",
    "return float('nan')": "expected a finite number, got nan",
    "return -float('inf')": "expected a finite number, got -inf",
    "return None": "expected a finite number, or (number, text), got None",
    "return '1.0'": "expected a finite number, or (number, text), got str",
    "return 1j": "expected a finite number, or (number, text), got complex",
    "return [1.0]": "expected a finite number, or (number, text), got list",
    "return {'score': 1.0}": "expected a finite number, or (number, text), got dict",
    "return (1.0, 2)": "expected a finite number, or (number, text), got a tuple of float, int",
    "return numpy.ones(1)": "expected a finite number, or (number, text), got ndarray",
    "return Decimal('NaN')": "expected a finite number, got nan",
    "return numpy.float32('inf')": "expected a finite number, got inf",
    "return 10 ** 400": "expected a number from -1e+15 to 1e+15, got an integer of 1329 bits",
    "return 1e200": "expected a number from -1e+15 to 1e+15, got 1e+200",
    "return -1e30": "expected a number from -1e+15 to 1e+15, got -1e+30",
}


def test_each_failure_is_no_reward_with_its_cause(mine):
    with pool("act", timeout_s=10.0) as scorer:
        results = scorer.score(items(*(act for completion in NO_REWARDS for act in (completion, "return 1"))))
    errors = [r.error for r in results[::2]]
    places = [error.partition(" at ")[2] for error in errors if error is not None and "raised" in error]
    assert [error.partition(" at ")[0] for error in errors] == [
        f"reward pool_rewards_x:act: {e}" for e in NO_REWARDS.values()
    ]
    (file, line), (same, _) = (place.rsplit(":", 1) for place in places[:2])
    assert Path(file) == Path(same) == Path("pool_rewards_x.py").absolute() and int(line) > 1
    assert [r.reward for r in results] == [None, 1.0] * len(NO_REWARDS)
    assert running(mine, 0) == 0, "something outlived the pool"


def test_what_a_killed_reward_started_is_gone_before_the_pool_closes(mine):
    with pool("act") as scorer:
        one = running(mine)
        assert one == 2, "a worker and its supervisor"
        scorer.score(items("fork", "orphan", "return 1"))
        assert running(mine, one) == one


def test_children_of_good_rewards_end_with_the_pool(mine):
    with pool("act") as scorer:
        assert [r.reward for r in scorer.score(items("leave", "stray", "return 2"))] == [1.0, 1.0, 2.0]
        assert running(mine) > 2
    assert running(mine, 0) == 0


def test_printing_and_reading_disturb_nothing():
    with pool("act") as scorer:
        assert [r.reward for r in scorer.score(items("print", "return 2", "print"))] == [0.0, 2.0, 0.0]


def test_slow_items_are_shared_among_the_workers():
    with pool("act", workers=4, timeout_s=5) as scorer:
        start = time.monotonic()
        scorer.score(items(*["nap 0.2"] * 16))
    assert time.monotonic() - start < 0.2 * 16 / 2


def test_items_larger_than_a_pipe_while_the_worker_hangs():
    """Nothing reads the pipe then, so a write that waits for the worker would block forever."""
    large = RewardItem(completion="return 2", answer="x" * 300_000, prompt="")
    with pool("act") as scorer:
        results = scorer.score([*items("hang"), *[large] * 40])
    assert [r.reward for r in results] == [None, *[2.0] * 40]


def test_a_worker_that_died_between_two_calls_is_replaced():
    with pool("act") as scorer:
        scorer.score(items("return 1"))
        os.killpg(scorer._workers[0].process.pid, signal.SIGKILL)
        assert scorer.score(items(*["return 2"] * 3))[2].reward == 2.0


def test_a_name_that_the_worker_cannot_load_is_told_by_open(mine):
    with pytest.raises(RunStopped, match="^reward 'nosuch_x:f': importing nosuch_x raised ModuleNotFoundError"):
        pool("nosuch_x:f").open()
    assert running(mine, 0) == 0


def test_open_reports_a_module_that_ends_its_worker(mine, tmp_path):
    (tmp_path / "fatal_x.py").write_text("import os; os._exit(9)")
    with pytest.raises(RunStopped, match="did not start: its process exited with status 9"):
        pool("fatal_x:f").open()
    assert running(mine, 0) == 0


def test_workers_end_when_their_parent_is_killed(mine):
    """In the middle of a call that holds the interpreter, while a child process of a reward is running."""
    code = textwrap.dedent(
        """
        from rlkd.config.schema import RewardConfig, RewardFunction
        from rlkd.rewards.pool import RewardItem, RewardPool
        backtracks = RewardFunction(name="format", options={"pattern": "leave (1+)+b"})
        functions = [RewardFunction(name="pool_rewards_x:act"), backtracks]
        pool = RewardPool(RewardConfig(functions=functions, timeout_s=60.0, workers=2))
        pool.open()
        print("open", flush=True)
        pool.score([RewardItem(completion=c, answer=None, prompt="") for c in ["leave " + "1" * 60, "hang"]])
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "open\n"
    assert running(mine, 1 + 2 * 2 + 1) == 6, "the parent, two workers, two supervisors, a child of a reward"
    parent.kill()
    parent.wait()
    assert running(mine, 0) == 0


def test_speed():
    with pool("exact_match") as scorer:
        start = time.monotonic()
        results = scorer.score(items(*["a"] * 5000))
        assert time.monotonic() - start < 5, "at least a thousand a second"
    assert math.fsum(r.reward or 0 for r in results) == 5000
