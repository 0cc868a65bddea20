"""A data source from a user's file whose rows differ between the ranks, which would train on each other's prompts."""

from pathlib import Path

import pytest
from runs import start_ranks

SOURCE = """
import os

def words(split):
    words = ["abc", "dead", "face", "head"]
    yield from ({"prompt": f"reverse: {word}", "answer": word[::-1]} for word in ORDER)
"""
CONFIG = """\
run: {name: own, iterations: 1}
model: {path: builtin:student}
data: {path: "own_words:words", max_prompt_tokens: 32}
rollout: {prompts: 2, max_tokens: 8}
algorithm: {name: grpo, group_size: 2}
trainer: {accelerator: cpu, devices: 2}
log: {progress: false}
"""


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize(
    ("order", "code"), [("words", 0), ("words[:: 1 - 2 * int(os.environ['RANK'])]", 1)], ids=["same", "other"]
)
def test_rows_that_differ_between_ranks_end_the_run_with_one_line(tmp_path, order, code):
    Path(tmp_path, "own_words.py").write_text(SOURCE.replace("ORDER", order))
    Path(tmp_path, "own.yaml").write_text(CONFIG)
    runs = start_ranks(2, ["--config", "own.yaml"], tmp_path / "logs", cwd=tmp_path)
    try:
        for run in runs:
            assert run.wait(120) == code, run.err.read_text()[-2000:]
    finally:
        for run in runs:
            run.kill()
    lines = [line for line in runs[0].err.read_text().splitlines() if line.startswith("stopped: ")]
    assert len(lines) == code and all("data.path" in line and "own_words:words" in line for line in lines)
