"""Every kind of distillation reaches its aim on the built-in task, in full runs of a minute, started like a user's."""

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
