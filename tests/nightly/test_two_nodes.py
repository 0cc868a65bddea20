"""Two machines, as network namespaces with an address each: the launch script brings trainers and servers together."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from run_results import rows, saved
from runs import SMALL, train

pytestmark = pytest.mark.process

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(Path(__file__).parents[2])}


@dataclass(frozen=True)
class Machine:
    """A place to run commands, and the address at which others reach it."""

    address: str
    prefix: tuple[str, ...]

    def start(self, *command: str, output: Path | None = None, **environment: str) -> subprocess.Popen:
        """Start a command. `output`: the file for its output; None: a pipe."""
        stdout = subprocess.PIPE if output is None else open(output, "w")  # noqa: SIM115  (the child's own)
        return subprocess.Popen(
            [*self.prefix, *command], env=ENV | environment, stdout=stdout, stderr=subprocess.STDOUT, text=True
        )


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two network namespaces, connected by a virtual cable."""
    tag = uuid.uuid4().hex[:6]
    names = (f"rlkd-{tag}-a", f"rlkd-{tag}-b")
    made = [subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode for name in names]
    try:
        if any(made):
            pytest.skip("no network namespaces here (`ip netns add` failed): two machines cannot be made of one")
        cable = ("eth7", "netns", names[0], "type", "veth", "peer", "name", "eth7", "netns", names[1])
        subprocess.run(["ip", "link", "add", *cable], check=True)
        for i, name in enumerate(names):
            for setting in (f"addr add 10.77.0.{i + 1}/24 dev eth7", "link set eth7 up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *setting.split()], check=True)
        a, b = (Machine(f"10.77.0.{i + 1}", ("ip", "netns", "exec", name)) for i, name in enumerate(names))
        yield a, b
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def arguments(folder: Path, *overrides: str) -> list[str]:
    where = (f"run.dir={folder.parent}", f"run.name={folder.name}", "checkpoint.export=false")
    return ["--config", "configs/quickstart.yaml", *where, *SMALL, *overrides]


def start_on(machines, folder: Path, *overrides: str, **environment: str) -> list[subprocess.Popen]:
    """Start the run `folder` with the launch script, one process (torchrun's agent) on each machine."""
    where = {"NODES": "2", "PROCESSES": "1", "HEAD": machines[1].address, "MAX_RESTARTS": "0"}
    command = ("launch/nodes.sh", *arguments(folder, *overrides))
    return [machine.start(*command, **where | environment) for machine in machines]


def end_of(agents: list[subprocess.Popen]) -> list[str]:
    """The output of each machine, after the run has ended successfully."""
    try:
        said = [agent.communicate(timeout=400)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)[-4000:]
    return said


def assert_as_in_one_process(two: Path, iterations: int) -> None:
    """Compare a run on two machines with the same run in one process."""
    train(arguments(one := two.with_name("one"), f"run.iterations={iterations}"), two.parent)
    ours, theirs = saved(two, iterations), saved(one, iterations)
    assert ours.keys() == theirs.keys()
    furthest = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    print(f"{iterations} iterations, two machines and one process: parameters and optimizer differ by {furthest:.1e}")
    assert furthest < 1e-5
    for a, b in zip(rows(two), rows(one), strict=True):
        for name in ("iteration", "reward/mean", "tokens/trained", "completion/length", "tokens/generated"):
            assert a[name] == pytest.approx(b[name]), name


def test_two_machines_agree_with_one_process(machines, tmp_path):
    """KDRL, hf sampler. The rendezvous is on the second machine, where rank 0 need not be."""
    iterations = 10
    said = end_of(start_on(machines, tmp_path / "two", f"run.iterations={iterations}"))
    assert all(f"--local-addr {m.address}" in text for m, text in zip(machines, said, strict=True))
    assert ["is_host=true" in text for text in said] == [False, True]
    assert_as_in_one_process(tmp_path / "two", iterations)


def test_a_killed_trainer_is_started_again_and_the_run_is_the_same(machines, tmp_path):
    """Both machines run torchrun's second round: nothing of the first may be left in the rendezvous store."""
    folder = tmp_path / "two"
    agents = start_on(machines, folder, "run.iterations=10", MAX_RESTARTS="1")
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 6):  # a checkpoint is at 5
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (trainer,) = psutil.Process(agents[1].pid).children()
    trainer.kill()
    end_of(agents)
    assert_as_in_one_process(folder, 10)


@pytest.mark.server
def test_two_machines_sample_from_a_server_on_each(machines, tmp_path):
    """Policy servers started by `rlkd.serve`, with a key, at addresses that both machines can reach."""
    addresses = [f"{machine.address}:{port}" for machine, port in zip(machines, ("8100", "8101"), strict=True)]
    key = {"RLKD_SERVER_KEY": "only-for-this-test", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    served = ("rollout.backend=vllm", f"rollout.server.urls=[http://{addresses[0]},http://{addresses[1]}]")
    lengths = (*served, "rollout.max_mismatch=0.001", f"run.iterations={10}")
    logs = [tmp_path / "server-0.log", tmp_path / "server-1.log"]
    servers = [
        machine.start(
            *("launch/server.sh", "policy", *arguments(tmp_path / "two", *lengths)),
            output=log,
            **key,
            HOST=machine.address,
            PORT=address.rpartition(":")[2],
        )
        for machine, address, log in zip(machines, addresses, logs, strict=True)
    ]
    try:
        for machine, address, server, log in zip(machines, addresses, servers, logs, strict=True):
            while machine.start("curl", "--silent", "--fail", f"http://{address}/health").wait():
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
        said = end_of(start_on(machines, tmp_path / "two", *lengths, **key))
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
        for server in servers:
            server.wait(60)
    assert all(key["RLKD_SERVER_KEY"] not in text for text in (*said, *(log.read_text() for log in logs)))
    trained = rows(tmp_path / "two")
    assert [row["iteration"] for row in trained] == list(range(1, 11))
    assert all(row["mismatch/mean"] < 1e-4 and row["staleness/mean"] == 0 for row in trained)
    print(f"mismatch {max(row['mismatch/mean'] for row in trained):.1e} nats a token at most")
    assert all(log.read_text().count("POST /inference/v1/generate") >= 10 for log in logs), "one server was idle"
