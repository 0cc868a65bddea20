"""The files and commands of docs/your_own.md, taken from the page."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ENV, ROOT, train

pytestmark = [pytest.mark.process, pytest.mark.long]
PAGE = (ROOT / "docs" / "your_own.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of the page in that language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A directory with the page's files."""
    files = {"words.jsonl": blocks("json")[0], "my_rewards.py": blocks("python")[0], "own.yaml": blocks("yaml")[0]}
    for name, text in files.items():
        assert f"`{name}`" in PAGE
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def rows(folder: Path, name: str = "own") -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def test_the_example_trains_resumes_and_is_evaluated(folder):
    first, second, evaluate = (shlex.split(line) for line in blocks("bash")[0].splitlines())
    assert first[:3] == second[:3] == ["python", "-m", "rlkd.train"] and evaluate[2] == "rlkd.evaluate"
    train(first[3:], folder / "out", cwd=folder)
    assert [row["iteration"] for row in rows(folder)] == [0, 1, 2]
    train(second[3:], folder / "out2", cwd=folder)
    assert [row["iteration"] for row in rows(folder)] == [0, 1, 2, 3]
    assert "eval/greedy" in rows(folder)[-1] and rows(folder)[-1]["reward/errors"] == 0
    dumps = folder.glob("runs/own/rollouts/*.jsonl")
    dumped = [json.loads(line) for path in dumps for line in path.read_text().splitlines()]
    assert {line["answer"] for line in dumped} == {"cba", "daed", "ecaf", "ihgb"}
    for line in dumped:  # the reward is the page's function of what was written
        said = line["completion"].removesuffix("<eos>")
        right = sum(a == b for a, b in zip(said, line["answer"], strict=False))
        bonus = 0.5 * (1 if line["answer"] == "cba" else 2) if said == line["answer"] else 0.0
        assert line["reward"] == pytest.approx(right / max(len(said), len(line["answer"])) + bonus)
    done = subprocess.run(
        [sys.executable, *evaluate[1:]],
        cwd=folder,
        env=ENV | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "runs/own/hf, after 3 iterations" in done.stderr
    assert json.loads(done.stdout)["eval/greedy"] == rows(folder)[-1]["eval/greedy"]
    check_the_page_on_exports(folder)


def check_the_page_on_exports(folder):
    """Its commands, but for the push, which needs a hub (test_push.py)."""
    page = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")
    two, many = (shlex.split(line) for line in re.findall(r"^rlkd generate .*$", page, re.MULTILINE))
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    printed = []
    for command in (["-m", *two], ["-m", *many], ["-c", code]):
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=ENV | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(done.stdout)
    assert printed[0].count("--- prompt ") == 2 and printed[1] == ""
    assert len((folder / "completions.jsonl").read_text().splitlines()) == 16
    assert "Name: reward/mean" in printed[2] and "0.0003" in printed[2]
    card = (folder / "runs" / "own" / "hf" / "README.md").read_text()
    assert "`words.jsonl`, split test: n = 4 prompts." in card and "| before | after 3 iterations |" in card


def test_an_algorithm_from_a_file(folder):
    (folder / "my_algorithm.py").write_text(blocks("python")[-1])
    named = re.search(r"`algorithm: (\{name: \"my_algorithm:Scaled\".*?\})`", PAGE)[1]
    scaled = ["--config", "own.yaml", f"algorithm={named}", "run.iterations=1", "eval.every=0", "run.name=scaled"]
    train(scaled, folder / "out", cwd=folder)
    plain = ["--config", "own.yaml", "run.iterations=1", "eval.every=0", "run.name=plain", "algorithm.group_size=8"]
    train(plain, folder / "out", cwd=folder)

    def advantages(name):
        lines = [json.loads(line) for line in (folder / f"runs/{name}/rollouts/000001-rank0.jsonl").open()]
        return [line["advantage"] for line in lines]

    assert advantages("scaled") == pytest.approx([2 * value for value in advantages("plain")])
    assert any(advantages("scaled"))
