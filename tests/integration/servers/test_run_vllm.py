"""Full runs with real vLLM servers that the run starts and stops."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = [pytest.mark.server, pytest.mark.process]

# The environment at collection; later a Trainer in this process sets its rank and port, which children would inherit.
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def train(folder, *overrides, **environment):
    command = [
        *(sys.executable, "-m", "rlkd.train", "--config", "configs/quickstart_vllm.yaml"),
        *(f"run.dir={folder.parent}", f"run.name={folder.name}", *overrides),
    ]
    return subprocess.run(command, env=ENV | environment, capture_output=True, text=True, timeout=400)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def servers_of(folder):
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(the run's folder, the process that ended)."""
    folder = tmp_path_factory.mktemp("runs") / "served"
    return folder, train(folder, "run.iterations=4", "eval.prompts=16", "teacher.check_parity=true")


def test_policy_and_teacher_on_servers_agree_with_the_trainer(served):
    folder, done = served
    assert done.returncode == 0, done.stderr[-3000:]
    assert "student as teacher within" in done.stdout and "served against local teacher within" in done.stdout
    trained = rows(folder)[1:]
    assert [row["iteration"] for row in trained] == [1, 2, 3, 4]
    assert all(row["mismatch/mean"] < 1e-4 and row["staleness/mean"] == 0 for row in trained)
    for dump in (folder / "rollouts").glob("*.jsonl"):
        lines = [json.loads(line) for line in dump.read_text().splitlines()]
        assert {line["weight_version"] for line in lines} == {lines[0]["iteration"] - 1}
        assert all(line["teacher_logprobs"] for line in lines)
    assert {log.stem for log in (folder / "server").iterdir()} == {"policy", "teacher"}
    assert not servers_of(folder)


@pytest.mark.soak
def test_a_run_in_flight_is_stopped_by_a_signal_and_goes_on(tmp_path):
    """Two iterations ahead, weights published while the server samples; what was sampled ahead survives the signal."""
    folder = tmp_path / "flying"
    local = "teacher={backend: local, path: 'builtin:teacher'}"
    settings = ("run.iterations=6", "rollout.max_staleness=2", "eval.every=0", "checkpoint.every=1", local)
    command = [sys.executable, "-m", "rlkd.train", "--config", "configs/quickstart_vllm.yaml"]
    command += [f"run.dir={folder.parent}", f"run.name={folder.name}", *settings]
    with open(tmp_path / "err.txt", "w") as errors:
        run = subprocess.Popen(command, env=ENV, stdout=errors, stderr=errors)
        while not (folder / "checkpoints" / "iteration-000002").exists():
            assert run.poll() is None, (tmp_path / "err.txt").read_text()[-3000:]
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        assert run.wait(120) == 0, (tmp_path / "err.txt").read_text()[-3000:]
    stopped = len(rows(folder))
    assert 2 <= stopped < 6
    ahead = json.loads((folder / f"checkpoints/iteration-{stopped:06d}/sampled_ahead-rank0.json").read_text())
    assert {iteration for iteration, *_ in ahead} <= {stopped, stopped + 1}
    done = train(folder, *settings, "run.resume=auto")
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows(folder)
    assert [row["iteration"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert all(row["mismatch/mean"] < 1e-4 for row in found), "drift is not taken for a mismatch"
    assert max(row["staleness/mean"] for row in found) == 2 and max(row["staleness/gap"] for row in found) > 1e-2
    assert not servers_of(folder)


@pytest.mark.soak
def test_the_exported_student_is_evaluated_by_a_server_of_its_own(served):
    folder, _ = served
    evaluated = subprocess.run(
        [sys.executable, "-m", "rlkd.evaluate", str(folder)], env=ENV, capture_output=True, text=True, timeout=400
    )
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    assert f"evaluating {folder}/hf, after 4 iterations" in evaluated.stderr
    # The last published weights, loaded from disk by a server, which still reports the version "default".
    assert json.loads(evaluated.stdout)["eval/greedy"] == rows(folder)[-1]["eval/greedy"]
    assert not servers_of(folder)


WITHOUT_REFRESH = """
import importlib

real = importlib.import_module

def import_module(name, package=None):
    module = real(name, package)
    if name == "rlkd.weight_sync.file_engine":
        print("the tied head is not refreshed", flush=True)
        module.FileWeightTransferEngine._refresh_tied_head = lambda self: None
    return module

importlib.import_module = import_module
"""


@pytest.mark.soak
def test_a_stale_tied_head_stops_the_run(tmp_path):
    """Without the engine's fix all calls of the update succeed and the version changes, but the head is old."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_REFRESH)
    folder = tmp_path / "stale"
    local = "teacher={backend: local, path: 'builtin:teacher'}"
    done = train(folder, "run.iterations=20", "eval.every=0", local, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "stopped: iteration" in done.stderr and "sampler and trainer disagree by" in done.stderr
    assert "is the output layer tied?" in done.stderr
    assert 1 <= len(rows(folder)) < 10  # the first weights are the served ones, the next ones are not
    assert "the tied head is not refreshed" in (folder / "server" / "policy.log").read_text()
    assert not servers_of(folder)
