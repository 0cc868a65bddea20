"""Only disk errors are reported as disk errors."""

import errno
import resource
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from rlkd.distributed import RunStopped
from rlkd.storage.disk_errors import writing

FULL = OSError(errno.ENOSPC, "No space left on device")


SAVE = {
    "torch": torch.save,
    "safetensors": save_file,
    "dcp": lambda tensors, path: dcp.save(tensors, checkpoint_id=path, no_dist=True),
}
# torch and safetensors say in words of their own what went wrong; `dcp` makes folders that are missing.
CAUSES = [(kind, cause) for kind in SAVE for cause in ("gone", "no folder", "a folder", "too large")]


@contextmanager
def files_up_to(size):
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("kind", "cause"), [c for c in CAUSES if c not in (("dcp", "gone"), ("dcp", "a folder"))])
def test_what_each_library_says_of_a_disk_is_one_line(kind, cause, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    where = {"gone": "gone/a", "no folder": "file/a", "a folder": "folder", "too large": "a"}[cause]
    with files_up_to(100_000), pytest.raises(RunStopped) as caught, writing("x"):
        SAVE[kind]({"a": torch.ones(100_000 if cause == "too large" else 3)}, tmp_path / where)
    said = str(caught.value)
    assert said.startswith("x could not be written: ") and "\n" not in said and "Traceback" not in said


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch, disk full
        CheckpointException("", {0: (FULL, None)}),
    ],
)
def test_a_full_disk_is_one_line(error):
    with pytest.raises(RunStopped, match="^x could not be written: "), writing("x"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("a collective timed out"),
        RunStopped("another line"),
        CheckpointException("", {0: (RuntimeError("a key is missing"), None)}),
    ],
)
def test_any_other_error_keeps_its_type(error):
    with pytest.raises(type(error)) as caught, writing("x"):
        raise error
    assert caught.value is error


def test_a_model_that_does_not_fit_into_memory_is_not_a_full_disk():
    with pytest.raises(RuntimeError, match="Missing key") as caught, writing("x"):
        torch.nn.Linear(2, 2).load_state_dict({})
    assert not isinstance(caught.value, RunStopped)
