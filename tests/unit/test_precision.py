"""`trainer.precision: auto` follows the hardware, and no other place decides it."""

import pytest
import torch
from builders import config

from rlkd.distributed import compute_dtype
from rlkd.planning.memory import trainer_place


@pytest.mark.parametrize(
    ("precision", "accelerator", "there", "dtype"),
    [
        ("auto", "auto", True, torch.bfloat16),
        ("auto", "gpu", True, torch.bfloat16),
        ("auto", "cpu", True, torch.float32),
        ("auto", "auto", False, torch.float32),
        ("fp32", "auto", True, torch.float32),
        ("bf16", "cpu", False, torch.bfloat16),
    ],
)
def test_auto_is_bf16_where_the_student_is_trained_on_a_gpu(monkeypatch, precision, accelerator, there, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert compute_dtype(precision, accelerator) == dtype


@pytest.mark.parametrize(("accelerator", "same_as"), [("auto", "bf16"), ("gpu", "bf16"), ("cpu", "fp32")])
def test_the_estimate_is_of_a_gpu_unless_the_trainer_is_on_a_cpu(accelerator, same_as):
    def estimated(precision):
        return trainer_place(config(f"trainer.precision={precision}", f"trainer.accelerator={accelerator}"))

    assert config().trainer.precision == "auto"
    assert estimated("auto") == estimated(same_as)
    assert estimated("fp32") != estimated("bf16")
