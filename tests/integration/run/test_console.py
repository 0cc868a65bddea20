"""What a run shows on the console: its loss and speed."""

import re

import pytest
from runs import train

SFT = ("algorithm={name: sft}", "teacher=null", "data.completion_column=answer", "data.max_completion_tokens=16")


FEW = ("run.iterations=2", "rollout.prompts=4", "eval.every=0")


def arguments(folder, *overrides):
    return ["--config", "configs/quickstart.yaml", f"run.dir={folder}", "run.name=x", *SFT, *FEW, *overrides]


@pytest.mark.process
@pytest.mark.long
def test_supervised_training_shows_its_loss_and_its_speed(tmp_path):
    lines = [line for line in train(arguments(tmp_path), tmp_path).splitlines() if line.startswith("iteration ")]
    assert len(lines) == 2
    for line in lines:
        form = r"iteration \d/2  loss (\S+)  completion/length \S+  tokens_per_s (\S+)  left 0:\d\d:\d\d"
        figures = re.fullmatch(form, line)
        assert figures is not None and float(figures[1]) > 0 and float(figures[2].replace(",", "")) > 0, line
