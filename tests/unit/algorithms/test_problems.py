"""Contradictions between keys: one line that names both and the fix."""

import re

import pytest
from builders import config
from lines import one_line

from rlkd.config_file import ConfigError, load

LAUNCHED = (
    *("rollout.backend=vllm", "rollout.server.launch=true", "rollout.server.devices=[[1]]"),
    "trainer.accelerator=gpu",
)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("rollout.temperature=0.7",), ("teacher.temperature: ", 1.0, "rollout.temperature", 0.7)),
        (
            ("algorithm.kd.form=advantage", "algorithm.kd.estimator=k3"),
            ("algorithm.kd.estimator: ", "k3", "algorithm.kd.form", "advantage"),
        ),
        (("teacher=null",), ("teacher.backend: ", "none", "kdrl")),
        ((*LAUNCHED, "trainer.devices=2"), ("rollout.server.devices: ", "GPU 1", re.compile("trainer.devices.*2"))),
        (("rollout.prompts=3", "trainer.devices=2"), ("rollout.prompts: ", 3, 2)),
        (("trainer.updates_per_iteration=3",), ("trainer.updates_per_iteration: ", 3, 128)),
        (("rollout.backend=vllm",), ("rollout.server: ", "rollout.backend", "vllm", "rollout.server.urls", "launch")),
        (("rollout.server.launch=true",), ("rollout.backend: ", "hf", "rollout.server")),
        (
            ("model.recompute_every=3",),
            ("model.recompute_every: ", "is 3", "model.gradient_checkpointing"),
        ),
        (
            (*LAUNCHED, "model.fp32_head=true", "rollout.server.extra_args=[--hf_overrides, '{}']"),
            ("rollout.server.extra_args: ", "--hf_overrides", "model.fp32_head", "head_dtype"),
        ),
        (("trainer.micro_batch_tokens=20",), ("trainer.micro_batch_tokens: ", 20, 48)),
        (
            ("algorithm.baseline=leave_one_out",),
            ("algorithm.normalise: ", "true", "algorithm.baseline", "leave_one_out"),
        ),
        (("algorithm.overlong_cache=17",), ("algorithm.overlong_cache: ", 17, "rollout.max_tokens", 16)),
        (
            ("algorithm.surrogate=cispo", "algorithm.dual_clip=3.0"),
            ("algorithm.dual_clip: ", 3.0, "algorithm.surrogate", "cispo"),
        ),
        (
            ("algorithm.importance=off", "algorithm.importance_level=sequence"),
            ("algorithm.importance_level: ", "sequence", "algorithm.importance", "off"),
        ),
        (("algorithm.dual_clip=1.0",), ("algorithm.dual_clip: ", 1.0)),
        (("algorithm.ratio_cap=0",), ("algorithm.ratio_cap: ", 0)),
        (("algorithm.resample_rounds=0",), ("algorithm.resample_rounds: ", 0)),
        (("algorithm.entropy_coef=-1",), ("algorithm.entropy_coef: ", -1)),
        (("algorithm.kd.coef=-1",), ("algorithm.kd.coef: ", -1)),
    ],
)
def test_one_contradiction_is_one_line(overrides, parts):
    with pytest.raises(ConfigError) as error:
        load(["configs/quickstart.yaml"], overrides)
    (line,) = error.value.lines
    assert re.search(one_line(*parts), line), line


def test_the_same_set_ups_without_the_contradiction_are_fine():
    config("rollout.temperature=0.7", "teacher.temperature=0.7")
    config(*LAUNCHED)
    config("algorithm={name: grpo}", "teacher=null")
    config("algorithm.baseline=leave_one_out", "algorithm.normalise=false")
    config("algorithm.overlong_cache=16", "algorithm.mask_truncated=true", "algorithm.resample_rounds=3")
    config("algorithm.surrogate=cispo", "algorithm.ratio=sequence", "algorithm.importance_level=sequence")
