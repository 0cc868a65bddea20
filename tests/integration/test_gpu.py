"""Tests that need a CUDA device: `pytest -m gpu`."""

import json
import subprocess
import sys

import pytest
import torch

from rlkd.models.logprob_head import token_logprobs
from rlkd.models.student import load_causal_lm

pytestmark = pytest.mark.gpu


def test_the_fused_head_gives_the_cpus_numbers():
    hf = load_causal_lm("builtin:student", torch.float32, attention=None, trust_remote_code=False)
    ids = torch.randint(4, 30, (4, 20), generator=torch.Generator().manual_seed(0))
    got = {}
    for device in ("cpu", "cuda"):
        torch.nn.Module.to(hf, device)
        hidden = hf.base_model(input_ids=ids.to(device)).last_hidden_state
        got[device], _ = token_logprobs(
            hidden, hf.get_output_embeddings(), ids.to(device), temperature=0.7, config=hf.config
        )
    torch.testing.assert_close(got["cpu"], got["cuda"].cpu(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.precision=fp32",),
        ("trainer.precision=bf16", "rollout.max_mismatch=0.05"),
        (
            "rollout.backend=vllm",
            "rollout.server.launch=true",
            "rollout.server.memory=0.3",
            "rollout.max_mismatch=0.05",
        ),
        (
            *("rollout.backend=vllm", "rollout.server.launch=true", "rollout.server.memory=0.3"),
            *("rollout.server.weight_sync=ipc", "rollout.max_mismatch=0.05"),
        ),
    ],
)
def test_the_quickstart_learns_on_a_gpu(tmp_path, overrides):
    command = [sys.executable, "-m", "rlkd.train", "--config", "configs/quickstart.yaml", f"run.dir={tmp_path}"]
    subprocess.run([*command, "trainer.accelerator=gpu", *overrides], check=True, timeout=550)
    rows = [json.loads(line) for line in (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval/greedy"] > rows[0]["eval/greedy"] + 0.4
