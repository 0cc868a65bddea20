"""Two servers on one GPU: vLLM counts what a neighbour allocates while it starts as its own."""

import time

import pytest
import torch
from gpu_runs import sampling_config, serving
from vllm_fixtures import KEY, SAMPLING, mismatch, prompts, save_model, tiny_model

from rlkd.generation.vllm import policy_role
from rlkd.models.weights import Whole
from rlkd.servers.client import ServerError
from rlkd.servers.placement import seats
from rlkd.servers.process import launch

pytestmark = pytest.mark.gpu

TWO = ("rollout.server.devices=[[],[]]", "rollout.server.memory=0.3", "rollout.server.weight_sync=file")


def test_g5_two_servers_that_start_together(tmp_path, figure):
    """What happens without turns; it decides whether we still need them."""
    config = sampling_config(save_model(tiny_model(0), tmp_path / "model"), tmp_path, *TWO, "rollout.server.restarts=0")
    role, failures, began = policy_role(config), [], time.perf_counter()
    torch.cuda.init()
    for attempt in range(3):
        where = {"run_dir": str(tmp_path / str(attempt)), "entries": [0, 1], "slots": (0, 2), "key": KEY}
        servers = launch(role, config.rollout.server, **where)
        try:
            for server in servers:
                try:
                    server.wait_ready(60)
                except ServerError as error:
                    failures.append(str(error).splitlines()[0])
        finally:
            for server in servers:
                server.stop()
    first = f": {failures[0][:150]}" if failures else ""
    figure(f"{len(failures)} of 6 servers failed{first}; {(time.perf_counter() - began) / 3:.0f} s for two")


def test_g5_two_servers_that_start_in_turns(tmp_path, figure):
    config = sampling_config(save_model(tiny_model(0), tmp_path / "model"), tmp_path, *TWO)
    assert [seat.turn for seat in seats(config, gpus=1) if seat.role == "policy"] == [0, 1]
    published = tiny_model(1)
    weights = Whole({name: tensor.to("cuda") for name, tensor in published.state_dict().items()})
    began = time.perf_counter()
    with serving(config) as sampler:
        seconds = time.perf_counter() - began
        sampler.publish(weights, 1)
        assert len(sampler.pool.serving) == 2
        sampler.sample(prompts(8), n=2, iteration=0, sampling=SAMPLING)
        worst = mismatch(sampler, published, 1)
    figure(f"both serve after {seconds:.0f} s; largest |Δ log-prob| {worst:.2f} in bf16")
    assert worst < 0.5
