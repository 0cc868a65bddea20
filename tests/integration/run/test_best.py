"""The student of the best evaluation, and runs that end when evaluations get no better."""

import json
from pathlib import Path

import pytest
import yaml
from builders import config
from lines import assert_lines
from runs import train, train_ranks
from safetensors.torch import load_file

from rlkd.builtin import resolve
from rlkd.config.stages import finished
from rlkd.config_file import ConfigError
from rlkd.evaluate import main
from rlkd.storage.run_folder import export_record, exported

QUICKSTART = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
FEW = (
    *("algorithm={name: sft, group_size: 1}", "data.completion_column=answer", "data.max_completion_tokens=16"),
    *("rollout.prompts=4", "teacher=null", "eval={every: 1, prompts: 64, samples: 1}"),
    *("checkpoint={best: eval/greedy, every: 1}", "run.name=x", "run.iterations=9"),
)
WORSE = ("optim.lr=0.05",)
"""After one step, the student has forgotten everything."""


def arguments(folder, *overrides):
    return ["--config", QUICKSTART, *FEW, f"run.dir={folder}", *overrides]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def gave_up(tmp_path_factory):
    """A run of nine iterations that gets worse, and what it printed."""
    folder = tmp_path_factory.mktemp("gave_up")
    printed = train(arguments(folder, *WORSE, "run.stop_after=2"), folder / "out")
    return folder / "x", printed


def test_a_run_that_gets_worse_keeps_its_start_and_ends(gave_up):
    folder, printed = gave_up
    accuracy = [row["eval/greedy"] for row in rows(folder)]
    assert len(accuracy) == 3 and accuracy[0] > max(accuracy[1:]), "nine iterations were asked for"
    assert export_record(folder / "best") == {"iteration": 0, "eval/greedy": accuracy[0]}
    assert weights(folder / "best") == weights(Path(resolve("builtin:student")))
    assert exported(folder) == 2 and weights(folder / "hf") != weights(folder / "best")
    assert f"run.stop_after: eval/greedy was not above its {accuracy[0]:.4g} of iteration 0 in the last 2 " in printed
    assert f"best:        {folder / 'best'}" in printed and (folder / "report.html").exists()


def test_it_ends_where_a_resumed_one_ends_and_goes_on_only_if_it_is_asked_to(gave_up, tmp_path):
    whole, _ = gave_up
    folder = tmp_path / "x"
    train(arguments(tmp_path, *WORSE, "run.stop_after=2", "run.iterations=1"), tmp_path / "out")
    again = arguments(tmp_path, *WORSE, "run.stop_after=2", "run.resume=auto")
    train(again, tmp_path / "out")
    assert [row["eval/greedy"] for row in rows(folder)] == [row["eval/greedy"] for row in rows(whole)]
    assert export_record(folder / "best") == export_record(whole / "best") and exported(folder) == 2
    train(again, tmp_path / "out")
    assert len(rows(folder)) == 3, "it has ended"
    train([*again, "run.stop_after=3"], tmp_path / "out")
    assert len(rows(folder)) == 4


def test_the_best_student_is_the_one_that_was_measured(tmp_path, capsys):
    kdrl = ("algorithm={name: kdrl, group_size: 8}", "teacher={backend: local, path: 'builtin:teacher'}")
    kdrl = (*kdrl, "data.completion_column=null", "rollout.prompts=16")
    train(arguments(tmp_path, *kdrl, "optim.lr=3.0e-3", "run.iterations=6"), tmp_path / "out")
    folder = tmp_path / "x"
    accuracy = [row["eval/greedy"] for row in rows(folder)]
    best = export_record(folder / "best")
    assert len(set(accuracy)) > 2 and best == {"iteration": accuracy.index(max(accuracy)), "eval/greedy": max(accuracy)}
    assert main([str(folder / "best")]) == 0
    assert json.loads(capsys.readouterr().out)["eval/greedy"] == max(accuracy)
    assert (folder / "evaluation-best" / "summary.json").exists()


def test_all_ranks_end_together_and_the_next_stage_begins(tmp_path):
    stages = "stages={one: {run: {stop_after: 1}}, two: {run: {iterations: 1}, optim: {lr: 1.0e-6}}}"
    train_ranks(2, arguments(tmp_path, *WORSE, stages, "trainer.devices=2"), tmp_path / "out")
    assert [row["iteration"] for row in rows(tmp_path / "x" / "one")] == [0, 1]
    assert [row["iteration"] for row in rows(tmp_path / "x" / "two")] == [0, 1]
    assert yaml.safe_load((tmp_path / "x/two/config.yaml").read_text())["model"]["path"] == f"{tmp_path}/x/one/hf"


def test_a_stage_that_gave_up_is_over_until_it_may_wait_longer(tmp_path):
    few = (f"run.dir={tmp_path}", "run.name=x", "checkpoint.best=eval/greedy")
    folder = tmp_path / "x"
    (folder / "hf").mkdir(parents=True)
    (folder / "report.html").write_text("")
    (folder / "hf" / "rlkd.json").write_text(json.dumps({"iteration": 5, "waited": 2}))
    for waits, over in (("2", True), ("1", True), ("3", False), ("null", False)):
        assert finished(config(*few, f"run.stop_after={waits}")) is over


def test_what_cannot_be_best_is_one_line():
    for overrides, line in {
        ("run.stop_after=2",): ("command line: run.stop_after: is 2", "checkpoint.best"),
        ("checkpoint.best=eval/greedy", "eval.every=0"): ("command line: checkpoint.best: ", "eval.every is 0"),
        ("checkpoint.best=eval/greedy", "data.path=own.jsonl"): (
            "command line: checkpoint.best: ",
            "nothing is held out",
        ),
    }.items():
        with pytest.raises(ConfigError) as caught:
            config(*overrides)
        assert_lines(caught.value.lines, line)
