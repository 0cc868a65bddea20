"""`model.fp32_head`: in bf16, sampler and trainer differ less: the sampler in this process, and a real server."""

import pytest
import torch
from builders import Captured, config, real_batch
from vllm_fixtures import KEY, save_model, tiny_model

from rlkd.config_file import load
from rlkd.generation.vllm import policy_role
from rlkd.pipeline.build import build_reference, build_sampler
from rlkd.servers.process import VLLMServer, cpu_cores
from rlkd.teachers.parity import sampler_gap
from rlkd.types import Prompt

SETTINGS = ("trainer.precision=bf16", "teacher=null", "algorithm={name: grpo}", "rollout.max_tokens=32")
PROMPTS = [Prompt(id=str(i), messages=(), token_ids=(2 + i, 30 - i, 40)) for i in range(16)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny model with logits around 20, like those of large ones, where bf16 has a spacing of 0.125."""
    model = tiny_model(0, tied=False)
    with torch.no_grad():  # a constant part of the hidden states, which the softmax does not see
        model.model.embed_tokens.weight[:, 0] = 4.0
        model.lm_head.weight[:, 0] = 14.0
        assert 15 < float(model(torch.arange(2, 60)[None]).logits.mean()) < 25
    return save_model(model, tmp_path_factory.mktemp("policy"))


def test_the_sampler_in_this_process_agrees_better_with_an_fp32_head(path):
    gaps = []
    for flag in ("false", "true"):
        overrides = (f"model.path={path}", f"model.fp32_head={flag}", *SETTINGS)
        settings = load(["configs/quickstart.yaml"], overrides).config
        sampler, reference = build_sampler(settings), build_reference(settings)
        sampler.open()
        sampler.keep_loaded()
        reference.open()
        gaps.append(sampler_gap(settings, PROMPTS, sampler, reference)[1])
    print(f"mismatch/mean in bf16: {gaps[0]:.5f} without model.fp32_head, {gaps[1]:.5f} with it")
    assert 0 < gaps[1] < 0.6 * gaps[0]


def test_the_trainer_agrees_better_with_the_sampler_with_an_fp32_head(path):
    gaps = []
    for flag in ("false", "true"):
        plain = ("data.chat_template=false", f"model.path={path}", f"model.fp32_head={flag}")
        settings = config(*plain, *SETTINGS, group_size=None)
        gaps.append(Captured(settings, real_batch(settings)).row["mismatch/mean"])
    print(f"mismatch/mean in bf16: {gaps[0]:.5f} without model.fp32_head, {gaps[1]:.5f} with it")
    assert 0 < gaps[1] < 0.6 * gaps[0]


def gap(path, fp32_head, logs):
    """The mean difference in nats between the log-probs of a bf16 server and those of a bf16 model here."""
    overrides = [f"model.path={path}", f"model.fp32_head={fp32_head}", *SETTINGS]
    overrides += ["rollout.server.launch=true", "rollout.server.dtype=bfloat16"]
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
        return sampler_gap(settings, PROMPTS, sampler, reference)[1]
    finally:
        if sampler is not None:
            sampler.close()
        server.stop()


@pytest.mark.server
@pytest.mark.soak
def test_a_bf16_server_and_a_bf16_trainer_agree_better_with_an_fp32_head(path, tmp_path):
    without, with_it = (gap(path, flag, tmp_path / flag) for flag in ("false", "true"))
    print(f"mismatch/mean in bf16: {without:.5f} without model.fp32_head, {with_it:.5f} with it")
    assert 0 < with_it < 0.7 * without
