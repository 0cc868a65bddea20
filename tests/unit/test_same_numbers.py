"""benchmarks/same_numbers.py: what counts as a difference, and that it runs every shipped config."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import same_numbers

ROOT = Path(__file__).parents[2]
LINE = {"name": "a", "metrics": {"run": [{"loss": 0.1, "lr": 0.0}, {"loss": float("nan")}]}, "weights": {"w": "0f"}}


def teacher_divergence(folder, before, after):
    """Exit code of `compare` for two files with these lines."""
    paths = [folder / "before.jsonl", folder / "after.jsonl"]
    for path, lines in zip(paths, (before, after), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return same_numbers.main(["compare", *map(str, paths)])


def test_equal_lines_are_equal_in_any_order(tmp_path, capsys):
    other = LINE | {"name": "b"}
    assert teacher_divergence(tmp_path, [LINE, other], [other, LINE]) == 0
    assert capsys.readouterr().out == "a: equal\nb: equal\n"


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (LINE | {"metrics": {"run": [{"loss": 0.10000000000000002, "lr": 0.0}, LINE["metrics"]["run"][1]]}},
         "metrics run 0 loss was 0.1, is 0.10000000000000002"),
        (LINE | {"metrics": {"run": [{"loss": 0.1, "lr": -0.0}, LINE["metrics"]["run"][1]]}},
         "metrics run 0 lr was 0.0, is -0.0"),
        (LINE | {"metrics": {"run": LINE["metrics"]["run"][:1]}}, "metrics run 1 is only before"),
        (LINE | {"weights": {"w": "0e"}}, "weights w was '0f', is '0e'"),
        (LINE | {"weights": {"w": "0f", "v": "00"}}, "weights v is only after"),
        ({"name": "a", "failed": "Traceback\nKeyError: 'x'\n"}, "failed after: KeyError: 'x'"),
        ({"name": "b"}, "missing after"),
    ],
)  # fmt: skip
def test_a_difference_is_named_with_both_values(after, said, tmp_path, capsys):
    assert teacher_divergence(tmp_path, [LINE], [after]) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"a: {said}"


def test_two_failures_or_two_empty_files_are_not_equal(tmp_path):
    failed = {"name": "a", "failed": "killed"}
    assert teacher_divergence(tmp_path, [failed], [failed]) == 1
    assert teacher_divergence(tmp_path, [], []) == 1


def test_times_are_left_out():
    row = {"time/train": 1.0, "tokens_per_s": 2.0, "memory/peak": 3.0, "loss": 4.0, "completion/length": 5.0}
    assert same_numbers.stable(row) == {"loss": 4.0, "completion/length": 5.0}


def test_every_shipped_config_is_run():
    run = {file for one in same_numbers.RUNS.values() for file in one.files}
    assert run == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
