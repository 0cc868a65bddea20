"""Weights that are published while a server samples (`rollout.in_flight`): nothing waits, and every token is by the
weights that its span names."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from vllm_fixtures import prompts, run_config, tiny_model, true_logprobs

from rlkd.generation.sampler import Sampling
from rlkd.generation.vllm import VLLMSampler

pytestmark = pytest.mark.server
LONG = Sampling(temperature=1.0, max_tokens=60, seed=3)


@pytest.fixture
def sampler(policy_server, policy_path):
    config = run_config(policy_path, policy_server.url, max_tokens=60)
    rollout = config.rollout.model_copy(update={"max_staleness": 5})
    made = VLLMSampler(config.model_copy(update={"rollout": rollout}), eos_ids=[])
    made.open()
    yield made
    made.close()


def test_completions_go_on_under_the_new_weights_and_name_them(sampler):
    """The log-prob of each token is that of the model that its span names, given all tokens before it: so the keys and
    values of the tokens that older weights had processed were computed again."""
    models = {version: tiny_model(10 + version) for version in range(4)}
    sampler.publish(models[0].state_dict(), 0)
    groups = []
    thread = threading.Thread(
        target=lambda: groups.extend(sampler.sample(prompts(40), n=4, iteration=0, sampling=LONG))
    )
    thread.start()
    for version in (1, 2, 3):
        time.sleep(0.15)
        sampler.publish(models[version].state_dict(), version)
    thread.join()
    rollouts = [rollout for group in groups for rollout in group]
    assert len(rollouts) == 160
    assert sum(len(rollout.weight_versions) > 1 for rollout in rollouts) > 10, "otherwise nothing was in flight"
    for rollout in rollouts:
        for span in rollout.weight_versions:
            truth = true_logprobs(models[span.version], rollout.prompt.token_ids, rollout.token_ids)
            found = torch.tensor(rollout.logprobs)
            part = slice(span.start, span.end)
            torch.testing.assert_close(found[part], truth[part], atol=1e-4, rtol=0)
