"""Embedding rows beyond the tokenizer's ids (Qwen2.5 has 271) are never sampled, scored or trained.

The padded rows here have large random values, so that their logits are far above every token's.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import Captured, config, real_batch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_fixtures import KEY

from rlkd.builtin import resolve
from rlkd.config.schema import ModelConfig, RolloutServerConfig
from rlkd.generation.sampler import Sampling, eos_ids
from rlkd.generation.vllm import VLLMSampler, policy_role
from rlkd.models.vocabulary import padding, vocabulary_size
from rlkd.models.weights import Whole
from rlkd.planning.preflight import check
from rlkd.servers.client import ServerError, VLLMClient
from rlkd.servers.padding_probe import check_padding, padding_share
from rlkd.servers.process import VLLMServer, cpu_cores
from rlkd.teachers.served import PolicyServerTeacher, ServedTeacher
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Prompt, Signal

TOKENS = 56  # of the built-in tokenizer


def padded(folder: Path, rows: int, name: str = "student") -> str:
    """The built-in model with `rows` additional such rows, or with fewer rows."""
    hf = AutoModelForCausalLM.from_pretrained(resolve(f"builtin:{name}"), dtype=torch.float32)
    hf.resize_token_embeddings(TOKENS + rows, mean_resizing=False)
    torch.manual_seed(rows)
    with torch.no_grad():
        for layer in (hf.get_input_embeddings(), hf.get_output_embeddings()):
            layer.weight[TOKENS:] = 20 * torch.randn(max(rows, 0), layer.weight.shape[1])
    hf.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve(f"builtin:{name}")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[int, str]:
    """Number of padding rows → the same student with that many."""
    folder = tmp_path_factory.mktemp("padded")
    return {rows: padded(folder / str(rows), rows) for rows in (3, 7)}


def test_the_vocabulary_is_what_tokenizer_and_student_both_have(paths, tmp_path):
    assert [vocabulary_size(ModelConfig(path=path)) for path in paths.values()] == [TOKENS, TOKENS]
    assert padding(ModelConfig(path=paths[3]), paths[7]) == range(TOKENS, TOKENS + 7)
    assert not padding(ModelConfig(path="builtin:student"), "builtin:teacher")
    # a token without an embedding, like a pad token added only to the tokenizer
    path = padded(tmp_path, 0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(path)
    assert vocabulary_size(ModelConfig(path=path)) == TOKENS


SAMPLED = "algorithm={name: opd, group_size: 4, divergence: {tier: sampled}}"
TIERS = {
    "kdrl": "algorithm={name: kdrl, group_size: 4}",
    "sampled": SAMPLED,
    "full": "algorithm={name: opd, group_size: 4, divergence: {tier: full}}",
    **{
        f"top_k of the {support}": "algorithm={name: opd, group_size: 4, divergence: "
        f"{{tier: top_k, k: 5, support: {support}}}}}"
        for support in ("teacher", "student", "sampler")
    },
    "everything": "algorithm={name: opd, group_size: 4, divergence: {tier: top_k, k: 60, support: sampler}}",
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("student", "teacher", "tier"), [*((3, 7, tier) for tier in TIERS), *((7, 3, tier) for tier in ("kdrl", "full"))]
)
def test_equal_models_with_different_padding_have_no_divergence(paths, tier, student, teacher):
    settings = config(
        f"model.path={paths[student]}",
        f"teacher={{backend: local, path: '{paths[teacher]}'}}",
        "rollout.prompts=4",
        TIERS[tier],
        group_size=None,
    )
    batch = real_batch(settings)
    ids = batch.input_ids[batch.completion_mask]
    assert len(ids) > 50 and int(ids.max()) < TOKENS
    found = Captured(settings, batch)
    assert found.row["mismatch/max"] < 1e-5
    assert abs(found.row["kd/kl"]) < 1e-6
    assert abs(found.row.get("kd/divergence", 0.0)) < 1e-6


@pytest.mark.parametrize("tier", ["kdrl", "full"])
def test_padded_rows_are_never_trained(paths, tier):
    settings = config(
        f"model.path={paths[3]}", "teacher={backend: local, path: 'builtin:teacher'}", TIERS[tier], group_size=None
    )
    found = Captured(settings, real_batch(settings))
    layer = found.student.hf.get_output_embeddings().weight
    name = next(name for name, p in found.student.hf.named_parameters() if p is layer)
    assert found.gradients[name].shape[0] == TOKENS + 3
    assert (found.gradients[name][TOKENS:] == 0).all()
    assert (found.gradients[name][:TOKENS].abs().sum(1) > 0).all()


def test_a_padded_student_is_the_unpadded_one(paths):
    """The same samples, metrics and gradients, bit for bit."""
    settings = [config(f"model.path={path}", "rollout.prompts=4") for path in ("builtin:student", paths[3])]
    plain, found = (Captured(one, real_batch(one)) for one in settings)
    assert found.row["loss"] == plain.row["loss"] and found.row["kd/kl"] == plain.row["kd/kl"]
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(found.gradients[name][: len(gradient)], gradient, atol=1e-7, rtol=0)


def test_preflight_names_a_teacher_that_lacks_tokens(paths, tmp_path):
    """Its tokenizer is the student's, but it has no embedding for some of the tokens."""
    path = padded(tmp_path / "narrow", -2)
    (line,) = check(config(f"teacher={{backend: local, path: '{path}'}}"))
    assert line == (
        f"teacher.path: expected embeddings for the student's {TOKENS} tokens, got {TOKENS - 2} in {path}; choose "
        "another teacher"
    )


def test_preflight_names_a_prompt_with_an_id_that_has_no_embedding(tmp_path):
    path = padded(tmp_path / "beyond", 0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["abc"])
    tokenizer.save_pretrained(path)
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"reverse: {word}", "answer": word[::-1]} for word in ("deeg", "fabc", "abcd")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("teacher=null", "algorithm={name: grpo}", f"data.path={data}", "rollout.prompts=1", "eval.every=0")
    problems = check(config(f"model.path={path}", *settings, group_size=None))
    assert problems == [
        f"data.path: prompt '1' has token {TOKENS} ('abc'), but the model has embeddings for {TOKENS} tokens only; "
        "resize its embeddings, or take the tokenizer that belongs to it (2 prompts have such tokens)"
    ]


# ---- a real server --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(paths, tmp_path_factory):
    """A server of the student with 7 padded rows, started as a run would start it."""
    settings = served_config(paths, 7)
    launch = RolloutServerConfig(launch=True, max_model_len=64, start_timeout_s=300.0)
    logs = tmp_path_factory.mktemp("logs")
    made = VLLMServer(policy_role(settings), launch, key=KEY, log_dir=logs, cores=cpu_cores(0, 1))
    made.wait_ready()
    yield made
    made.stop()


def served_config(paths, student: int, *overrides: str):
    return config(
        f"model.path={paths[student]}",
        "rollout.backend=vllm",
        "rollout.server.launch=true",
        "rollout.server.max_model_len=64",
        *overrides,
    )


def questions(count: int) -> list[ScoreRequest]:
    return [
        ScoreRequest(tuple(4 + (7 * i + t) % 50 for t in range(5)), tuple(4 + i + t for t in range(6)))
        for i in range(count)
    ]


@pytest.mark.server
def test_a_padded_server_samples_and_scores_as_the_unpadded_model(server, paths):
    settings = served_config(paths, 7, "rollout.server.launch=false", f"rollout.server.urls=['{server.url}']")
    teacher_of = f"teacher={{backend: served, path: '{paths[7]}', url: '{server.url}'}}"
    hf = AutoModelForCausalLM.from_pretrained(paths[3], dtype=torch.float32)  # the same model, padded otherwise
    sampler = VLLMSampler(settings, eos_ids(paths[7], False))
    sampler.open()
    try:
        sampler.publish(Whole(AutoModelForCausalLM.from_pretrained(paths[7], dtype=torch.float32).state_dict()), 0)
        prompts = [Prompt(id=str(i), messages=(), token_ids=q.prompt) for i, q in enumerate(questions(8))]
        sampling = Sampling(temperature=0.8, max_tokens=20, seed=3, top_k=60)
        rollouts = [r for g in sampler.sample(prompts, n=8, iteration=0, sampling=sampling) for r in g]
        greedy = [g[0] for g in sampler.sample(prompts, n=1, iteration=0, sampling=replace(sampling, temperature=0))]
        for rollout in rollouts + greedy:
            assert max(rollout.token_ids) < TOKENS and int(rollout.top_ids.max()) < TOKENS
        gaps = []
        for rollout in rollouts:
            ids, start = (*rollout.prompt.token_ids, *rollout.token_ids), len(rollout.prompt.token_ids)
            with torch.no_grad():
                logits = hf(torch.tensor([ids])).logits[0, start - 1 : -1, :TOKENS] / 0.8
            truth = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            gaps.append(float((truth - torch.tensor(rollout.logprobs)).abs().max()))
        assert max(gaps) < 1e-4
        scorers = (
            ServedTeacher(served_config(paths, 3, teacher_of), served_config(paths, 3, teacher_of).teacher),
            PolicyServerTeacher(sampler, eos_ids(paths[7], False)),
        )
        for scorer in scorers:
            scorer.open()
            asked = questions(6)
            for question, score in zip(asked, scorer.score(asked, Signal(tier="top_k", k=TOKENS)), strict=True):
                ids = torch.tensor([[*question.prompt, *question.completion]])
                with torch.no_grad():
                    truth = hf(ids).logits[0, len(question.prompt) - 1 : -1, :TOKENS].log_softmax(-1)
                own = truth.gather(1, torch.tensor(question.completion)[:, None])[:, 0]
                assert torch.allclose(torch.tensor(score.logprobs), own, atol=1e-4)
                assert int(score.top_ids.max()) < TOKENS
                assert float(score.top_logprobs.logsumexp(-1).abs().max()) < 1e-5, "the tokens' probabilities sum to 1"
                ours = score.top_logprobs.log_softmax(-1)
                theirs = truth.gather(1, score.top_ids)
                assert float((ours.exp() * (ours - theirs)).sum(-1).abs().max()) < 1e-6
        scorers[0].close()
    finally:
        sampler.close()


@pytest.mark.server
def test_the_check_finds_a_server_that_does_not_exclude_padding(policy_server, policy_path):
    """It serves 60 rows and was given no padding; the last 4 count as padding here."""
    client = VLLMClient(policy_server.url, 60.0, KEY)
    model = client.model_card(policy_path, 10)
    share = padding_share(client, model, range(56, 60))
    assert 1e-4 < share < 1
    with pytest.raises(ServerError, match=r"expected probability 0 for the 4 padded rows.*rlkd.serve"):
        check_padding(client, model, range(56, 60), samples=True)
    with pytest.raises(ServerError, match="RLKD_VOCABULARY=56"):
        check_padding(client, model, range(56, 60), samples=False)
    check_padding(client, model, range(60, 60), samples=True)
    client.close()
