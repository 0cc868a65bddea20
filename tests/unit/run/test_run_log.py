"""What a run shows on the console: the figures that its algorithm has, and its own iterations."""

import os
import pty
import re
import sys

import pytest
from builders import config
from runs import ENV, train

from rlkd.run.evaluation import Evaluate
from rlkd.run.metrics_log import shown

SFT = ("algorithm={name: sft}", "teacher=null", "data.completion_column=answer", "data.max_completion_tokens=16")
FEW = ("run.iterations=2", "rollout.prompts=4", "eval.every=0")


def test_the_figures_that_the_algorithm_has():
    assert shown({"loss": 0.23354, "tokens_per_s": 1234.5, "entropy": 1.0}) == {
        "loss": "0.234",
        "tokens_per_s": "1.23e+03",
    }
    assert list(shown({"eval/greedy": 0.5, "reward/mean": 0.25, "accuracy": 0.25})) == [
        "reward/mean",
        "accuracy",
        "eval/greedy",
    ]


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
        pass  # what a terminal says when its last writer has gone
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said[-3000:]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert "Epoch" not in text
    assert re.search(r"iteration \S+ 2/2 .*loss: \S+ tokens_per_s: \S+", text), text[-3000:]


def test_a_run_without_held_out_data_says_so(tmp_path, capsys):
    class Loader:
        tokenizer, iteration = None, 0

    data = tmp_path / "train.jsonl"
    for overrides, lines in (([], 1), (["eval.every=0"], 0)):
        Evaluate(config(f"data.path={data}", *overrides), Loader()).run_started(None, None)
        said = capsys.readouterr().out.splitlines()
        assert len(said) == lines
        assert all(line.startswith("eval.path: not set, so this run has no held-out accuracy; ") for line in said)
