"""Only disk errors are reported as disk errors."""

import errno

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from rlkd.distributed import RunStopped
from rlkd.storage.disk_errors import writing

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_a_folder_that_is_gone_is_one_line(save, tmp_path):
    with pytest.raises(RunStopped, match="^x could not be written: "), writing("x"):
        save({"a": torch.ones(3)}, tmp_path / "gone" / "a")


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
