import shutil
from pathlib import Path

import pytest
from builders import config

from rlkd.command_line import parse
from rlkd.config_file import ConfigError
from rlkd.data.chat import load_tokenizer
from rlkd.data.heldout import heldout, heldout_prompts
from rlkd.evaluate import command, main
from rlkd.planning.preflight import check_evaluation
from rlkd.run.asked_for import asked_for, benchmarks, out_folder


def test_the_built_in_task_holds_out_its_own_words():
    settings = config("eval.prompts=20")
    prompts = heldout_prompts(settings, load_tokenizer("builtin:student", False))
    assert len(prompts) == 20 and all(p.id.startswith("heldout") for p in prompts)


def test_own_data_is_held_out_only_where_the_config_says(tmp_path):
    assert heldout(config("data.path=train.jsonl")) is None
    named = heldout(config("data.path=train.jsonl", "data.limit=3", "eval.path=test.jsonl", "eval.split=validation"))
    assert (named.path, named.split, named.limit) == ("test.jsonl", "validation", 128)


PAIRS = ("data.completion_column=answer", "data.rejected_column=wrong", "data.privileged_column=hint")


def test_what_is_only_trained_on_need_not_be_in_the_held_out_data(tmp_path):
    held_out = tmp_path / "test.jsonl"
    held_out.write_text('{"prompt": "reverse: abc", "answer": "cba"}\n')
    settings = config("data.path=train.jsonl", f"eval.path={held_out}", *PAIRS)
    (prompt,) = heldout_prompts(settings, load_tokenizer("builtin:student", False))
    assert (prompt.answer, prompt.completion, prompt.rejected, prompt.privileged) == ("cba", None, None, None)


QUICKSTART = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
FEW = ("eval.prompts=8", "eval.samples=2")


def by_name(words):
    given = parse(command, words)
    return benchmarks(asked_for(given["config"], given["words"], given["data"]), given["data"])


def asked(words):
    (only,) = by_name(words).values()
    return only


def test_a_run_is_evaluated_by_its_own_student(finished_run):
    for words in (
        ["runs/x"],
        ["--config", "runs/x"],
        ["--config", "runs/x/config.yaml"],
        ["--config=./runs/x/config.yaml", *FEW],
        ["runs/x/"],
    ):
        assert Path(asked(words).model.path) == finished_run / "hf"
    assert asked(["runs/x", "eval.prompts=9"]).eval.prompts == 9


def test_a_model_that_is_named_wins_over_the_runs_own_student(finished_run):
    Path("other.yaml").write_text("model: {path: somewhere}")
    assert asked(["runs/x", "model.path=builtin:student"]).model.path == "builtin:student"
    assert asked(["runs/x", "--config", "other.yaml"]).model.path == "somewhere"
    assert asked(["--config", "other.yaml", "runs/x"]).model.path == "somewhere", "a run comes first"
    assert asked(["--config", QUICKSTART]).model.path == "builtin:student", "not the file of a run"
    Path("config.yaml").write_text(Path(QUICKSTART).read_text())
    assert asked(["--config", "config.yaml"]).model.path == "builtin:student", "neither is this one"


def test_a_run_without_a_student_is_one_line_and_its_initial_model_is_not_evaluated(finished_run, capsys):
    shutil.rmtree(finished_run / "hf")
    Path(finished_run, "checkpoints", "iteration-000050").mkdir(parents=True)
    assert main(["runs/x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "runs/x has no exported student (runs/x/hf) yet; its last checkpoint is of iteration 50 of 200: finish its "
        "training with run.resume=auto, or set the model to evaluate with model.path=FOLDER"
    )
    with pytest.raises(ConfigError, match="run.resume=auto and checkpoint.export=true"):
        asked(["runs/x", "checkpoint.export=false"])


def test_its_help_shows_how_to_call_it(capsys):
    assert main(["--help"]) == 0
    assert "rlkd.evaluate [OPTIONS] [RUN|MODEL] [key=value …]" in capsys.readouterr().out


def test_other_mistakes_are_one_line_each(finished_run, capsys):
    Path("own.jsonl").write_text('{"prompt": "reverse: abc", "answer": "cba"}\n' * 20)
    assert main(["runs/x", "data.path=own.jsonl"]) == 2
    assert main(["runs/x", "eval.path=none.jsonl", "eval.every=0"]) == 2
    assert main(["--config", QUICKSTART, "stages={a: {}}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "eval.path: expected held-out data, got nothing; set eval.path=FILE, or --data FILE"
    assert lines[1].startswith("eval.path: none.jsonl: cannot be read: ")
    assert lines[2].startswith("stages: evaluate a single stage")
    assert len(lines) == 3


def test_a_model_needs_neither_an_algorithm_nor_training_data():
    """Only what it is evaluated on. With a benchmark that names its form, the reward is the one that can judge it."""
    only = asked(["model.path=builtin:student", "--data", "gsm8k:test.jsonl"])
    assert (only.eval.path, only.reward.functions[0].name) == ("gsm8k:test.jsonl", "math")
    only = asked(["model.path=builtin:student", "eval.path=test.jsonl"])
    assert (only.eval.path, only.reward.functions[0].name) == ("test.jsonl", "exact_match")
    chosen = "reward.functions=[{name: exact_match, options: {after: '#### '}}]"
    assert asked(["model.path=m", "--data", "gsm8k:a", chosen]).reward.functions[0].name == "exact_match"
    with pytest.raises(ConfigError, match="--config: missing"):
        asked(["--data", "gsm8k:test.jsonl"])
    with pytest.raises(ConfigError, match="data.path"):
        asked(["model.path=builtin:student"])


def test_the_training_data_of_a_run_may_be_gone(finished_run, capsys):
    Path("held_out.jsonl").write_text('{"prompt": "reverse: abc", "answer": "cba"}\n')
    gone = ["data.path=gone.jsonl", "data.completion_column=answer", "algorithm={name: sft}", "teacher=null"]
    only = asked(["runs/x", *gone, "eval.path=held_out.jsonl"])
    assert check_evaluation({"held_out": only}) == []


def test_each_file_is_a_benchmark_with_a_name_of_its_own(finished_run):
    data = [
        word
        for path in ("gsm8k:a.jsonl", "b/own.jsonl", "own.jsonl", "b/own.jsonl", "math-500:c d/e.jsonl")
        for word in ("--data", path)
    ]
    found = by_name(["runs/x", "eval.prompts=3", *data])
    assert list(found) == ["gsm8k", "own", "own-2", "own-3", "math-500"]
    assert [one.eval.path for one in found.values()] == data[1::2]
    assert {one.model.path for one in found.values()} == {"runs/x/hf"}
    assert list(by_name(["runs/x"])) == ["reverse"]


def test_another_file_is_whole_even_if_the_run_held_out_a_share_of_its_data(finished_run):
    Path("share.yaml").write_text("eval: {fraction: 0.5}")
    share = ["runs/x", "--config", "share.yaml"]
    assert asked(share).eval.fraction == 0.5
    assert asked([*share, "--data", "own.jsonl"]).eval.fraction is None


def test_a_student_is_not_evaluated_on_what_it_was_trained_on_by_another_share(finished_run):
    for words in (["eval.fraction=0.5"], ["eval={fraction_seed: 3}"], ["eval.fraction=null"]):
        for student in ("runs/x", "runs/x/hf"):
            with pytest.raises(ConfigError, match="^eval.fraction: decides what a run was trained on"):
                asked([student, *words])
    assert asked(["runs/x", "eval.fraction=0.5", "model.path=builtin:student"]).eval.fraction == 0.5


def test_a_folder_is_a_run_or_a_model(finished_run):
    shutil.copytree(finished_run / "hf", finished_run / "best")
    assert asked(["runs/x/best"]).model.path == "runs/x/best" and asked(["runs/x/best"]).run.name == "x"
    (finished_run / "best" / "rlkd.json").unlink()
    assert asked(["runs/x/best", "eval.path=own.jsonl"]).run.name == "run", "any other model has no run"
    shutil.copytree(finished_run / "hf", "model")
    assert asked(["model", "--config", QUICKSTART]).model.path == "model"


def test_where_an_evaluation_is_kept(finished_run):
    shutil.copytree(finished_run / "hf", finished_run / "best")
    assert out_folder("runs/x/hf") == Path("runs/x/evaluation")
    assert out_folder("runs/x/best") == Path("runs/x/evaluation-best")
    assert out_folder("builtin:student") == Path("evaluation/builtin-student")
    assert out_folder("org/some-model") == Path("evaluation/some-model")


def test_more_than_all_samples_is_one_line_before_anything_is_loaded(finished_run, capsys):
    for wrong in ("1,3", "0", "1,x", ""):
        assert main(["runs/x", *FEW, "--k", wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("command line: --k: expected numbers from 1 to eval.samples = 2, such as 1,2, got ")
