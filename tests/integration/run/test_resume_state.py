"""State beyond weights and optimizer is resumed exactly: TAID's t, an average of the student,
adapters."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlkd.config_file import load_stages
from rlkd.run.fit import run_stages

QUICKSTART = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
SMALL = ("data.limit=16", "rollout.prompts=4", "eval.every=0", "log.progress=false", "log.rollouts_every=0")
ARMS = {
    "taid": ("algorithm={name: taid, over: 3, step: 0.2}", "data.completion_column=answer"),
    "opsd": (
        "teacher={backend: self, weights: ema, decay: 0.5}",
        "algorithm={name: opsd, context: {template: '{prompt}{context}', reference: ' hint: {text}'}}",
        "algorithm.divergence={clip: null}",
    ),
    "lora": ("model.lora={r: 4, alpha: 8}",),
}


@pytest.mark.process
@pytest.mark.parametrize("arm", ARMS)
def test_two_and_two_iterations_are_four(arm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name, iterations):
        settings = [f"run.name={name}", f"run.iterations={iterations}", "run.resume=auto", "optim.lr=0.001"]
        more = ["data.max_completion_tokens=16", *SMALL]
        assert run_stages(load_stages([QUICKSTART], [*settings, *more, *ARMS[arm]])) == 0

    run("straight", 4)
    run("parted", 2)
    run("parted", 4)
    whole, parted = (load_file(f"runs/{name}/hf/model.safetensors") for name in ("straight", "parted"))
    assert all(whole[name].equal(parted[name]) for name in whole)

    def figures(name):
        rows = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
        return [{key: row[key] for key in ("iteration", "loss", "taid/t") if key in row} for row in rows]

    assert figures("straight") == figures("parted")
    assert len(figures("parted")) == 4
