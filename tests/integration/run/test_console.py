"""The console output of a run: its loss and speed, and on a terminal a bar that counts iterations."""

import os
import pty
import re
import sys

import pytest
from runs import ENV, train

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
        figures = re.fullmatch(r"iteration \d/2  loss (\S+)  tokens_per_s (\S+)", line)
        assert figures is not None and float(figures[1]) > 0 and float(figures[2]) > 0, line


@pytest.mark.process
@pytest.mark.long
def test_the_bar_on_a_terminal_counts_iterations(tmp_path):
    """Lightning's own says "Epoch 0/-2"."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(
            sys.executable,
            [sys.executable, "-m", "rlkd.train", *arguments(tmp_path)],
            ENV | {"TERM": "xterm", "COLUMNS": "160"},
        )
    said = b""
    try:
        while part := os.read(terminal, 4096):
            said += part
    except OSError:
        pass  # the error of a terminal whose last writer has closed it
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said[-3000:]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert "Epoch" not in text
    assert re.search(r"iteration \S+ 2/2 .*loss: \S+ tokens_per_s: \S+", text), text[-3000:]
