"""The launch scripts print the expected commands, and the real programs accept every option in them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launch_scripts import CONFIG, OVERRIDES, assert_known, assert_snapshot, rendered, with_python

from rlkd.command_line import parse
from rlkd.serve import command, plan
from rlkd.serve import main as serve

pytestmark = pytest.mark.process


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return with_python(tmp_path)


def test_one_box(environment):
    line = rendered(environment, "launch/one_box.sh", *CONFIG, *OVERRIDES, PROCESSES="4")
    assert_snapshot("one_box", line)
    assert_known(line)


def test_nodes(environment):
    line = rendered(environment, "launch/nodes.sh", *CONFIG, *OVERRIDES, "rollout.server.launch=false",
                    "rollout.server.urls=[http://n2:8000]", "teacher.server.launch=false", "teacher.urls=[http://n3:8000]",
                    NODES="2", PROCESSES="8")  # fmt: skip
    assert_snapshot("nodes", line)
    assert_known(line)


def test_servers(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the sizes are those of GPUs
    monkeypatch.setenv("RLKD_SERVER_KEY", "secret")
    sizes = {"PORT": "8001", "TENSOR_PARALLEL": "2", "DATA_PARALLEL": "4"}
    lines = [rendered(environment, "launch/server.sh", r, *CONFIG, *OVERRIDES, **sizes) for r in ("policy", "teacher")]
    assert_snapshot("server", "".join(lines))
    commands = [plan(**parse(command, shlex.split(line.partition(" rlkd.serve ")[2]))) for line in lines]
    shown = "".join(shlex.join(command) + "\n" for command, _ in commands)
    assert_snapshot("vllm", shown.replace(sys.executable, "python").replace(str(Path.cwd()), "."))
    assert all(variables["RLKD_SERVER_KEY"] == "secret" for _, variables in commands) and "secret" not in shown


def test_trainers_and_servers_choose_the_network_in_the_same_way(environment):
    """NCCL takes the interface that is named, not any other whose name begins like it (hence the second =)."""
    scripts = {"nodes.sh": {"NODES": "2", "PROCESSES": "8"}, "server.sh": {}}
    for script, sizes in scripts.items():
        role = ("policy",) if script == "server.sh" else ()
        for more, chosen in (({}, "=lo"), ({"NCCL_SOCKET_IFNAME": "ib0"}, "ib0")):
            line = rendered(environment, f"launch/{script}", *role, *CONFIG, **sizes, **more)
            assert f" NCCL_SOCKET_IFNAME={chosen} " in line
    by_host = {name: value for name, value in environment.items() if name != "HEAD"} | {"HOST": "127.0.0.1"}
    assert " NCCL_SOCKET_IFNAME==lo " in rendered(by_host, "launch/server.sh", "policy", *CONFIG)


def test_a_missing_setting_is_one_line(environment):
    for script, name in (("one_box.sh", "PROCESSES"), ("nodes.sh", "NODES"), ("nodes.sh", "HEAD"), ("server.sh", "1")):
        given = {"NODES": "2", "PROCESSES": "1", "HEAD": "127.0.0.1"} | environment
        given.pop(name, None)
        done = subprocess.run([f"launch/{script}"], env=given, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert re.search(rf": {name}: expected ", done.stderr), done.stderr


def test_a_name_that_resolves_to_loopback_is_no_rendezvous(environment):
    """If /etc/hosts maps the machine's own name to 127.0.1.1, other machines cannot reach it."""
    command, given = ["launch/nodes.sh", *CONFIG], environment | {"NODES": "2", "PROCESSES": "1", "HEAD": "localhost"}
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("HEAD: expected an address") and "got localhost, which is 127.0.0.1" in done.stderr


def test_kubernetes(environment, monkeypatch):
    monkeypatch.setenv("RLKD_SERVER_KEY", "secret")
    manifest = yaml.safe_load(Path("launch/kubernetes.yaml").read_text())
    items = {item["metadata"]["name"]: item for item in manifest["items"]}
    pods = {name: item["spec"]["template"]["spec"] for name, item in items.items() if item["kind"] != "Service"}
    here = {"fieldRef": "127.0.0.1", "secretKeyRef": "secret"}
    lines = []
    for pod in pods.values():
        (container,) = pod["containers"]
        given = {e["name"]: e.get("value") or here[next(iter(e["valueFrom"]))] for e in container["env"]}
        assert given.get("HEAD", "trainer-0.rlkd") == "trainer-0.rlkd"
        command = [word.replace("/config/run.yaml", CONFIG[1]) for word in container["command"]]
        lines.append(rendered(environment, *command, **{**given, "HEAD": "127.0.0.1"}))
        assert_known(lines[-1])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert_snapshot("kubernetes", "".join(lines))
    trainer, job = pods["trainer"], items["trainer"]["spec"]
    urls = [
        f"http://{name}-{i}.rlkd:8000" for name in ("policy", "teacher") for i in range(items[name]["spec"]["replicas"])
    ]
    assert trainer["initContainers"][0]["command"][4:] == urls
    assert re.findall(r"http://[^],]*", " ".join(trainer["containers"][0]["command"])) == urls
    nodes = {e["name"]: e.get("value") for e in trainer["containers"][0]["env"]}["NODES"]
    assert int(nodes) == job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    assert trainer["subdomain"] == items["rlkd"]["metadata"]["name"] == items["policy"]["spec"]["serviceName"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("--host", "0.0.0.0"), "--host: expected an address at which trainers reach this machine, got '0.0.0.0'"),
        (("rollout.backend=hf", "rollout.server.launch=false"), "rollout.backend: expected vllm, got hf"),
        (
            ("--role", "teacher", "teacher=null", "algorithm={name: grpo}"),
            "teacher.backend: expected served, got none",
        ),
        (
            ("stages.a.model.path=builtin:student", "stages.b.model.path=builtin:mentor"),
            "stages: expected one policy server, got different ones",
        ),
        (("rollout.nonsense=1",), "command line: rollout.nonsense: unknown key"),
        ((), "RLKD_SERVER_KEY: expected the key that the server asks callers for, got nothing"),
    ],
)
def test_what_cannot_be_served_is_one_line(change, line, monkeypatch, capsys):
    monkeypatch.delenv("RLKD_SERVER_KEY", raising=False)
    assert serve([*CONFIG, "--role", "policy", "--host", "10.0.0.1", "--port", "8000", *change]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)
