"""How torch is told to manage a GPU's memory."""

import pytest
import torch
from builders import config

from rlkd.run.fit import use_expandable_segments

SERVED = ("rollout.backend=vllm", "rollout.server.launch=true", "trainer.accelerator=gpu")


@pytest.mark.parametrize(
    ("overrides", "environment", "expected"),
    [
        (("trainer.accelerator=gpu",), {}, ["expandable_segments:True"]),
        (("trainer.accelerator=cpu",), {}, []),
        (("trainer.accelerator=gpu",), {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, []),
        ((*SERVED, "rollout.server.weight_sync=nccl"), {}, ["expandable_segments:True"]),
        ((*SERVED, "rollout.server.weight_sync=ipc"), {}, []),
    ],
)
def test_segments_expand_on_a_gpu_unless_they_are_shared(monkeypatch, overrides, environment, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    use_expandable_segments(config(*overrides))
    assert asked == expected


def test_torch_knows_the_setting():
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
