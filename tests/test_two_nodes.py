"""Two machines, as network namespaces with an address each: the launch script brings trainers and servers together."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_run import SMALL, rows, saved

pytestmark = pytest.mark.process

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(Path(__file__).parents[1])}


@dataclass(frozen=True)
class Machine:
    """Where a command is run, and the address that others reach it at."""

    address: str
    prefix: tuple[str, ...]

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*self.prefix, *command],
            env=ENV | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two network namespaces, joined by a cable. Where the kernel allows none: this machine twice, over loopback."""
    tag = uuid.uuid4().hex[:6]
    names = (f"rlkd-{tag}-a", f"rlkd-{tag}-b")
    made = [subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode for name in names]
    try:
        if any(made):
            yield Machine("127.0.0.1", ()), Machine("127.0.0.1", ())
            return
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


def settings(folder: Path, *overrides: str) -> list[str]:
    return [
        *("--config", "configs/quickstart.yaml", f"run.dir={folder.parent}", f"run.name={folder.name}"),
        *SMALL,
        *overrides,
    ]


def train_on(machines, folder: Path, *overrides: str, **environment: str) -> list[str]:
    """The run `folder` by the launch script, one process on each machine; what each machine printed."""
    where = {"NODES": "2", "PROCESSES": "1", "HEAD": machines[1].address}
    agents = [
        machine.start("launch/nodes.sh", *settings(folder, *overrides), **where, **environment) for machine in machines
    ]
    try:
        said = [agent.communicate(timeout=300)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)[-4000:]
    return said


def test_two_machines_agree_with_one_process(machines, tmp_path):
    """KDRL, hf sampler. The second address is the meeting point: rank 0 need not be there."""
    iterations = os.environ.get("RLKD_TEST_ITERATIONS", "4")
    length = (f"run.iterations={iterations}", "checkpoint.export=false")
    said = train_on(machines, tmp_path / "two", *length)
    if machines[0].prefix:
        assert all(f"--local-addr {m.address}" in text for m, text in zip(machines, said, strict=True))
    alone = [sys.executable, "-m", "rlkd.train", *settings(tmp_path / "one", *length)]
    subprocess.run(alone, env=ENV, check=True, timeout=300, capture_output=True)
    one, two = (saved(tmp_path / name, int(iterations)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    furthest = max(float((one[name] - two[name]).abs().max()) for name in one)
    print(f"{iterations} iterations: parameters and optimizer differ by {furthest:.1e} at most")
    assert furthest < 1e-5
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for name in ("reward/mean", "tokens/trained", "completion/length", "tokens/generated"):
            assert a[name] == pytest.approx(b[name]), name
