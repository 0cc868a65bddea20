"""The launch scripts: the commands that they print, whole, and that the real programs know every option of these."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser

from rlkd.config_file import load, parse_args
from rlkd.serve import main as serve
from rlkd.serve import plan

pytestmark = pytest.mark.process

SNAPSHOTS = Path(__file__).with_name("launch_snapshots")
CONFIG = ("--config", "configs/quickstart_vllm.yaml")
OVERRIDES = ("run.name=a.b", "rollout.max_tokens=12", "reward.functions=[{name: exact_match}]")

# Slurm's programs as far as the script uses them. A job step that serves goes on until it is ended; one that trains
# shows what it would run, and then ends at once, or when it is signalled.
STUBS = {
    "python": 'exec "$REAL_PYTHON" "$@"',
    "scontrol": 'if [[ $1 = show ]]; then tr "," "\n" <<<"$3"; else echo "scontrol $*"; fi',
    "squeue": 'echo "7.0 policy"; echo "7.1 teacher"; echo "7.2 trainer"',
    "scancel": 'echo "scancel $*"; touch "$STUBS/signalled"',
    # A server is healthy once it has said what it becomes: else the job may end before all have.
    "curl": """
host=${*: -1}; host=${host#http://}; host=${host%%:*}
for ((i = 0; i < 400; i++)); do [[ -e $STUBS/up-$host ]] && exit 0; sleep 0.05; done
exit 1
""",
    "srun": """
echo "$RLKD_SERVER_KEY" > "$STUBS/key"
while [[ $1 = --* ]]; do step+=("$1"); shift; done
DRY_RUN=1 "$@"
for option in "${step[@]}"; do [[ $option = --nodelist=* ]] && up=${option#--nodelist=}; done
touch "$STUBS/up-$up"
if [[ ${step[0]} != --job-name=trainer ]]; then [[ -n ${SERVERS_DIE:-} ]] || exec sleep 100; exit 3; fi
while [[ -n ${TRAINS_ON:-} && ! -e "$STUBS/signalled" ]]; do sleep 0.1; done
exit "${TRAINER_EXIT:-0}"
""",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With `python` for this interpreter, and a Slurm of two trainers, two policy servers and a teacher's."""
    for name, body in STUBS.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    found = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STUBS": str(tmp_path), "REAL_PYTHON": sys.executable}
    found |= {"HEAD": "127.0.0.1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0,n1,n2,n3,n4"}
    return found | {"SLURM_GPUS_PER_NODE": "8", "TRAINER_NODES": "2", "POLICY_NODES": "2", "TEACHER_NODES": "1"}


def rendered(environment: Mapping[str, str], *command: str, **more: str) -> str:
    """What a launch script prints when it is not to run anything."""
    variables = {**environment, **more, "DRY_RUN": "1"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout


class Job:
    """The batch script, with its steps for real."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._output = folder / "output.txt"
        command = ["launch/slurm.sbatch", *CONFIG, *OVERRIDES]
        with open(self._output, "w") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait(self) -> int:
        return self._process.wait(30)

    def signal_when_it_says(self, text: str, number: int) -> None:
        deadline = time.monotonic() + 30
        while text not in self.output:
            assert self._process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.05)
        self._process.send_signal(number)

    def end(self) -> None:
        """With the steps that it has left, as Slurm does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def slurm(environment: dict[str, str], tmp_path: Path) -> Iterator:
    """Starts a job."""
    jobs: list[Job] = []

    def start(**more: str) -> Job:
        (folder := tmp_path / f"job{len(jobs)}").mkdir()
        jobs.append(Job(environment | more, folder))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


def assert_snapshot(name: str, text: str) -> None:
    path = SNAPSHOTS / f"{name}.txt"
    assert text == path.read_text(), f"if it is meant to be so, {path} wants:\n{text}"


def assert_known(line: str) -> None:
    """torchrun, the trainer and the server know every option, and the configuration that they are given is one."""
    words = shlex.split(line)
    module = words.index("-m") + 1
    if words[module] == "rlkd.serve":
        plan(words[module + 1 :])
        return
    known = get_args_parser().parse_args(words[module + 1 :])
    assert (words[module], known.module, known.training_script) == ("torch.distributed.run", True, "rlkd.train")
    args = parse_args(known.training_script_args)
    config = load(args.files, args.overrides).config
    assert config.run.resume == "auto"
    assert (config.trainer.devices, config.trainer.num_nodes) == (int(known.nproc_per_node), int(known.nnodes[:1]))


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
    commands = [plan(shlex.split(line)[3:]) for line in lines]
    shown = "".join(shlex.join(command) + "\n" for command, _ in commands)
    assert_snapshot("vllm", shown.replace(sys.executable, "python").replace(str(Path.cwd()), "."))
    assert all(variables["RLKD_SERVER_KEY"] == "secret" for _, variables in commands) and "secret" not in shown


def test_what_is_missing_is_asked_for_in_one_line(environment):
    for script, name in (("one_box.sh", "PROCESSES"), ("nodes.sh", "NODES"), ("nodes.sh", "HEAD"), ("server.sh", "1")):
        given = {"NODES": "2", "PROCESSES": "1", "HEAD": "127.0.0.1"} | environment
        given.pop(name, None)
        done = subprocess.run([f"launch/{script}"], env=given, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert re.search(rf": {name}: wants ", done.stderr), done.stderr


def test_a_name_that_means_loopback_on_its_own_machine_is_no_meeting_point(environment):
    """Where /etc/hosts has the machine's own name as 127.0.1.1, the others could not reach it."""
    command, given = ["launch/nodes.sh", *CONFIG], environment | {"NODES": "2", "PROCESSES": "1", "HEAD": "localhost"}
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("HEAD: localhost is 127.0.0.1 on this machine, where no other can reach it; give an")


def test_slurm_gives_each_role_its_machines_and_ends_with_the_trainers(environment, slurm, monkeypatch):
    job = slurm(TEACHER_TENSOR_PARALLEL="8")
    assert job.wait() == 0, job.output
    steps = sorted(job.output.splitlines(keepends=True))  # servers start side by side
    assert_snapshot("slurm", "".join(steps))
    key = Path(environment["STUBS"], "key").read_text().strip()
    assert len(key) == 32 and key not in job.output
    monkeypatch.setenv("RLKD_SERVER_KEY", key)
    for line in steps:
        if not line.startswith("srun"):
            assert_known(line)


def test_slurm_near_the_time_limit_signals_the_trainers_alone_and_queues_the_job_again(slurm):
    job = slurm(TRAINS_ON="1", TRAINER_EXIT="1")
    job.signal_when_it_says("rlkd.train", signal.SIGUSR1)  # as --signal=B:USR1@900 does, to the batch script
    assert job.wait() == 0, job.output
    said = [line for line in job.output.splitlines() if line.startswith(("scancel", "scontrol"))]
    assert said == ["scancel --signal=TERM 7.2", "scontrol requeue 7"]


def test_slurm_ends_with_the_trainers_own_exit_code(slurm):
    assert slurm(TRAINER_EXIT="4").wait() == 4
    job = slurm(POLICY_NODES="1")
    assert job.wait() == 2
    assert "got 5, wants TRAINER_NODES + POLICY_NODES + TEACHER_NODES = 2 + 1 + 1; make" in job.output


def test_slurm_ends_with_a_server(slurm):
    job = slurm(SERVERS_DIE="1", TRAINS_ON="1")
    assert job.wait() == 1 and "a server ended during the run" in job.output


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
        (("--host", "0.0.0.0"), "--host: got '0.0.0.0', wants the address of this machine at which trainers reach it"),
        (("rollout.backend=hf", "rollout.server.launch=false"), "rollout.backend: is hf, which samples in the trainer"),
        (
            ("--role", "teacher", "teacher=null", "algorithm={name: grpo}"),
            "teacher.backend: is none; set it to served to serve the teacher",
        ),
        (
            ("stages.a.model.path=builtin:student", "stages.b.model.path=builtin:mentor"),
            "stages: want different policy servers; set launch: true",
        ),
        (("rollout.nonsense=1",), "command line: rollout.nonsense: unknown key"),
        ((), "RLKD_SERVER_KEY: not set; the server asks every caller for a key: choose one, e.g. by openssl"),
    ],
)
def test_what_cannot_be_served_is_one_line(change, line, monkeypatch, capsys):
    monkeypatch.delenv("RLKD_SERVER_KEY", raising=False)
    assert serve([*CONFIG, "--role", "policy", "--host", "10.0.0.1", "--port", "8000", *change]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)
