"""The teacher's server is killed while a run needs it."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_results import assert_same_run, wait_for_rows
from runs import arguments, start, train

pytestmark = pytest.mark.process


class Teacher:
    """The stub as a process that can be killed and restarted at the same address."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self):
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name("stub_teacher.py"), str(self.port)])
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def teacher():
    made = Teacher()
    yield made
    made.kill()


def served(teacher, folder, *overrides):
    section = f"teacher={{backend: served, path: 'builtin:teacher', url: 'http://127.0.0.1:{teacher.port}'}}"
    return arguments(1, folder, section, "run.iterations=6", "checkpoint.every=0", *overrides)


@pytest.fixture(scope="module")
def taught_in_peace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peace") / "run"
    made = Teacher()
    train(served(made, folder), folder.parent)
    made.kill()
    return folder


def test_a_teacher_that_comes_back_is_waited_for(teacher, taught_in_peace, tmp_path):
    run = start(served(teacher, tmp_path / "run"), tmp_path)
    try:
        wait_for_rows(run, tmp_path / "run", 2)
        teacher.kill()
        time.sleep(3)
        assert run.returncode is None
        teacher.start()
        assert run.wait(60) == 0, run.err.read_text()[-3000:]
    finally:
        run.kill()
    assert f"teacher server http://127.0.0.1:{teacher.port} is out of service: " in run.err.read_text()
    assert f"teacher server http://127.0.0.1:{teacher.port} is in service again" in run.err.read_text()
    assert_same_run(tmp_path / "run", taught_in_peace, 6)


def test_a_teacher_that_stays_away_ends_the_run_with_a_checkpoint(teacher, taught_in_peace, tmp_path):
    folder = tmp_path / "run"
    run = start(served(teacher, folder, "teacher.server.retry_s=1"), tmp_path)
    try:
        wait_for_rows(run, folder, 2)
        teacher.kill()
        assert run.wait(60) == 1
    finally:
        run.kill()
    last = run.err.read_text().splitlines()[-1]
    assert last.startswith("stopped: no teacher server came back in 1 s (retry_s): POST http://127.0.0.1"), last
    (checkpoint,) = (folder / "checkpoints").iterdir()
    done = int(checkpoint.name.split("-")[1])
    assert done >= 2 and f"stopped: saved iteration {done}; continue with run.resume=auto" in run.out.read_text()
    teacher.start()
    train(served(teacher, folder, "run.resume=auto"), tmp_path)
    assert_same_run(folder, taught_in_peace, 6)
