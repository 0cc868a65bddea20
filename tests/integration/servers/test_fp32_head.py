"""`model.fp32_head`: sampler and trainer differ less in bf16, with a real server on the other side."""

import pytest
from vllm_fixtures import KEY, save_model, tiny_model

from rlkd.config_file import load
from rlkd.generation.vllm import policy_role
from rlkd.pipeline.build import build_reference, build_sampler
from rlkd.servers.process import VLLMServer, cpu_cores
from rlkd.teachers.parity import sampler_gap
from rlkd.types import Prompt

pytestmark = [pytest.mark.server, pytest.mark.soak]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tiny_model(0), tmp_path_factory.mktemp("policy"))


def gap(path, fp32_head, logs):
    """The mean difference in nats between the log-probs of a bf16 server and those of a bf16 model here."""
    overrides = [f"model.path={path}", f"model.fp32_head={fp32_head}", "trainer.precision=bf16", "teacher=null"]
    overrides += ["rollout.server.launch=true", "rollout.server.dtype=bfloat16", "rollout.max_tokens=32"]
    overrides += ["algorithm={name: grpo, group_size: 8}", "rollout.max_mismatch=1.0"]
    settings = load(["configs/quickstart_vllm.yaml"], overrides).config
    server = VLLMServer(policy_role(settings), settings.rollout.server, key=KEY, log_dir=logs, cores=cpu_cores(0, 1))
    sampler, reference = None, build_reference(settings)
    try:
        server.wait_ready()
        running = ("rollout.server.launch=false", f"rollout.server.urls=[{server.url}]")
        settings = load(["configs/quickstart_vllm.yaml"], [*overrides, *running]).config
        sampler = build_sampler(settings)
        sampler.open()
        sampler.keep_loaded()
        reference.open()
        prompts = [Prompt(id=str(i), messages=(), token_ids=(2 + i, 30 - i, 40)) for i in range(16)]
        return sampler_gap(settings, prompts, sampler, reference)[1]
    finally:
        if sampler is not None:
            sampler.close()
        server.stop()


def test_a_bf16_server_and_a_bf16_trainer_agree_better_with_an_fp32_head(path, tmp_path):
    without, with_it = (gap(path, flag, tmp_path / flag) for flag in ("false", "true"))
    print(f"mismatch/mean in bf16: {without:.5f} without model.fp32_head, {with_it:.5f} with it")
    assert 0 < with_it < 0.7 * without
