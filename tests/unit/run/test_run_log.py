"""The console output of a run: the metrics of its algorithm, and its iterations."""

from builders import config

from rlkd.run.evaluation import Evaluate
from rlkd.run.progress import shown

SFT = ("algorithm={name: sft}", "teacher=null", "data.completion_column=answer", "data.max_completion_tokens=16")
FEW = ("run.iterations=2", "rollout.prompts=4", "eval.every=0")


def test_the_console_shows_the_metrics_of_the_algorithm():
    assert shown({"loss": 0.23354, "tokens_per_s": 1234.5, "entropy": 1.0}) == {
        "loss": "0.234",
        "tokens_per_s": "1,234",
    }
    assert list(shown({"eval/greedy": 0.5, "reward/mean": 0.25, "accuracy": 0.25})) == [
        "reward/mean",
        "accuracy",
        "eval/greedy",
    ]


def test_a_run_without_held_out_data_says_so(tmp_path, capsys):
    class Loader:
        tokenizer, iteration = None, 0

    data = tmp_path / "train.jsonl"
    for overrides, lines in (([], 1), (["eval.every=0"], 0)):
        Evaluate(config(f"data.path={data}", *overrides), Loader()).run_started(None, None)
        said = capsys.readouterr().out.splitlines()
        assert len(said) == lines
        assert all(line.startswith("eval.path: not set, so this run has no held-out accuracy; ") for line in said)
