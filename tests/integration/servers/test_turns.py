"""Servers that share a GPU start one after the other, those on different GPUs together. The servers are real processes
under a real supervisor, which answer after a second; the GPUs are what torch is made to report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlkd.config_file import load
from rlkd.generation.vllm import VLLMSampler
from rlkd.teachers.served import ServedTeacher

SERVER = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
at = lambda name: sys.argv[sys.argv.index(name) + 1]
name = at("--served-model-name")
def note(event):
    with open(sys.argv[1], "a") as file:
        file.write(f"{time.monotonic()} {name} {event}\\n")
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
note("started")
time.sleep(1.0)
note("ready")
HTTPServer((at("--host"), int(at("--port"))), Handler).serve_forever()
"""


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file in which servers note when they were started and when they began to answer."""
    (tmp_path / "server.py").write_text(SERVER)
    python, noted = tmp_path / "python", tmp_path / "events"
    runs = f'exec {sys.executable} {tmp_path}/server.py {noted} "$@"'
    python.write_text(f'#!/bin/sh\ncase "$2" in vllm*) {runs} ;; *) exec {sys.executable} "$@" ;; esac\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    yield noted


def started(noted: Path) -> dict[str, dict[str, float]]:
    """server → event → time."""
    times: dict[str, dict[str, float]] = {}
    for line in noted.read_text().splitlines():
        at, name, event = line.split()
        times.setdefault(name, {})[event] = float(at)
    return times


@pytest.mark.process
def test_a_server_starts_when_the_ones_before_it_on_its_gpu_answer(events: Path, tmp_path: Path) -> None:
    config = load(
        [str(Path(__file__).parents[3] / "configs" / "quickstart_vllm.yaml")],
        ["rollout.server.devices=[[1],[1],[2]]", "teacher.server.devices=[[0],[2]]", f"run.dir={tmp_path}"],
    ).config
    policy, teacher = VLLMSampler(config, [0]).pool, ServedTeacher(config, config.teacher).pool
    try:
        for pool in (policy, teacher):
            pool.start(config)
        assert (len(policy.servers), len(teacher.servers)) == (2, 1), "two on GPU 1 and 2, and one on GPU 0"
        for pool in (policy, teacher):
            urls = pool._all_ready()
            assert len(set(urls)) == len(pool.servers) == len(pool.config.devices)
    finally:
        policy.close()
        teacher.close()
    times = started(events)
    assert times["policy-1"]["started"] > times["policy-0"]["ready"], "both on GPU 1"
    assert times["teacher-1"]["started"] > times["policy-2"]["ready"], "both on GPU 2"
    first_answer = min(time["ready"] for time in times.values())
    assert all(times[name]["started"] < first_answer for name in ("policy-0", "policy-2", "teacher-0"))
