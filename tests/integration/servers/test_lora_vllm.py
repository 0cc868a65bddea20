"""Adapters on a real vLLM server: each version has its own name, and the base never changes."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from builders import config
from run_results import rows
from vllm_fixtures import KEY, true_logprobs

from rlkd.builtin import resolve
from rlkd.config.schema import LoraConfig
from rlkd.config_file import load, load_stages
from rlkd.data.prompts import Prompt
from rlkd.generation.sampler import Sampling, eos_ids
from rlkd.generation.vllm import policy_role
from rlkd.generation.vllm_lora import LoraVLLMSampler
from rlkd.models import lora
from rlkd.models.student import load_causal_lm
from rlkd.models.weights import Whole
from rlkd.run.fit import run_stages
from rlkd.servers.client import ServerError, ServerLost, VLLMClient
from rlkd.servers.process import VLLMServer, cpu_cores
from rlkd.teachers.served import PolicyServerTeacher
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Signal

LORA = "model.lora={r: 4, alpha: 8}"
ADAPTERS = LoraConfig(r=4, alpha=8)
SAMPLING = Sampling(temperature=0.8, max_tokens=16, seed=0)
PROMPTS = [Prompt(id=f"p{i}", messages=(), token_ids=(5 + i, 9, 14 + 2 * i, 7)) for i in range(4)]
QUESTIONS = [ScoreRequest((5, 9, 14), (7, 8, 9)), ScoreRequest((6, 4), (11, 12))]


def student():
    return load_causal_lm("builtin:student", torch.float32, attention=None, trust_remote_code=False)


def adapted(seed):
    """(random adapters, the merged model)."""
    hf = student()
    lora.inject(hf, ADAPTERS, seed)
    torch.manual_seed(seed)
    for name, parameter in hf.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    whole = student()
    whole.load_state_dict(lora.merged(hf.state_dict(), ADAPTERS))
    return lora.peft_names(hf.state_dict()), whole


def settings(*overrides):
    served = ("rollout.backend=vllm", "rollout.max_staleness=1", "data.max_prompt_tokens=64")
    return load(["configs/quickstart.yaml"], [LORA, *served, *overrides]).config


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    launched = settings("rollout.server.launch=true", "rollout.server.start_timeout_s=300")
    role = policy_role(launched)
    logs = tmp_path_factory.mktemp("logs")
    server = VLLMServer(role, launched.rollout.server, key=KEY, log_dir=logs, cores=cpu_cores(0, 1))
    server.wait_ready()
    yield server
    server.stop()


@pytest.fixture
def client(server):
    client = VLLMClient(server.url, 60.0, KEY)
    yield client
    client.close()


@pytest.fixture
def sampler(server):
    made = LoraVLLMSampler(settings(f"rollout.server.urls=[{server.url}]"), eos_ids("builtin:student", False))
    made.open()
    yield made
    made.close()


def largest_gap(sampler, model, version):
    """|log-prob by server − by model| on fresh samples, all of which must be of `version`."""
    worst = 0.0
    for group in sampler.sample(PROMPTS, n=3, iteration=0, sampling=SAMPLING):
        for rollout in group:
            assert [span.version for span in rollout.weight_versions] == [version]
            truth = true_logprobs(model, rollout.prompt.token_ids, rollout.token_ids, SAMPLING.temperature)
            worst = max(worst, float((torch.tensor(rollout.logprobs) - truth).abs().max()))
    return worst


@pytest.mark.server
def test_each_published_adapter_is_the_served_one_and_old_ones_are_gone(sampler, client):
    before = student()
    for version in (4, 5, 6):
        adapter, whole = adapted(version)
        sampler.publish(Whole(adapter), version)
        assert largest_gap(sampler, whole, version) < 1e-4
        assert largest_gap(sampler, before, version) > 0.3, "otherwise this test could not see an old adapter"
        before = whole
    folder = sampler._folder.directory
    assert sorted(path.name for path in folder.iterdir()) == [f"{folder.name}-v5", f"{folder.name}-v6"]
    assert sorted(client.adapters()) == [f"{folder.name}-v5", f"{folder.name}-v6"], "one version of staleness"
    written = sum(path.stat().st_size for path in (folder / f"{folder.name}-v6").iterdir())
    full = Path(resolve("builtin:student"), "model.safetensors").stat().st_size
    print(f"bytes per publish: {written} of {full}")
    assert written < 0.2 * full
    sampler.close()
    assert client.adapters() == [] and not folder.exists()


@pytest.mark.server
def test_a_request_keeps_the_adapter_with_which_it_began(sampler):
    """An adapter is published while completions are under way: they end with the one that they name."""
    (first, _), (second, _) = models = [adapted(version) for version in (20, 21)]
    sampler.publish(Whole(first), 20)
    long = Sampling(temperature=0.8, max_tokens=60, seed=0)
    many = [Prompt(id=f"m{i}", messages=(), token_ids=(5 + i % 9, 9, 14, 7)) for i in range(40)]
    groups = []
    thread = threading.Thread(target=lambda: groups.extend(sampler.sample(many, n=4, iteration=0, sampling=long)))
    thread.start()
    time.sleep(0.2)
    sampler.publish(Whole(second), 21)
    thread.join()
    rollouts = [rollout for group in groups for rollout in group]
    assert {rollout.oldest_version for rollout in rollouts} >= {20}
    for rollout in rollouts:
        (span,) = rollout.weight_versions
        truth = true_logprobs(models[span.version - 20][1], rollout.prompt.token_ids, rollout.token_ids, 0.8)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), truth, atol=1e-4, rtol=0)
    assert largest_gap(sampler, models[1][1], 21) < 1e-4


@pytest.mark.server
def test_a_server_without_the_adapter_is_lost_until_it_has_it_again(sampler, client):
    """Like a restarted server. Nothing is ever sampled from the base without an error."""
    adapter, whole = adapted(7)
    sampler.publish(Whole(adapter), 7)
    (name,) = client.adapters()
    client.order("/v1/unload_lora_adapter", {"lora_name": name})
    with pytest.raises(ServerLost, match=f"no policy server is in service: .* has lost the adapter.*{name}"):
        sampler.sample(PROMPTS, n=1, iteration=0, sampling=SAMPLING)
    sampler.recover()
    assert client.adapters() == [name]
    assert largest_gap(sampler, whole, 7) < 1e-4


@pytest.mark.server
def test_the_base_is_the_fixed_teacher_and_the_adapter_the_live_one(sampler):
    adapter, whole = adapted(8)
    sampler.publish(Whole(adapter), 8)
    for base, model in ((True, student()), (False, whole)):
        teacher = PolicyServerTeacher(sampler, (1,), base=base)
        for question, score in zip(QUESTIONS, teacher.score(QUESTIONS, Signal(tier="top_k", k=3)), strict=True):
            truth = true_logprobs(model, question.prompt, question.completion)
            torch.testing.assert_close(torch.tensor(score.logprobs), truth, atol=1e-4, rtol=0)
    gap = true_logprobs(student(), (5, 9, 14), (7, 8, 9)) - true_logprobs(whole, (5, 9, 14), (7, 8, 9))
    assert gap.abs().max() > 0.3


@pytest.mark.server
def test_a_base_with_other_weights_than_it_was_started_with_is_refused(sampler, client):
    adapter, _ = adapted(9)
    sampler.publish(Whole(adapter), 9)
    client.order("/update_weight_version", {"new_version": "3"})
    try:
        with pytest.raises(ServerError, match="with model.lora, expected the weights .* got version '3'"):
            sampler.sample(PROMPTS, n=1, iteration=0, sampling=SAMPLING)
        with pytest.raises(ServerError, match="with model.lora, expected the weights .* got version 3"):
            PolicyServerTeacher(sampler, (1,), base=True).score(QUESTIONS, Signal())
    finally:
        client.order("/update_weight_version", {"new_version": "default"})


@pytest.mark.server
def test_a_refused_adapter_stops_the_run_with_the_servers_message(sampler):
    wide = {name.replace("layers.0", "layers.0.nothing"): tensor for name, tensor in adapted(1)[0].items()}
    with pytest.raises(ServerError, match=r"/v1/load_lora_adapter answered \d+: "):
        sampler.publish(Whole({name.replace("q_proj", "no_proj"): tensor for name, tensor in wide.items()}), 1)


@pytest.mark.server
@pytest.mark.process
def test_a_run_publishes_only_adapters_and_its_base_is_the_teacher(server, client, tmp_path):
    """OPSD with the initial student as fixed teacher, without a second copy of the model anywhere."""
    overrides = (
        *(LORA, "rollout.backend=vllm", f"rollout.server.urls=[{server.url}]", f"run.dir={tmp_path}", "run.name=r"),
        *("teacher={backend: self, weights: fixed, scorer: policy_server}", "data.privileged_column=privileged"),
        "algorithm={name: opsd, group_size: 4, context: {template: '{prompt}{context}', reference: ' hint: {text}'}}",
        "algorithm.context.max_tokens=48",
        *("algorithm.divergence={tier: top_k, k: 8, clip: null}", "optim.lr=0.003", "rollout.max_mismatch=1.0e-4"),
        *("run.iterations=3", "eval.every=0", "rollout.prompts=4", "data.limit=16"),
    )
    assert run_stages(load_stages(["configs/quickstart.yaml"], overrides)) == 0
    figures = rows(tmp_path / "r")
    assert [row["iteration"] for row in figures] == [1, 2, 3]
    assert all(row["mismatch/mean"] < 1e-5 and row["grad_norm"] > 0 for row in figures)
    for iteration in (1, 2, 3):
        (dump,) = (tmp_path / "r" / "rollouts").glob(f"{iteration:06d}-*")
        assert {json.loads(line)["weight_version"] for line in dump.read_text().splitlines()} == {iteration - 1}
    assert client.adapters() == [], "a server that keeps running is left as it was found"


def test_a_server_of_adapters_is_started_with_a_rank_that_vllm_accepts():
    for rank, known in ((1, 1), (4, 8), (64, 64), (200, 256), (512, 512)):
        arguments = policy_role(settings("rollout.server.launch=true", f"model.lora.r={rank}")).arguments
        assert arguments[arguments.index("--max-lora-rank") + 1] == str(known)
        assert arguments[arguments.index("--max-loras") + 1] == "3", (
            "the versions that may be requested, and the next one"
        )
        assert "--weight-transfer-config" not in arguments and "lm_head" not in arguments
    assert "--enable-lora" not in policy_role(config("rollout.backend=vllm", "rollout.server.launch=true")).arguments
