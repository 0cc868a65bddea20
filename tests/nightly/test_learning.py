"""Every kind of method reaches its aim on the built-in task, in full runs of a minute, started like a user's.

GRPO and KDRL have the quickstart's test. The tables with three seeds are in benchmarks/learning.py and thinktuning.py.
"""

import json
import math

import pytest
import runs
from run_results import rows

REVERSE_KL = "divergence: {kind: reverse_kl, clip: null}"


HINT = "context: {template: '{prompt}{context}', reference: ' hint: {text}'}"


METHODS = {
    "opd": ("algorithm={name: opd, group_size: 8}",),
    "opsd": (
        f"algorithm={{name: opsd, group_size: 8, {REVERSE_KL}, {HINT}}}",
        *("teacher={backend: self, weights: fixed}", "data.privileged_column=privileged"),
    ),
    "sft": (
        "algorithm={name: sft}",
        *("teacher=null", "data.completion_column=answer", "data.max_completion_tokens=16"),
    ),
}


def train(folder, base, *settings):
    where = (f"run.dir={folder.parent}", f"run.name={folder.name}")
    runs.train(["--config", f"configs/{base}.yaml", *where, *settings], folder.parent)
    return rows(folder)


@pytest.mark.parametrize("method", METHODS)
def test_held_out_accuracy_rises(tmp_path, method):
    settings = ("run.iterations=20", "eval.every=20", "eval.prompts=64", "log.rollouts_every=0")
    first, *_, last = train(tmp_path / method, "quickstart", *METHODS[method], *settings)
    assert first["eval/greedy"] < 0.2
    assert last["eval/greedy"] > first["eval/greedy"] + 0.3


def test_a_reflection_that_only_the_teacher_writes_becomes_the_students_habit(tmp_path):
    settings = ("optim.lr=2.0e-4", "run.iterations=25", "rollout.prompts=8", "eval.every=0", "log.rollouts_every=24")
    figures = train(tmp_path / "habit", "thinktuning_tiny", *settings)
    assert [row["iteration"] for row in figures] == list(range(1, 26))
    for row in figures[:2]:
        assert row["guided/fraction"] == 0.25 and row["guided/reward"] > row["guided/plain_reward"]
        assert math.isfinite(row["loss/guided"]) and row["grad_norm"] > 0
    shares = []
    for iteration in (1, 25):
        (dump,) = (tmp_path / "habit" / "rollouts").glob(f"{iteration:06d}-*")
        lines = [json.loads(line) for line in dump.read_text().splitlines()]
        unaided = [line["completion"] for line in lines if not line["segments"]]
        shares.append(sum("wait" in completion for completion in unaided) / len(unaided))
    assert shares[0] == 0 and shares[1] > 0.2, shares
