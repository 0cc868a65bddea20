"""The files and commands of docs/your_own.md, taken from the page."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from builders import local_scorer
from runs import ENV, ROOT, start, train

from rlkd.data.chat import load_tokenizer
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Signal

pytestmark = [pytest.mark.process, pytest.mark.long]
PAGE = (ROOT / "docs" / "your_own.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of the page in that language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def block(language: str, part: str) -> str:
    """The block of the page in which `part` stands."""
    (found,) = [text for text in blocks(language) if part in text]
    return found


@pytest.fixture
def folder(tmp_path) -> Path:
    """A directory with the page's files."""
    files = {
        "words.jsonl": blocks("json")[0],
        "my_rewards.py": blocks("python")[0],
        "own.yaml": blocks("yaml")[0],
        "my_algorithm.py": block("python", "class RAFT"),
        "my_data.py": block("python", "def reversals"),
        "my_teacher.py": block("python", "class Uniform"),
        "raft.yaml": block("yaml", "name: raft"),
    }
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


def test_raft_on_its_own_data_trains_resumes_and_is_evaluated(folder):
    first, second, evaluate = (shlex.split(line) for line in block("bash", "runs/raft").splitlines())
    train(first[3:], folder / "out", cwd=folder)
    train(second[3:], folder / "out2", cwd=folder)
    assert [row["iteration"] for row in rows(folder, "raft")] == [0, 1, 2, 3]
    groups: dict[tuple[int, str], list[dict]] = {}
    for path in folder.glob("runs/raft/rollouts/*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            groups.setdefault((line["iteration"], line["id"]), []).append(line)
    assert len(groups) == 3 * 4 and all(len(group) == 4 for group in groups.values())
    for group in groups.values():
        best = max(line["reward"] for line in group)
        imitated = [line["reward"] for line in group if line["advantage"]]
        assert imitated == ([best] if best >= 0.1 else [])
    imitated = [line for group in groups.values() for line in group if line["advantage"]]
    before, after = (mean_logprob(path, imitated) for path in ("builtin:student", str(folder / "runs/raft/hf")))
    assert after > before + 0.01, (before, after)
    run = start(evaluate[3:], folder / "evaluation", cwd=folder, main="rlkd.evaluate:main")
    assert run.wait(120) == 0, run.err.read_text()[-3000:]
    assert "runs/raft/hf, after 3 iterations; data my_data:reversals, split test" in run.err.read_text()
    assert json.loads(run.out.read_text())["eval/greedy"] == rows(folder, "raft")[-1]["eval/greedy"]


def mean_logprob(path: str, lines: list[dict]) -> float:
    """What a model gives the tokens of dumped completions, on average."""
    scorer = local_scorer(path)
    tokenizer = load_tokenizer(path, False)
    prompts = [tokenizer(line["prompt"], add_special_tokens=False).input_ids for line in lines]
    questions = [ScoreRequest(p, line["token_ids"]) for p, line in zip(prompts, lines, strict=True)]
    values = [value for scores in scorer.score(questions, Signal()) for value in scores.logprobs]
    return sum(values) / len(values)


def test_a_teacher_from_a_file_and_its_options_belong_to_the_run(folder):
    command = shlex.split(block("bash", "uniform"))[3:]
    train(command, folder / "out", cwd=folder)
    dumped = [json.loads(line) for line in (folder / "runs/uniform/rollouts/000001-rank0.jsonl").open()]
    assert {value for line in dumped for value in line["teacher_logprobs"]} == {float(f"{-math.log(56):.4g}")}
    again = ["--config", "runs/uniform/config.yaml", "run.resume=auto", "run.iterations=3"]
    changed = start([*again, "teacher.tokens=57"], folder / "changed", cwd=folder)
    assert changed.wait(120) == 2 and "teacher.tokens: expected 56" in changed.err.read_text()
    train(again, folder / "again", cwd=folder)
    assert [row["iteration"] for row in rows(folder, "uniform")] == [0, 1, 2, 3]


def test_an_algorithm_from_a_file(folder):
    (folder / "my_grpo.py").write_text(block("python", "class Scaled"))
    named = re.search(r"`algorithm: (\{name: \"my_grpo:Scaled\".*?\})`", PAGE)[1]
    scaled = ["--config", "own.yaml", f"algorithm={named}", "run.iterations=1", "eval.every=0", "run.name=scaled"]
    train(scaled, folder / "out", cwd=folder)
    plain = ["--config", "own.yaml", "run.iterations=1", "eval.every=0", "run.name=plain", "algorithm.group_size=8"]
    train(plain, folder / "out", cwd=folder)

    def advantages(name):
        lines = [json.loads(line) for line in (folder / f"runs/{name}/rollouts/000001-rank0.jsonl").open()]
        return [line["advantage"] for line in lines]

    assert advantages("scaled") == pytest.approx([2 * value for value in advantages("plain")])
    assert any(advantages("scaled"))
