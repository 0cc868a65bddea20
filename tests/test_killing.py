"""A trainer that is killed at any moment, again and again, ends with what an undisturbed one has, bit for bit.

`make soak` kills 200 times, `make test` five. Each kill is SIGKILL: at a random moment of the run's whole length, or
while a checkpoint is written, or while the student is exported.
"""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from test_run import saved

from rlkd.report import write_report
from rlkd.resume import checkpoints
from runs import ENV, Run, start, train

pytestmark = pytest.mark.process

ITERATIONS = 8
SETTINGS = (
    *("--config", "configs/quickstart.yaml", f"run.iterations={ITERATIONS}", "run.resume=auto", "checkpoint.every=1"),
    *("rollout.prompts=4", "algorithm.group_size=4", "data.limit=64", "trainer.micro_batch_tokens=80"),
    *("eval.every=4", "eval.prompts=4", "eval.samples=2"),
)
AIMS = ("anywhere", "checkpoint", "anywhere", "export")
GONE_S = 20.0
"""Within this time nothing that a killed trainer started may be left."""


def arguments(folder: Path) -> list[str]:
    return [*SETTINGS, f"run.dir={folder.parent}", f"run.name={folder.name}"]


@dataclass(frozen=True)
class Ended:
    """What a finished run leaves: all of this must not depend on kills."""

    rows: list[dict[str, float]]
    """metrics.jsonl without times and memory."""
    tensors: dict[str, torch.Tensor]
    """Of the last checkpoint."""
    files: dict[str, bytes]
    """Rollouts and the exported student."""


def ended(folder: Path) -> Ended:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = ("time/", "memory/", "tokens_per_s")
    files = [path for name in ("rollouts", "hf") for path in sorted((folder / name).iterdir())]
    return Ended(
        rows=[{name: value for name, value in row.items() if not name.startswith(own)} for row in rows],
        tensors=saved(folder, ITERATIONS),
        files={f"{path.parent.name}/{path.name}": path.read_bytes() for path in files},
    )


def assert_equal(a: Ended, b: Ended) -> None:
    assert [row["iteration"] for row in a.rows] == [row["iteration"] for row in b.rows]
    assert a.rows == b.rows
    assert a.files.keys() == b.files.keys()
    assert [name for name in a.files if a.files[name] != b.files[name]] == []
    assert a.tensors.keys() == b.tensors.keys()
    assert [name for name in a.tensors if not torch.equal(a.tensors[name], b.tensors[name])] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Ended, float]:
    """(what it left, how many seconds it took)."""
    folder = tmp_path_factory.mktemp("killing") / "undisturbed"
    train(["--print-config", *arguments(folder)], folder.parent)  # starts the server that runs are forked from
    before = time.monotonic()
    train(arguments(folder), folder.parent)
    return ended(folder), time.monotonic() - before


def kill(run: Run, folder: Path, aim: str, seconds: float, chance: random.Random) -> None:
    """SIGKILL at the moment that `aim` says, unless the run has ended by then. `seconds`: how long a run takes."""
    if aim == "anywhere":
        run.wait(chance.uniform(0, seconds))
    else:
        target = chance.randint(newest(folder) + 1, ITERATIONS) if newest(folder) < ITERATIONS else ITERATIONS
        being_written = ".hf.partial" if aim == "export" else f"checkpoints/.iteration-{target:06d}.partial"
        while run.returncode is None and not (folder / being_written).exists():
            time.sleep(0.001)
        run.wait(chance.uniform(0, 0.06))
    run.kill()


def newest(folder: Path) -> int:
    """The iteration of the newest whole checkpoint; 0 without any."""
    return max((int(path.name.split("-")[1]) for path in checkpoints(folder)), default=0)


def assert_sound(folder: Path, run: Run, before: int) -> None:
    """What must hold of a run directory at any moment. `before`: the checkpoint that the run went on from."""
    for path in checkpoints(folder):
        assert {file.name for file in path.iterdir()} == {".metadata", "__0_0.distcp", "config.json", "meta.pt"}, path
    words = [line.split() for line in run.out.read_text().splitlines()]
    did = [int(line[1].split("/")[0]) for line in words if line[:1] == ["iteration"]]
    assert did == list(range(before + 1, before + 1 + len(did))), "it went on from another iteration"
    assert before <= newest(folder) and before + len(did) - 1 <= newest(folder), "an iteration was lost"
    assert "Traceback" not in run.err.read_text(), run.err.read_text()
    if (folder / "metrics.jsonl").exists():
        write_report(folder)


def assert_nothing_is_left(mark: str) -> None:
    """No process that has `mark` in its environment."""

    def holders() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RLKD_TEST_RUN") == mark:
                    found.append(process)
            except psutil.Error:
                continue  # ended just now, or a zombie
        return found

    until = time.monotonic() + GONE_S
    while holders():
        assert time.monotonic() < until, holders()
        time.sleep(0.05)


@pytest.mark.timeout(3 * 3600)
def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_one(undisturbed, soak, tmp_path, capsys):
    wanted, seconds = undisturbed
    kills, chance = 200 if soak else 5, random.Random(0)
    killed, runs, at = 0, 0, []
    while killed < kills:
        runs += 1
        folder = tmp_path / f"killed-{runs}"
        env, finished = ENV | {"RLKD_TEST_RUN": str(folder)}, False
        while not finished:
            before = newest(folder)
            run = start(arguments(folder), tmp_path, env)
            if killed < kills:
                kill(run, folder, AIMS[killed % len(AIMS)], seconds, chance)
            finished = run.wait(300) == 0
            assert finished or run.returncode == -9, run.err.read_text()[-3000:]
            assert_sound(folder, run, before)
            if not finished:
                killed += 1
                at.append(newest(folder))
            assert_nothing_is_left(str(folder))
        assert_equal(ended(folder), wanted)
        leftovers = [path for path in folder.rglob("*") if "partial" in path.name]
        assert not leftovers, leftovers
    with capsys.disabled():
        print(f"\n{killed} kills of {runs} runs; checkpoints at the kills: {sorted(at)}")
