"""The policy's real vLLM server is killed: while it generates, while it loads new weights, and once too often.

With `rollout.max_staleness` the same happens while the trainer trains, and what was sampled ahead is kept or repeated.
"""

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from run_results import rows_so_far, wait_for_rows
from runs import start, start_ranks

pytestmark = [pytest.mark.server, pytest.mark.process]


def server_group(folder):
    """The process group of the policy's newest server."""
    port = re.search(r"--port (\d+)", (folder / "server" / "policy.log").read_text())[1]
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and port in command:
            return os.getpgid(process.pid)
    raise AssertionError("no server")


def kill_when(run, happens, group):
    """When `happens()`, pause the server until the next request is in progress, then kill the whole process group."""
    while not happens():
        assert run.returncode is None, run.err.read_text()[-3000:]
        time.sleep(0.001)
    os.killpg(group, signal.SIGSTOP)
    time.sleep(1.0)
    os.killpg(group, signal.SIGKILL)


@pytest.fixture(scope="module", params=[0, pytest.param(2, marks=pytest.mark.soak)])
def staleness(request):
    return request.param


@pytest.fixture(scope="module")
def scene(tmp_path_factory, soak, staleness):
    """A run whose server is killed and restarted, until once too often; (its folder, the run).

    With --soak it is also killed while it loads new weights.
    """
    folder = tmp_path_factory.mktemp("scene") / "run"
    sync = folder.parent / "sync"
    run = start(
        [
            *("--config", "configs/quickstart_vllm.yaml", f"run.dir={folder.parent}", f"run.name={folder.name}"),
            *("run.iterations=10000", "eval.every=0", "checkpoint.every=0", "rollout.prompts=4"),
            *("teacher={backend: local, path: 'builtin:teacher'}", f"rollout.server.restarts={2 if soak else 1}"),
            *("rollout.server.retry_s=300", f"rollout.server.sync_dir={sync}", f"rollout.max_staleness={staleness}"),
        ],
        folder.parent,
    )
    try:
        wait_for_rows(run, folder, 2, seconds=300)
        group, seen = server_group(folder), len(rows_so_far(folder))
        # a row is written after the weights are published: generation is next
        kill_when(run, lambda: len(rows_so_far(folder)) > seen, group)
        wait_for_rows(run, folder, len(rows_so_far(folder)) + 2 + staleness, seconds=300)
        if soak:
            group, seen = server_group(folder), {path.name for path in sync.glob("*/weights-*")}
            kill_when(run, lambda: {path.name for path in sync.glob("*/weights-*")} - seen, group)
            wait_for_rows(run, folder, len(rows_so_far(folder)) + 2 + staleness, seconds=300)
        os.killpg(server_group(folder), signal.SIGKILL)
        assert run.wait(120) is not None
    finally:
        run.kill()
    return folder, run


def losses(run):
    return re.findall(r"policy server \S+ is out of service: \S+ http://[^/]+(\S+): ", run.err.read_text())


def test_killed_while_it_generates(scene, soak):
    """The iteration is retried on a restarted server that has the published weights again."""
    assert losses(scene[1])[0] == "/inference/v1/generate"
    assert scene[1].err.read_text().count("is in service again") == (2 if soak else 1)


@pytest.mark.soak
def test_killed_while_it_takes_new_weights(scene, staleness):
    sampling = ("/inference/v1/generate",) if staleness else ()  # goes on meanwhile, and may notice first
    updates = ("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update")
    assert losses(scene[1])[1] in (*updates, *sampling)


def test_no_rollout_came_from_wrong_weights(scene, staleness):
    folder, _ = scene
    trained = rows_so_far(folder)
    assert [row["iteration"] for row in trained] == list(range(1, len(trained) + 1))
    measured = [row["mismatch/max"] for row in trained if "mismatch/max" in row]  # ahead: where there is a probe
    assert measured and max(measured) < 1e-3
    assert max(row["staleness/mean"] for row in trained) == staleness
    for dump in (folder / "rollouts").glob("*.jsonl"):
        lines = [json.loads(line) for line in dump.read_text().splitlines()]
        newest = lines[0]["iteration"] - 1
        assert {line["weight_version"] for line in lines} <= set(range(newest - staleness, newest + 1))


def test_killed_once_too_often(scene):
    """The run ends with a checkpoint, one line that says why, and nothing left of the server."""
    folder, run = scene
    assert run.returncode == 1
    said = [line for line in run.err.read_text().splitlines() if line.startswith("stopped: ")]
    assert len(said) == 1 and said[0].startswith("stopped: the vLLM server 'policy' ended with exit code 137")
    done = rows_so_far(folder)[-1]["iteration"]
    assert f"stopped: saved iteration {done}; continue with run.resume=auto" in run.out.read_text()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"iteration-{done:06d}"]
    with pytest.raises(AssertionError, match="no server"):
        server_group(folder)
    assert not list(Path(folder.parent, "sync").iterdir())


@pytest.mark.soak
def test_killed_in_a_publish_and_not_started_again(tmp_path):
    """Both ranks end within seconds, and the run can be resumed."""
    folder, sync = tmp_path / "run", tmp_path / "sync"
    options = [
        *("--config", "configs/quickstart_vllm.yaml", f"run.dir={tmp_path}", "run.name=run", "trainer.devices=2"),
        *("run.iterations=1000", "eval.every=0", "checkpoint.every=0", "rollout.prompts=4", "teacher=null"),
        *("algorithm={name: grpo, group_size: 4}", "rollout.server.restarts=0", "rollout.server.retry_s=0"),
        f"rollout.server.sync_dir={sync}",
    ]
    runs = start_ranks(2, options, tmp_path)
    try:
        wait_for_rows(runs[0], folder, 3, seconds=300)
        group, seen = server_group(folder), {path.name for path in sync.glob("*/weights-*")}
        while not {path.name for path in sync.glob("*/weights-*")} - seen:
            time.sleep(0.001)
        os.killpg(group, signal.SIGKILL)
        killed = time.monotonic()
        codes = [run.wait(60) for run in runs]
        seconds = time.monotonic() - killed
    finally:
        for run in runs:
            run.kill()
    done = rows_so_far(folder)[-1]["iteration"]
    print(f"both ranks ended {seconds:.1f} s after the server was killed, with {done} iterations saved")
    assert codes == [1, 1] and seconds < 30
    assert f"stopped: saved iteration {done}; continue with run.resume=auto" in runs[0].out.read_text()
    resumed = start_ranks(2, [*options, "run.resume=auto", f"run.iterations={done + 2}"], tmp_path)
    assert [run.wait(300) for run in resumed] == [0, 0], resumed[0].err.read_text()[-3000:]
    assert [row["iteration"] for row in rows_so_far(folder)] == list(range(1, done + 3))
