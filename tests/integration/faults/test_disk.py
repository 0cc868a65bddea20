"""The disk fills up while a checkpoint or a log is written."""

import os
import shutil
import subprocess

import pytest
from run_results import assert_same_run, wait_for_rows
from runs import arguments, start, train

from rlkd.storage.run_folder import checkpoints

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk"),
]


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MB."""
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(where)], check=True)
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def fill(disk, leaving):
    free = shutil.disk_usage(disk).free
    with open(disk / "filler", "wb") as file:
        file.write(b"x" * max(free - leaving, 0))


@pytest.mark.parametrize(
    "leaving", [pytest.param(0, marks=pytest.mark.soak), pytest.param(1_000_000, marks=pytest.mark.soak), None]
)
def test_a_full_disk_ends_the_run_and_nothing_that_was_saved_is_lost(leaving, disk, undisturbed, tmp_path):
    """0: no log can be written either. 1 MB: no checkpoint is started. None: its tensors fit, its other files do not.

    The run is paused after its second iteration, so that the disk fills up between checkpoints.
    """
    folder = disk / "run"
    run = start(arguments(1, folder, "run.iterations=6", "checkpoint.every=2", "checkpoint.keep=9"), tmp_path)
    try:
        wait_for_rows(run, folder, 2)
        while not checkpoints(folder):
            assert run.returncode is None
        whole = sum(path.stat().st_size for path in checkpoints(folder)[0].iterdir())
        fill(disk, whole - 20_000 if leaving is None else leaving)
        assert run.wait(60) == 1, run.err.read_text()[-3000:]
    finally:
        run.kill()
    said = run.err.read_text().splitlines()[-1]
    assert said.startswith("stopped: ")
    assert "could not be written" in said or "GB free, but the checkpoint" in said, said
    assert not list((folder / "checkpoints").glob(".*"))
    kept = [path.name for path in checkpoints(folder)]
    assert kept[0] == "iteration-000002" and len(kept) < 3
    (disk / "filler").unlink()
    train(arguments(1, folder, "run.iterations=6", "run.resume=auto", "checkpoint.every=2"), tmp_path)
    assert_same_run(folder, undisturbed, 6)
