"""Contradictions between keys: one line that names both and the fix."""

import pytest
from builders import config

from rlkd.config_file import ConfigError, load

LAUNCHED = (
    *("rollout.backend=vllm", "rollout.server.launch=true", "rollout.server.devices=[[1]]"),
    "trainer.accelerator=gpu",
)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("rollout.temperature=0.7",), "teacher.temperature: is 1.0, but rollout.temperature is 0.7"),
        (
            ("algorithm.kd.form=advantage", "algorithm.kd.estimator=k3"),
            "algorithm.kd.estimator: is k3, but algorithm.kd.form: advantage",
        ),
        (("teacher=null",), "teacher.backend: is none, but algorithm.name kdrl imitates a teacher"),
        (
            (*LAUNCHED, "trainer.devices=2"),
            "rollout.server.devices: names GPU 1, on which trainer.devices = 2 trains",
        ),
        (("rollout.prompts=3", "trainer.devices=2"), "rollout.prompts: is 3, not divisible by"),
        (("trainer.updates_per_iteration=3",), "trainer.updates_per_iteration: is 3, which does not divide the 128"),
        (("rollout.backend=vllm",), "rollout.server: rollout.backend is vllm: set either rollout.server.urls"),
        (("rollout.server.launch=true",), "rollout.backend: is hf, but rollout.server names servers"),
        (("trainer.micro_batch_tokens=20",), "trainer.micro_batch_tokens: is 20, less than one sequence"),
        (
            ("algorithm.baseline=leave_one_out",),
            "algorithm.normalise: is true, but algorithm.baseline is leave_one_out",
        ),
        (("algorithm.overlong_cache=17",), "algorithm.overlong_cache: is 17, more than rollout.max_tokens = 16"),
        (
            ("algorithm.surrogate=cispo", "algorithm.dual_clip=3.0"),
            "algorithm.dual_clip: is 3.0, but algorithm.surrogate is cispo",
        ),
        (
            ("algorithm.importance=off", "algorithm.importance_level=sequence"),
            "algorithm.importance_level: is sequence, but algorithm.importance is off",
        ),
        (("algorithm.dual_clip=1.0",), "algorithm.dual_clip: expected a number > 1, or null, got 1.0"),
        (("algorithm.ratio_cap=0",), "algorithm.ratio_cap: expected a number > 0, got 0"),
        (("algorithm.resample_rounds=0",), "algorithm.resample_rounds: expected an integer >= 1, got 0"),
        (("algorithm.entropy_coef=-1",), "algorithm.entropy_coef: expected a number >= 0, got -1"),
        (("algorithm.kd.coef=-1",), "algorithm.kd.coef: expected a number"),
    ],
)
def test_one_contradiction_is_one_line(overrides, line):
    with pytest.raises(ConfigError) as error:
        load(["configs/quickstart.yaml"], overrides)
    assert len(error.value.lines) == 1
    assert line in error.value.lines[0]


def test_the_same_set_ups_without_the_contradiction_are_fine():
    config("rollout.temperature=0.7", "teacher.temperature=0.7")
    config(*LAUNCHED)
    config("algorithm={name: grpo}", "teacher=null")
    config("algorithm.baseline=leave_one_out", "algorithm.normalise=false")
    config("algorithm.overlong_cache=16", "algorithm.mask_truncated=true", "algorithm.resample_rounds=3")
    config("algorithm.surrogate=cispo", "algorithm.ratio=sequence", "algorithm.importance_level=sequence")
