"""How fast a server samples when it batches more completions, and when more of them wait at it."""

import time

import psutil
import pytest
from gpu_runs import sampling_config, serving
from vllm_fixtures import prompts

from rlkd.generation import vllm
from rlkd.generation.sampler import Sampling

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("batched", "queued"), [(256, 1), (256, 2), (1024, 2)])
def test_g10_tokens_per_second(batched, queued, qwen, tmp_path, figure, monkeypatch):
    """128 × 8 completions of at most 512 tokens, by a server with compiled kernels and graphs."""
    monkeypatch.setattr(vllm, "QUEUED", queued)
    fast = (f'rollout.server.extra_args=["--max-num-seqs", "{batched}"]', "rollout.server.memory=0.6")
    config = sampling_config(qwen.path, tmp_path, *fast, "rollout.max_tokens=512")
    qwen.saved()
    with serving(config) as sampler:
        sampler.keep_loaded()
        assert sampler.at_once(8) == batched * queued // 8
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
        f"{batched} batched, {batched * queued} in flight: {tokens / seconds:.0f} tokens/s ({tokens} in "
        f"{seconds:.0f} s); the server's API process used {100 * busy:.0f} % of a core, "
        f"{1e6 * busy * seconds / tokens:.0f} µs a token"
    )
    assert tokens > 100_000
