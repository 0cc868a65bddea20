"""A checkpoint that would run code is refused before any of that code runs."""

import io
import pickle
import shutil

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from run_results import saved
from runs import arguments, start, train

from rlkd.distributed import RunStopped
from rlkd.run.safe_loading import METADATA, SafeModelParallelStrategy, check_index

pytestmark = pytest.mark.process


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(arguments(1, folder, "run.iterations=1"), folder.parent)
    return folder


def test_the_index_of_our_own_checkpoints_is_accepted(trained):
    check_index(trained / "checkpoints" / "iteration-000001")
    assert saved(trained, 1)


@pytest.mark.parametrize("where", ["index", "state", "shard"])
def test_code_in_a_checkpoint_is_never_run(where, trained, tmp_path):
    folder, sprung = tmp_path / "run", tmp_path / "sprung"
    shutil.copytree(trained, folder)
    checkpoint = folder / "checkpoints" / "iteration-000001"
    if where == "index":
        (checkpoint / METADATA).write_bytes(pickle.dumps(Trap(sprung)))
    elif where == "state":
        state = torch.load(checkpoint / "meta.pt", weights_only=False)
        torch.save(state | {"skipped": Trap(sprung)}, checkpoint / "meta.pt")
    else:
        plant_in_shard(checkpoint, sprung)
    run = start(arguments(1, folder, "run.iterations=2", "run.resume=auto"), tmp_path)
    assert run.wait(60) == 1
    said = [line for line in run.err.read_text().splitlines() if line.startswith("stopped: run.resume: ")]
    assert len(said) == 1 and "open" in said[0], run.err.read_text()[-2000:]
    assert not sprung.exists()


@pytest.mark.parametrize("file", ["meta.pt", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_a_damaged_checkpoint_is_one_line(file, damage, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    path = folder / "checkpoints" / "iteration-000001" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut off":
        path.write_bytes(content[: len(content) // 2])
    run = start(arguments(1, folder, "run.iterations=2", "run.resume=auto"), tmp_path)
    assert run.wait(120) == 1
    lines = run.err.read_text().splitlines()
    assert "Traceback" not in run.err.read_text(), lines
    assert lines[-1].startswith(f"stopped: run.resume: {path.parent} cannot be read: "), lines


def plant_in_shard(checkpoint, sprung):
    """Replace the first entry of a shard that is not a tensor, such as a learning rate."""
    with open(checkpoint / METADATA, "rb") as file:
        index = pickle.load(file)
    trap = io.BytesIO()
    torch.save(Trap(sprung), trap)
    entry, place = next((e, s) for e, s in index.storage_data.items() if e.fqn.endswith(".lr"))
    shard = checkpoint / place.relative_path
    place.offset, place.length = shard.stat().st_size, len(trap.getvalue())
    with open(shard, "ab") as file:
        file.write(trap.getvalue())
    with open(checkpoint / METADATA, "wb") as file:
        pickle.dump(index, file)
    assert entry in index.storage_data


def test_a_file_that_is_no_index_is_one_line(tmp_path):
    (tmp_path / METADATA).write_bytes(b"")
    with pytest.raises(RunStopped, match=r"/\.metadata is not a valid checkpoint index: .*; choose another checkpoint"):
        check_index(tmp_path)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RunStopped("another line")])
def test_an_error_that_is_not_the_checkpoints_is_passed_on(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ModelParallelStrategy, "load_checkpoint", fail)
    monkeypatch.setattr("rlkd.run.safe_loading.check_index", lambda _: None)
    with pytest.raises(type(error)) as caught:
        SafeModelParallelStrategy().load_checkpoint(tmp_path)
    assert caught.value is error
