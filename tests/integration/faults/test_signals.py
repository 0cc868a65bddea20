"""Signals, and ranks that are killed."""

import signal
import subprocess
import time

import psutil
import pytest
from run_results import assert_same_run, rows_so_far, saved, wait_for_rows
from runs import ENV, TORCHRUN, arguments, start, start_ranks, train

pytestmark = pytest.mark.process


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_a_signal_saves_and_ends_the_run_which_resumes_as_if_nothing_had_been(number, undisturbed, tmp_path):
    run = start(arguments(1, tmp_path / "run", "run.iterations=10000", "checkpoint.every=0"), tmp_path)
    try:
        wait_for_rows(run, tmp_path / "run", 2)
        run.send_signal(number)
        assert run.wait(30) == 0, run.err.read_text()[-3000:]
    finally:
        run.kill()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    done = int(checkpoint.name.split("-")[1])
    assert f"signal: saved iteration {done}; continue with run.resume=auto" in run.out.read_text()
    assert done < 6, "the machine is too slow for this test"
    train(arguments(1, tmp_path / "run", "run.iterations=6", "run.resume=auto"), tmp_path)
    assert_same_run(tmp_path / "run", undisturbed, 6)


def test_a_second_signal_stops_immediately(tmp_path):
    run = start(arguments(1, tmp_path / "run", "run.iterations=10000", "checkpoint.every=0"), tmp_path)
    try:
        wait_for_rows(run, tmp_path / "run", 1)
        run.send_signal(signal.SIGSTOP)  # so that both are there before the iteration ends
        run.send_signal(signal.SIGTERM)
        run.send_signal(signal.SIGINT)
        run.send_signal(signal.SIGCONT)
        assert run.wait(30) in (-signal.SIGTERM, -signal.SIGINT)
    finally:
        run.kill()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("which", ["one", pytest.param("all", marks=pytest.mark.soak)])
def test_a_signal_to_one_rank_or_to_all_ends_both_together(which, tmp_path):
    folder = tmp_path / "run"
    ranks = start_ranks(2, arguments(2, folder, "run.iterations=10000", "checkpoint.every=0"), tmp_path)
    try:
        wait_for_rows(ranks[0], folder, 2)
        for rank in ranks if which == "all" else ranks[1:]:
            rank.send_signal(signal.SIGTERM)
            rank.send_signal(signal.SIGINT)  # within five seconds the same request, since torchrun forwards signals
        assert [rank.wait(60) for rank in ranks] == [0, 0], ranks[0].err.read_text()[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert int(checkpoint.name.split("-")[1]) == rows_so_far(folder)[-1]["iteration"]


def torchrun(folder, *overrides):
    command = [*TORCHRUN, "--max-restarts=1", "-m", "rlkd.train", *arguments(2, folder, "run.resume=auto", *overrides)]
    # otherwise restarted workers find the addresses of the dead ones in torchrun's store (torch 2.13)
    env = ENV | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until_logged(run, folder, count):
    deadline = time.monotonic() + 120
    while len(rows_so_far(folder)) < count:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0][-3000:]
        time.sleep(0.05)


@pytest.mark.soak
def test_a_rank_killed_under_torchrun_costs_only_what_was_not_saved(tmp_path):
    """torchrun stops the other rank and restarts both. Then it gets a SIGTERM itself, and both still save and exit."""
    folder = tmp_path / "run"
    run = torchrun(folder, "run.iterations=10000", "checkpoint.every=1")
    try:
        wait_until_logged(run, folder, 2)
        (second,) = [p for p in psutil.Process(run.pid).children() if p.environ()["RANK"] == "1"]
        second.kill()
        while psutil.pid_exists(second.pid):
            time.sleep(0.05)
        before = len(rows_so_far(folder))
        wait_until_logged(run, folder, before + 2)
        run.send_signal(signal.SIGTERM)  # torchrun itself then exits with 1, by design
        output, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    done = rows_so_far(folder)[-1]["iteration"]
    assert f"signal: saved iteration {done}; continue with run.resume=auto" in output
    assert [row["iteration"] for row in rows_so_far(folder)] == list(range(1, done + 1))
    straight = tmp_path / "straight"
    command = arguments(2, straight, f"run.iterations={done}", "checkpoint.every=1")
    for rank in (ranks := start_ranks(2, command, tmp_path)):
        assert rank.wait(120) == 0, ranks[0].err.read_text()[-3000:]
    assert_same_run(folder, straight, done)
    assert saved(folder, done)
