"""Weights that are published while a server samples (`rollout.in_flight`): nothing waits, and every token is by the
weights that its span names."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
from run_results import rows
from runs import train
from vllm_fixtures import prompts, run_config, tiny_model, true_logprobs

from rlkd.generation.sampler import Sampling
from rlkd.generation.vllm import VLLMSampler
from rlkd.models.weights import Whole

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
    sampler.publish(Whole(models[0].state_dict()), 0)
    groups = []
    thread = threading.Thread(
        target=lambda: groups.extend(sampler.sample(prompts(40), n=4, iteration=0, sampling=LONG))
    )
    thread.start()
    for version in (1, 2, 3):
        time.sleep(0.15)
        sampler.publish(Whole(models[version].state_dict()), version)
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


def test_a_run_samples_two_iterations_ahead(policy_server, policy_path, tmp_path):
    """Drift is not taken for a mismatch, and nothing is newer or older than allowed."""
    data = tmp_path / "data.jsonl"
    prompts = ["abcdefgh"[i % 5 :] + chr(97 + i % 8) + chr(97 + i // 8) for i in range(64)]
    data.write_text("\n".join(json.dumps({"prompt": prompt, "answer": "a"}) for prompt in prompts), encoding="utf-8")
    sampled = "backend: vllm, prompts: 8, max_tokens: 40, max_staleness: 2, max_mismatch: 0.001"
    served = f"rollout={{{sampled}, server: {{urls: ['{policy_server.url}']}}}}"
    settings = (
        *(f"run.dir={tmp_path}", "run.name=run", "run.iterations=6", f"model.path={policy_path}", served),
        *("algorithm={name: grpo, group_size: 4}", "teacher=null", "eval.every=2", f"eval.path={data}"),
        *(
            f"data={{path: {data}, max_prompt_tokens: 32, chat_template: false}}",
            "eval.prompts=8",
            "eval.samples=2",
            "optim.lr=0.003",
        ),
        "reward={functions: [{name: format, options: {pattern: '.*[a-f]{2}.*'}}]}",
    )
    train(["--config", "configs/quickstart.yaml", *settings], tmp_path)
    found = [row for row in rows(tmp_path / "run") if row["iteration"] > 0]
    assert len(found) == 6 and all(row["mismatch/mean"] < 1e-4 for row in found)
    assert found[0]["staleness/mean"] == 0 and max(row["staleness/mean"] for row in found) == 2
    assert max(row["staleness/gap"] for row in found) > 1e-2
    for i, row in enumerate(found):
        lines = (tmp_path / f"run/rollouts/{i + 1:06d}-rank0.jsonl").read_text().splitlines()
        assert {json.loads(line)["weight_version"] for line in lines} <= set(range(i - 2, i + 1))
        parts = [
            value
            for name, value in row.items()
            if name.startswith("time/") and name not in ("time/total", "time/overhead")
        ]
        assert sum(parts) == pytest.approx(row["time/total"], rel=0.05)
