"""Full runs, started like a user's: real processes, real signals, equal results."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_results import rows, saved
from runs import ENV, arguments, run_code, train_ranks, train_small
from transformers import AutoModelForCausalLM

from rlkd.evaluate import main as evaluate
from rlkd.train import main

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """6 iterations without a break, on 1 and on 2 ranks."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp("runs") / f"straight{ranks}"
        train_small(ranks, folders[ranks], "run.iterations=6")
    return folders


def test_two_ranks_agree_with_one(straight):
    one, two = saved(straight[1], 5), saved(straight[2], 5)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(rows(straight[1]), rows(straight[2]), strict=True):
        for name in ("reward/mean", "tokens/trained", "completion/length", "tokens/generated"):
            assert a[name] == pytest.approx(b[name]), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_three_and_three_is_six_bit_for_bit(straight, tmp_path, ranks):
    """The run of 3 ends normally, then is resumed with more iterations."""
    folder = tmp_path / "resumed"
    train_small(ranks, folder, "run.iterations=3")
    train_small(ranks, folder, "run.iterations=6", "run.resume=auto")
    resumed, whole = saved(folder, 6), saved(straight[ranks], 6)
    assert resumed.keys() == whole.keys()
    different = [name for name in whole if not torch.equal(resumed[name], whole[name])]
    assert not different
    assert [row["iteration"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "reward/mean", "kd/kl", "grad_norm"):
        assert [r[name] for r in rows(folder)] == [r[name] for r in rows(straight[ranks])]


def test_several_updates_and_schedules_resume_bit_for_bit(tmp_path):
    """The order of rows in the updates, the learning rate and the coefficient are functions of the iteration."""
    lr = "{kind: cosine, start: 3.0e-4, end: 1.0e-5, over: 8}"
    coef = "{kind: linear, start: 0.02, end: 0.0, over: 8}"
    settings = (f"optim.lr={lr}", f"algorithm.kd.coef={coef}", "trainer.updates_per_iteration=2")
    train_small(1, tmp_path / "straight", "run.iterations=4", *settings)
    train_small(1, tmp_path / "broken", "run.iterations=2", *settings)
    train_small(1, tmp_path / "broken", "run.iterations=4", "run.resume=auto", *settings)
    resumed, whole = saved(tmp_path / "broken", 4), saved(tmp_path / "straight", 4)
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    for name in ("loss", "kd/coef", "lr", "grad_norm"):
        assert [r[name] for r in rows(tmp_path / "broken")] == [r[name] for r in rows(tmp_path / "straight")]
    assert len({row["lr"] for row in rows(tmp_path / "broken")}) == 4


def test_a_run_resumes_with_more_and_with_fewer_ranks(straight, tmp_path):
    folder = tmp_path / "moved"
    for ranks, iterations in ((1, 2), (2, 4), (1, 6)):
        train_small(ranks, folder, f"run.iterations={iterations}", "run.resume=auto")
    moved, whole = saved(folder, 6), saved(straight[1], 6)
    assert moved.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(moved[name], whole[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_two_ranks_agree_with_one_over_the_whole_vocabulary(tmp_path):
    """Hidden states, the teacher's output layer and the gradient computed in the forward pass, with FSDP2."""
    for ranks in (1, 2):
        train_small(ranks, tmp_path / str(ranks), "algorithm={name: opd}", "run.iterations=3", "checkpoint.every=3")
    one, two = saved(tmp_path / "1", 3), saved(tmp_path / "2", 3)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        for name in ("kd/divergence", "kd/kl", "tokens/trained"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_two_ranks_with_unequal_numbers_of_sampling_rounds_do_not_hang(tmp_path):
    """Dynamic sampling: each rank samples until its own share carries a gradient."""
    (tmp_path / "first_letter.py").write_text(
        "def right(completion, *, answer, prompt, meta):\n    return float(completion[:1] == answer[:1])\n"
    )
    settings = (
        "algorithm={name: grpo, group_size: 4, resample_rounds: 3}",
        *("teacher={backend: none}", "reward.functions=[{name: 'first_letter:right'}]", "run.iterations=4"),
    )
    train_small(2, tmp_path / "run", *settings, env=ENV | {"PYTHONPATH": str(tmp_path)})
    drawn = [row["prompts/drawn"] for row in rows(tmp_path / "run")]
    # 2 prompts per rank and round: multiples of 4 in every iteration would mean equal numbers of rounds.
    assert len(drawn) == 4 and any(count % 4 for count in drawn) and max(drawn) <= 12, drawn
    assert all(row["grad_norm"] > 0 for row in rows(tmp_path / "run"))


def test_a_run_does_not_resume_with_another_configuration(straight, capsys):
    """It runs in this process, since it ends before anything is started. See test_resume for accepted changes."""
    before = rows(straight[1])
    assert main(arguments(1, straight[1], "run.iterations=7", "run.resume=auto", "optim.lr=1.0e-4")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("optim.lr.value: expected 0.0003, with which iteration-000006 was trained, got 0.0001; ")
    assert rows(straight[1]) == before


def test_the_export_is_the_checkpoint_and_loads_in_transformers(straight):
    model = AutoModelForCausalLM.from_pretrained(straight[1] / "hf", dtype=torch.float32)
    trained = {n.split("hf.", 1)[1]: t for n, t in saved(straight[1], 6).items() if "/state_dict/" in n}
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    start = AutoModelForCausalLM.from_pretrained("rlkd/builtin/student", dtype=torch.float32).state_dict()
    assert any(not torch.equal(start[n], v) for n, v in model.state_dict().items())


def test_every_file_of_a_run_is_there(straight):
    for name in ("config.yaml", "metrics.jsonl", "report.html", "checkpoints", "rollouts", "hf"):
        assert (straight[2] / name).exists(), name
    dumps = sorted((straight[2] / "rollouts").glob("000003-*"))
    lines = [json.loads(line) for dump in dumps for line in dump.read_text().splitlines()]
    assert len(lines) == 16
    assert all(line["weight_version"] == 2 and len(line["token_ids"]) == len(line["logprobs"]) for line in lines)
    assert all(r["staleness/mean"] == 0 and r["mismatch/mean"] < 1e-5 for r in rows(straight[2]))


def test_unequal_and_empty_micro_batches_do_not_hang(tmp_path):
    for said, rank in zip(train_ranks(2, [], tmp_path, main="unequal_ranks:main"), (0, 1), strict=True):
        for updates in (1, 2):
            assert f"rank {rank} trained 96 tokens in {updates} updates" in said


def test_three_mistakes_are_three_lines_and_exit_2(tmp_path):
    wrong = ("optim.lrr=1e-3", "rollout.backend=vlm", "algorithm.group_size=1")
    command = [sys.executable, "-m", "rlkd.train", *arguments(1, tmp_path / "x", *wrong)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 3, done.stderr
    for line, key in zip(sorted(lines), ("algorithm.group_size", "optim.lrr", "rollout.backend"), strict=True):
        assert key in line
    assert not (tmp_path / "x").exists()


def test_the_readmes_python_example_runs(tmp_path):
    text = Path("README.md").read_text(encoding="utf-8")
    (code,) = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(code.splitlines()) < 20
    run_code(code, tmp_path, ranks=1)


def test_evaluate_prints_one_json_object(straight, capsys):
    """The exported student, by the command of the README (which test_your_own runs as a process)."""
    assert evaluate(["--config", "configs/quickstart.yaml", f"model.path={straight[1] / 'hf'}", "eval.prompts=8"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) >= {"eval/greedy", "eval/avg@k", "eval/pass@k", "eval/errors", "model", "samples"}


def on_a_terminal(*command):
    """Its exit code, and what it wrote to a terminal of its own, without the control sequences."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], command, ENV | {"TERM": "xterm", "COLUMNS": "160"})
    said = b""
    try:
        while part := os.read(terminal, 4096):
            said += part
    except OSError:
        pass  # what a terminal says when its last writer has gone
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())


def test_the_quickstart_on_a_terminal_learns_and_logs_to_wandb_offline(tmp_path):
    """Accuracy rises by 30 points in 30 iterations (80 in the whole quickstart); no network is touched."""
    folder = tmp_path / "learns"
    command = [sys.executable, "-m", "rlkd.train", "--config", "configs/quickstart.yaml"]
    settings = (f"run.dir={tmp_path}", "run.name=learns", "run.iterations=30", "eval.every=30", "eval.prompts=64")
    code, said = on_a_terminal(*command, *settings, "log.wandb=offline")
    assert code == 0, said[-3000:]
    first, last = rows(folder)[0], rows(folder)[-1]
    assert first["iteration"] == 0 and set(first) >= {"eval/greedy", "eval/avg@k", "eval/pass@k"}
    assert last["eval/greedy"] > first["eval/greedy"] + 0.3
    assert "before" in said and "report.html" in said
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert re.search(r"loading the student +\d+\.\d s", said) and re.search(r"training \S+ 30/30 0:00:00 left", said)
    assert re.search(r" 30 +\d\.\d+ +\d\d\.\d%  .* \d\d\.\d%\r", said), said[-3000:]
