"""How fast a server samples when more or fewer completions are in flight."""

import time

import psutil
import pytest
from gpu_runs import sampling_config, serving
from vllm_fixtures import prompts

from rlkd.generation import vllm
from rlkd.generation.sampler import Sampling

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("in_flight", [256, 1024])
def test_g10_tokens_per_second(in_flight, qwen, tmp_path, figure, monkeypatch):
    """128 × 8 completions of at most 512 tokens, by a server with compiled kernels and graphs."""
    monkeypatch.setattr(vllm, "_AT_ONCE", in_flight)
    fast = ("rollout.server.extra_args=[]", "rollout.server.memory=0.6", "rollout.max_tokens=512")
    config = sampling_config(qwen.path, tmp_path, *fast)
    qwen.saved()
    with serving(config) as sampler:
        sampler.keep_loaded()
        (server,) = sampler.pool.servers
        sampler.sample(prompts(8), n=8, iteration=0, sampling=Sampling(temperature=1.0, max_tokens=16, seed=1))
        api = psutil.Process(server.pid)  # it turns tokens into JSON; the engine is another process
        before, began = api.cpu_times(), time.perf_counter()
        how = Sampling(temperature=1.0, max_tokens=512, seed=0)
        groups = sampler.sample(prompts(128), n=8, iteration=0, sampling=how)
        seconds, after = time.perf_counter() - began, api.cpu_times()
    tokens = sum(len(one.token_ids) for group in groups for one in group)
    busy = (after.user + after.system - before.user - before.system) / seconds
    figure(
        f"{in_flight} in flight: {tokens / seconds:.0f} tokens/s ({tokens} in {seconds:.0f} s); the server's API "
        f"process used {100 * busy:.0f} % of a core, {1e6 * busy * seconds / tokens:.0f} µs a token"
    )
    assert tokens > 100_000
