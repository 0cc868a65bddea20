"""Servers that we start: all their processes end, whatever ends them, and one line reports what went wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import group_members, wait_until
from runs import run_code
from vllm_fixtures import EOS, prompts, run_config, save_model, start_server, tiny_model, true_logprobs

from rlkd.config.schema import ServerConfig
from rlkd.generation.sampler import Sampling
from rlkd.generation.vllm import VLLMSampler
from rlkd.models.weights import Whole
from rlkd.servers.client import ServerError
from rlkd.servers.command import LAUNCHER_VARIABLES, ServerRole, server_command, server_environment
from rlkd.servers.process import VLLMServer, cpu_cores
from rlkd.servers.supervisor import shared_memory

SAMPLING = Sampling(temperature=1.0, max_tokens=8, seed=0)


TRAINER = """
import sys
from vllm_fixtures import EOS, run_config
from rlkd.generation.vllm import VLLMSampler
sampler = VLLMSampler(run_config(sys.argv[1], run_dir=sys.argv[2]), [EOS])
sampler.start(); sampler.open()
(server,) = sampler.pool.servers
print(server.pid, server.supervisor_pid, server.url, sampler._file.write({}, 0), sampler._file.directory, flush=True)
sys.stdin.read()
"""


def test_a_host_that_is_not_this_machine_is_one_line(tmp_path: Path) -> None:
    model = save_model(tiny_model(0), tmp_path / "model")
    for host, why in (("192.0.2.1", "Cannot assign requested address"), ("nowhere.invalid", "not known|failure")):
        with pytest.raises(
            ServerError, match=f"server.host: expected an address .* 'policy', got {host} .*({why}).*; correct"
        ) as e:
            start_server("policy", model, tmp_path, host=host)
        assert "\n" not in str(e.value)


@pytest.mark.server
@pytest.mark.process
@pytest.mark.soak
def test_a_killed_trainer_leaves_no_server_process_and_the_other_server_does_the_work(
    policy_server: VLLMServer, policy_path: str, tmp_path: Path
) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, policy_path, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert trainer.stdout is not None
        pid, supervisor, url, _, weights = trainer.stdout.readline().split()
        sampler = VLLMSampler(run_config(policy_path, url, policy_server.url), [EOS])
        sampler.open()
        model = tiny_model(61)
        sampler.publish(Whole(model.state_dict()), 1)
        logs = [tmp_path / "run" / "server" / "policy.log", policy_server.log]
        before = [log.read_text().count("POST /inference/v1/generate") for log in logs]
        for group in sampler.sample(prompts(4), n=2, iteration=0, sampling=SAMPLING):
            for rollout in group:
                truth = true_logprobs(model, rollout.prompt.token_ids, rollout.token_ids)
                torch.testing.assert_close(torch.tensor(rollout.logprobs), truth, atol=1e-4, rtol=0)
        after = [log.read_text().count("POST /inference/v1/generate") for log in logs]
        assert [now - then for now, then in zip(after, before, strict=True)] == [2, 2]

        assert len(group_members(int(pid))) >= 3, "API process, engine and worker"
        held = shared_memory(int(pid))
        assert held and Path(weights).exists(), "otherwise this test could not see a leak"
        trainer.kill()
        wait_until(lambda: not group_members(int(pid)) and not group_members(int(supervisor)), 15.0)
        assert not [path for path in held if path.exists()]
        wait_until(lambda: not Path(weights).exists(), 2.0)
        assert len(sampler.sample(prompts(4), n=1, iteration=0, sampling=SAMPLING)) == 4, (
            "the other one does all the work"
        )
        assert sampler.pool.lost.keys() == {url}
        assert sampler.pool.lost[url].startswith(f"POST {url}/inference/v1/generate: ConnectError: ")
        sampler.close()
    finally:
        trainer.kill()
        trainer.wait()


@pytest.mark.process
def test_a_server_that_cannot_start_reports_why_in_one_line(tmp_path: Path) -> None:
    model = tmp_path / "empty"
    model.mkdir()
    server = start_server("hopeless", str(model), tmp_path)
    with pytest.raises(RuntimeError) as failure:
        server.wait_ready()
    (first_line,) = str(failure.value).splitlines()
    assert first_line.startswith("the vLLM server 'hopeless' ended with exit code 1 before it was ready: ")
    assert str(model) in first_line and str(tmp_path / "hopeless.log") in first_line
    server.stop()
    assert not group_members(server.pid)


def stand_in(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VLLMServer:
    """A server whose Python runs `command` instead of vLLM, with a real supervisor."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$2" in vllm*) {command} ;; *) exec {sys.executable} "$@" ;; esac\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return start_server("stand-in", "no/model", tmp_path)


@pytest.mark.process
def test_a_server_that_does_not_answer_in_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = stand_in("sleep 600 & echo started; wait", tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match=r"^the vLLM server 'stand-in' did not answer within 1 s; its log is"):
        server.wait_ready(timeout=1.0)
    assert not group_members(server.pid)


@pytest.mark.process
@pytest.mark.parametrize("ending", ["stop", "supervisor terminated", "supervisor killed", "deaf to SIGTERM"])
def test_every_way_to_end_ends_the_children_too(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKD_TEST_SHM", segment := f"/dev/shm/rlkd-test-{os.getpid()}")
    script = tmp_path / "tree.py"
    script.write_text(TREE)
    deaf = "deaf" if ending == "deaf to SIGTERM" else "polite"
    server = stand_in(f"exec {sys.executable} {script} {deaf}", tmp_path, monkeypatch)
    try:
        wait_until(lambda: "running" in server.log.read_text(), 20.0)
        assert len(group_members(server.pid)) == 2
        if ending == "supervisor terminated":
            os.kill(server.supervisor_pid, signal.SIGTERM)
        elif ending == "supervisor killed":
            os.kill(server.supervisor_pid, signal.SIGKILL)
        else:
            server.stop()
        wait_until(lambda: not group_members(server.pid), 15.0)
        if ending != "supervisor killed":  # then only the server knows of the segment
            wait_until(lambda: not Path(segment).exists(), 5.0)
    finally:
        server.stop()
        if group_members(server.pid):
            os.killpg(server.pid, signal.SIGKILL)
        Path(segment).unlink(missing_ok=True)


TREE = """
import mmap, os, signal, sys, time
deaf = sys.argv[1] == "deaf"
if deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child and not deaf:
    def end(*_):
        os.kill(child, signal.SIGTERM)
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
if child:
    with open(os.environ["RLKD_TEST_SHM"], "w+b") as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
    print("running", flush=True)
time.sleep(600)
"""


def test_servers_get_cores_from_the_last_down_and_leave_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert cpu_cores(0, 1) == "4,5,6,7"
    assert [cpu_cores(slot, 3) for slot in range(3)] == ["6,7", "4,5", "2,3"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert [cpu_cores(slot, 2) for slot in range(3)] == ["5", "3", "5"]


@pytest.mark.process
def test_a_server_does_not_inherit_torchruns_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    server = stand_in("env; exit 0", tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match="ended with exit code 0 before it was ready"):
        server.wait_ready()
    variables = {line.split("=")[0] for line in server.log.read_text().splitlines() if "=" in line}
    assert "VLLM_SERVER_DEV_MODE" in variables
    assert not {name for name in variables if LAUNCHER_VARIABLES.fullmatch(name)}
    server.stop()


BOTH_RANKS = """
import sys
import torch.distributed as dist
from rlkd.distributed import on_every_rank, on_rank_zero
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
print(on_rank_zero(lambda: ["made on", rank]))
def fail():
    raise OSError("no room")
try:
    on_rank_zero(fail)
except Exception as error:
    print(type(error).__name__, error)
print("each its own", on_every_rank(lambda: rank))
try:
    on_every_rank(lambda: fail() if rank == 1 else None)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.process
def test_what_a_rank_makes_and_how_it_fails_reaches_every_rank(tmp_path: Path) -> None:
    said = [output.splitlines() for output in run_code(BOTH_RANKS, tmp_path, tmp_path / "meeting")]
    assert [lines[:2] for lines in said] == [
        ["['made on', 0]", "OSError no room"],
        ["['made on', 0]", "RuntimeError on rank 0: no room"],
    ]
    assert said[0][2:] == ["each its own 0", "RuntimeError another rank failed; its error is above or in its own log"]
    assert said[1][2:] == ["each its own 1", "OSError no room"]


def test_the_cache_of_a_cpu_server_may_be_part_of_a_gib(monkeypatch):
    """vLLM's VLLM_CPU_KVCACHE_SPACE must be whole GiB ("invalid literal for int"), and overrides its argument."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    role = ServerRole(name="policy", model="m", max_model_len=64)
    settings = ServerConfig(kv_cache_gb=0.2)
    environment = server_environment(role, settings, host="127.0.0.1", key="k")
    command = server_command(role, settings, host="127.0.0.1", port=1)
    if not torch.cuda.is_available():
        assert command[command.index("--kv-cache-memory-bytes") + 1] == str(round(0.2 * 2**30))
        assert "VLLM_CPU_KVCACHE_SPACE" not in environment
