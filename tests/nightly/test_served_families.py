"""All weights reach a vLLM server, also if transformers has renamed or fused them on loading.

pytest tests/nightly/test_served_families.py -s            one mixture of experts, with numbers
pytest tests/nightly/test_served_families.py -s --soak     all
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from processes import group_members, wait_until
from served_families import FAMILIES, trained
from transformers import AutoModelForCausalLM
from vllm_fixtures import VOCABULARY, mismatch, opened, save_model, start_server

from rlkd.distributed import RunStopped
from rlkd.models.student import Student, load_causal_lm
from rlkd.models.weights import Whole
from rlkd.servers.process import VLLMServer
from rlkd.servers.supervisor import shared_memory


@pytest.mark.server
@pytest.mark.parametrize(
    "family",
    ["mixtral", *(pytest.param(name, marks=pytest.mark.soak) for name in ("qwen3_tied", "llama", "qwen3_moe"))],
)
def test_three_updates_of_every_weight_are_served(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    path = save_model(start, tmp_path / "model")
    student = Student(load_causal_lm(path, torch.float32, attention=None, trust_remote_code=False), VOCABULARY)
    server = start_server(family.replace("_", "-"), path, tmp_path)
    try:
        server.wait_ready()
        sampler = opened(path, server)
        for version in (1, 2, 3):
            before = mismatch(sampler, student.hf, version - 1) if version > 1 else 0.0
            trained(student.hf, version)
            sampler.publish(student, version)
            after = mismatch(sampler, student.hf, version)
            print(f"{family}, update {version}: mismatch/max {after:.1e}", flush=True)
            assert after < 1e-4
            assert before < 1e-4
        assert mismatch(sampler, start, 3) > 1.0, "otherwise this test could not see old weights"
        weights = dict(student.checkpoint_weights(torch.float32))
        expert = next((name for name in weights if ".experts.1." in name), None)
        if expert is not None:
            with pytest.raises(RunStopped, match="a weight update failed"):
                sampler.publish(Whole({name: value for name, value in weights.items() if name != expert}), 4)
            assert "lacks some of the weights of 1 layers, e.g. model.layers.0." in server.log.read_text()
            sampler.publish(Whole(weights), 5)
            assert mismatch(sampler, student.hf, 5) < 1e-4
        sampler.close()
        assert_its_death_is_whole_and_explained(server)
    finally:
        server.stop()


def assert_its_death_is_whole_and_explained(server: VLLMServer) -> None:
    """Its first process is killed: the others end, and one line reports what happened and where to look."""
    server.check_alive()
    held = shared_memory(server.pid)
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not group_members(server.pid) and not group_members(server.supervisor_pid), 15.0)
    assert held and not [path for path in held if path.exists()]
    wait_until(lambda: server.ended, 5.0)  # a process has no command line a moment before its exit code can be read
    with pytest.raises(RuntimeError) as death:
        server.check_alive()
    first_line = str(death.value).splitlines()[0]
    assert "137" in first_line and str(server.log) in first_line
