import itertools
import shutil
from pathlib import Path

import pytest
from builders import config

from rlkd.command_line import parse
from rlkd.config_file import ConfigError
from rlkd.data.chat import load_tokenizer
from rlkd.data.heldout import heldout, heldout_prompts
from rlkd.evaluate import command, main
from rlkd.run.asked_for import asked_for
from rlkd.run.evaluation import pass_at_k


@pytest.mark.parametrize("correct", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(correct, k):
    subsets = list(itertools.combinations([True] * correct + [False] * (5 - correct), k))
    assert pass_at_k(5, correct, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


@pytest.mark.parametrize(("samples", "correct", "k"), [(2, 0, 4), (2, 2, 4), (3, 1, 0)])
def test_pass_at_k_of_fewer_samples_is_refused(samples, correct, k):
    with pytest.raises(ValueError, match=f"pass@k: expected 1 ≤ k ≤ {samples} samples, got k = {k}"):
        pass_at_k(samples, correct, k)


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


def asked(words):
    return asked_for(**parse(command, words))


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
    assert "rlkd.evaluate [OPTIONS] [RUN] [key=value …]" in capsys.readouterr().out


def test_other_mistakes_are_one_line_each(finished_run, capsys):
    Path("own.jsonl").write_text('{"prompt": "reverse: abc", "answer": "cba"}\n' * 20)
    assert main(["runs/x", "data.path=own.jsonl"]) == 2
    assert main(["runs/x", "eval.path=none.jsonl", "eval.every=0"]) == 2
    assert main(["--config", QUICKSTART, "stages={a: {}}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "eval.path: expected held-out data, got nothing; set eval.path=FILE"
    assert lines[1].startswith("eval.path: none.jsonl: cannot be read: ")
    assert lines[2].startswith("stages: evaluate a single stage")
    assert len(lines) == 3
