"""A trainer that is killed repeatedly, at any time, ends with the same results as an undisturbed one, bit for bit.

`make soak` kills 200 times, `make test` twice. Each kill is a SIGKILL, at a random time during the run, or
while a checkpoint is written, or while the student is exported.
"""

import json
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from run_results import saved
from runs import ENV, ROOT, Run, start, train

from rlkd.config.stages import finished
from rlkd.config_file import load
from rlkd.reporting.report_page import write_report
from rlkd.storage import atomic
from rlkd.storage.run_folder import checkpoints, exported

pytestmark = pytest.mark.process

ITERATIONS = 8
SETTINGS = (
    *("--config", "configs/quickstart.yaml", f"run.iterations={ITERATIONS}", "run.resume=auto", "checkpoint.every=1"),
    *("rollout.prompts=4", "algorithm.group_size=4", "data.limit=64", "trainer.micro_batch_tokens=80"),
    *("eval.every=4", "eval.prompts=4", "eval.samples=2"),
)
AIMS = ("anywhere", "checkpoint", "anywhere", "export")
GONE_S = 20.0
"""Within this time all processes that a killed trainer started must have ended."""


def arguments(folder: Path) -> list[str]:
    return [*SETTINGS, f"run.dir={folder.parent}", f"run.name={folder.name}"]


@dataclass(frozen=True)
class Ended:
    """The results of a finished run, none of which may depend on kills."""

    rows: list[dict[str, float]]
    """metrics.jsonl without times and memory."""
    tensors: dict[str, torch.Tensor]
    """The tensors of the last checkpoint."""
    files: dict[str, bytes]
    """Rollouts and the exported student."""


def ended(folder: Path) -> Ended:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = ("time/", "memory/", "tokens_per_s")
    files = [path for name in ("rollouts", "tokens", "hf") for path in sorted((folder / name).iterdir())]
    return Ended(
        rows=[{name: value for name, value in row.items() if not name.startswith(own)} for row in rows],
        tensors=saved(folder, ITERATIONS),
        # The model card has the name of the run, which is that of its folder.
        files={
            f"{path.parent.name}/{path.name}": path.read_bytes().replace(folder.name.encode(), b"")
            if path.name == "README.md"
            else path.read_bytes()
            for path in files
        },
    )


def assert_equal(a: Ended, b: Ended) -> None:
    assert [row["iteration"] for row in a.rows] == [row["iteration"] for row in b.rows]
    assert a.rows == b.rows
    assert a.files.keys() == b.files.keys()
    assert [name for name in a.files if a.files[name] != b.files[name]] == []
    assert a.tensors.keys() == b.tensors.keys()
    assert [name for name in a.tensors if not torch.equal(a.tensors[name], b.tensors[name])] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Ended, float, Path]:
    """(its results, the seconds it took, its folder)."""
    folder = tmp_path_factory.mktemp("killing") / "undisturbed"
    train(["--print-config", *arguments(folder)], folder.parent)  # starts the server from which runs are forked
    before = time.monotonic()
    train(arguments(folder), folder.parent)
    return ended(folder), time.monotonic() - before, folder


def kill(run: Run, folder: Path, aim: str, seconds: float, chance: random.Random) -> None:
    """Send SIGKILL at the time given by `aim`, unless the run has ended. `seconds`: the duration of a run."""
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
    """The iteration of the newest complete checkpoint; 0 without any."""
    return max((int(path.name.split("-")[1]) for path in checkpoints(folder)), default=0)


def assert_sound(folder: Path, run: Run, before: int) -> None:
    """Check what must hold for a run directory at any time. `before`: the checkpoint that the run resumed from."""
    for path in checkpoints(folder):
        assert {file.name for file in path.iterdir()} == {
            ".metadata",
            "__0_0.distcp",
            "config.json",
            "data.json",
            "meta.pt",
        }, path
    words = [line.split() for line in run.out.read_text().splitlines()]
    did = [int(line[1].split("/")[0]) for line in words if line[:1] == ["iteration"]]
    assert did == list(range(before + 1, before + 1 + len(did))), "it resumed from another iteration"
    assert before <= newest(folder) and before + len(did) - 1 <= newest(folder), "an iteration was lost"
    assert "Traceback" not in run.err.read_text(), run.err.read_text()
    if (folder / "metrics.jsonl").exists():
        write_report(folder)


def assert_nothing_is_left(mark: str) -> None:
    """Assert that no process has `mark` in its environment."""

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
    wanted, seconds, _ = undisturbed
    kills, chance = 200 if soak else 2, random.Random(0)
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
        leftovers = [path for path in folder.rglob("*") if path.suffix in (".partial", ".removed")]
        assert not leftovers, leftovers
    with capsys.disabled():
        print(f"\n{killed} kills of {runs} runs; checkpoints at the kills: {sorted(at)}")


def test_a_run_that_ended_before_its_export_exports_when_it_is_resumed(undisturbed, tmp_path):
    """Killed between the last checkpoint and the export, or signalled in the last iteration."""
    wanted, _, folder = undisturbed
    resumed = tmp_path / folder.name
    shutil.copytree(folder, resumed)
    shutil.rmtree(resumed / "hf")
    train(arguments(resumed), tmp_path)
    assert_equal(ended(resumed), wanted)


def test_checkpoints_after_the_resumed_one_are_removed(undisturbed, tmp_path):
    """run.resume=PATH undoes two of three iterations; keep=2 and run.resume=auto must not prefer their checkpoints."""
    folder = tmp_path / "again"
    train([*arguments(folder), "run.iterations=3", "checkpoint.keep=9"], tmp_path)
    resume = f"run.resume={folder / 'checkpoints' / 'iteration-000001'}"
    printed = train([*arguments(folder), resume, "run.iterations=2"], tmp_path)
    assert [path.name for path in checkpoints(folder)] == ["iteration-000001", "iteration-000002"]
    assert f"resume: removing {folder / 'checkpoints' / 'iteration-000003'}, since the run resumes from" in printed
    train([*arguments(folder), "run.iterations=3"], tmp_path)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3] and exported(folder) == 3


def test_a_stage_is_over_when_its_last_student_is_exported(tmp_path):
    """Not when its last row is written: a kill can happen between the two, while an older student exists."""
    settings = load([str(ROOT / "configs" / "quickstart.yaml")], [f"run.dir={tmp_path}", "run.iterations=2"]).config
    folder = Path(settings.run_dir)
    (folder / "hf").mkdir(parents=True)
    (folder / "hf" / "config.json").write_text("{}")
    (folder / "report.html").write_text("")
    (folder / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}\n{"iterat')
    for iteration, over in ((1, False), (2, True), (3, True)):
        (folder / "hf" / "rlkd.json").write_text(json.dumps({"iteration": iteration}))
        assert finished(settings) is over
    (folder / "report.html").unlink()
    assert not finished(settings), "the report is written after the export"


def test_partly_written_or_removed_folders_are_never_used(tmp_path, monkeypatch):
    """The disk as a process leaves it that dies in the middle."""
    folder, file = tmp_path / "iteration-000001", tmp_path / "config.yaml"
    folder.mkdir()
    (folder / "a").write_text("")
    file.write_text("before")

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(os, "rmdir", dies)
        atomic.remove(folder)
    assert not folder.exists()
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(os, "replace", dies)
        atomic.write(file, b"after")
    assert file.read_text() == "before"
    folder.mkdir()
    atomic.remove(folder)  # finds the leftovers of the previous attempt
    atomic.write(file, b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"] and file.read_text() == "after"
