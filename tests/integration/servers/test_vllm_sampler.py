"""The vLLM sampler and the served teacher on a real server, compared with a plain transformers forward pass."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import local_scorer
from transformers import LlamaForCausalLM
from vllm_fixtures import EOS, VOCABULARY, prompts, run_config, save_model, tiny_model, true_logprobs

from rlkd.data.seeds import request_seed
from rlkd.generation.rollout_answers import sampled_logprobs
from rlkd.generation.sampler import Sampling
from rlkd.generation.vllm import VLLMSampler
from rlkd.models.weights import Whole
from rlkd.servers.client import ServerError, VLLMClient, parse_version
from rlkd.servers.process import VLLMServer
from rlkd.servers.responses import Completed, Generated, parse
from rlkd.teachers.served import PolicyServerTeacher, ServedTeacher, completion_logprobs, request_given
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Prompt, Rollout, Signal, TeacherScores

HOT = Sampling(temperature=0.7, max_tokens=24, seed=5)
GREEDY = Sampling(temperature=0.0, max_tokens=24, seed=5)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model(1)


@pytest.fixture(scope="module")
def sampler(policy_server: VLLMServer, policy_path: str, model: LlamaForCausalLM) -> Iterator[VLLMSampler]:
    """A sampler whose server has tiny_model(1) as version 3."""
    made = VLLMSampler(run_config(policy_path, policy_server.url), eos_ids=[EOS])
    made.open()
    made.publish(Whole(model.state_dict()), 3)
    yield made
    made.close()


def tokens(groups: list[list[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[rollout.token_ids for rollout in group] for group in groups]


@pytest.mark.server
def test_a_server_that_a_run_has_used_does_not_count_as_unchanged(sampler: VLLMSampler, policy_path: str) -> None:
    other = VLLMSampler(run_config(policy_path, sampler.pool.clients[0].url), eos_ids=[EOS])
    other.open()
    with pytest.raises(ServerError, match="got version 3, which a run has published; restart that server"):
        other.keep_loaded()
    other.close()


@pytest.mark.server
def test_sampled_logprobs_are_the_models_at_the_temperature(sampler: VLLMSampler, model: LlamaForCausalLM) -> None:
    groups = sampler.sample(prompts(6), n=4, iteration=0, sampling=HOT)
    assert [len(group) for group in groups] == [4] * 6
    for prompt, group in zip(prompts(6), groups, strict=True):
        for rollout in group:
            assert rollout.prompt == prompt
            truth = true_logprobs(model, prompt.token_ids, rollout.token_ids, HOT.temperature)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), truth, atol=1e-4, rtol=0)
            assert [span.version for span in rollout.weight_versions] == [3]
    assert len({rollout.token_ids for group in groups for rollout in group}) > 12, "samples of a group must differ"


@pytest.mark.server
def test_the_likeliest_tokens_are_the_models(sampler: VLLMSampler, model: LlamaForCausalLM) -> None:
    groups = sampler.sample(prompts(4), n=3, iteration=0, sampling=dataclasses.replace(HOT, top_k=5))
    for rollout in (r for group in groups for r in group):
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        with torch.no_grad():
            truth = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        assert rollout.top_ids is not None and rollout.top_ids.shape == (len(rollout.token_ids), 5)
        torch.testing.assert_close(truth.gather(1, rollout.top_ids), truth.topk(5).values, atol=1e-4, rtol=0)


@pytest.mark.server
def test_a_server_without_the_new_runner_is_an_error(sampler: VLLMSampler) -> None:
    """On a CPU vLLM cannot score given tokens, and says so at the start; test_given.py has servers that can."""
    sampler.pool.find_route(needed=False)
    assert not sampler.pool.scores_given
    with pytest.raises(ServerError, match="answered 400: prompt_logprob_token_ids requires the V2 model runner"):
        sampler.pool.find_route(needed=True)


@pytest.mark.server
def test_a_completion_stops_at_eos_with_its_logprob_or_at_the_budget(sampler: VLLMSampler) -> None:
    rollouts = [r for group in sampler.sample(prompts(16), n=8, iteration=0, sampling=HOT) for r in group]
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert EOS not in rollout.token_ids[:-1]
        assert (rollout.finish_reason == "stop") == (rollout.token_ids[-1] == EOS)
        assert rollout.finish_reason == "stop" or len(rollout.token_ids) == HOT.max_tokens


@pytest.mark.server
def test_more_prompt_tokens_than_one_prefill_takes_do_not_end_the_server(sampler: VLLMSampler) -> None:
    """20,000 prompt tokens together: with chunked prefill, vLLM on a CPU crashes on a request with a seed."""
    long = [Prompt(id=f"l{i}", messages=(), token_ids=tuple(2 + (i + t) % 50 for t in range(40))) for i in range(125)]
    groups = sampler.sample(long, n=4, iteration=0, sampling=Sampling(temperature=1.0, max_tokens=2, seed=0))
    assert [len(group) for group in groups] == [4] * 125


@pytest.mark.server
def test_greedy_takes_the_likeliest_token(sampler: VLLMSampler, model: LlamaForCausalLM) -> None:
    (group,) = sampler.sample(prompts(1), n=2, iteration=0, sampling=GREEDY)
    assert group[0] == group[1]
    ids = list(prompts(1)[0].token_ids)
    for token in group[0].token_ids:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    truth = true_logprobs(model, prompts(1)[0].token_ids, group[0].token_ids)
    torch.testing.assert_close(torch.tensor(group[0].logprobs), truth, atol=1e-4, rtol=0)


@pytest.mark.server
def test_what_is_drawn_depends_on_seed_iteration_and_prompt_alone(sampler: VLLMSampler) -> None:
    first = tokens(sampler.sample(prompts(6), n=3, iteration=7, sampling=HOT))
    alone = tokens(sampler.sample(prompts(6)[4:5], n=3, iteration=7, sampling=HOT))
    assert alone == first[4:5]
    assert tokens(sampler.sample(prompts(6), n=3, iteration=8, sampling=HOT)) != first
    other_seed = Sampling(temperature=0.7, max_tokens=24, seed=6)
    assert tokens(sampler.sample(prompts(6), n=3, iteration=7, sampling=other_seed)) != first


@pytest.mark.server
def test_a_served_teacher_scores_as_the_model_does(
    sampler: VLLMSampler, policy_server: VLLMServer, policy_path: str, model: LlamaForCausalLM
) -> None:
    questions = [
        ScoreRequest(prompt.token_ids, range(2, 2 + length)) for length, prompt in enumerate(prompts(40), start=1)
    ]
    settings = run_config(policy_path, policy_server.url)
    teacher = ServedTeacher(settings, settings.teacher)
    teacher.open()
    scores = teacher.score(questions, Signal())
    for question, score in zip(questions, scores, strict=True):
        truth = true_logprobs(model, question.prompt, question.completion)
        torch.testing.assert_close(torch.tensor(score.logprobs), truth, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="got 2 and 0"):
        teacher.score([ScoreRequest((4, 5), ())], Signal())
    with pytest.raises(ServerError, match="answered 400: .*96"):
        teacher.score([ScoreRequest((4, 5), (6,) * 95)], Signal())
    teacher.close()


@pytest.mark.server
def test_a_served_teachers_top_k_are_the_models(
    sampler: VLLMSampler, policy_server: VLLMServer, policy_path: str, model: LlamaForCausalLM
) -> None:
    """Ids and log-probs, up to the full vocabulary (which vLLM pads to 64 internally); it refuses a larger k."""
    questions = [
        ScoreRequest(prompt.token_ids, range(2, 2 + length)) for length, prompt in enumerate(prompts(20), start=1)
    ]
    settings = run_config(policy_path, policy_server.url)
    teacher = ServedTeacher(settings, settings.teacher)
    teacher.open()
    for k in (1, 8, VOCABULARY):
        for question, score in zip(questions, teacher.score(questions, Signal(tier="top_k", k=k)), strict=True):
            ids = torch.tensor([[*question.prompt, *question.completion]])
            with torch.no_grad():
                truth = model(ids).logits[0, len(question.prompt) - 1 : -1].log_softmax(-1)
            top = truth.topk(k)
            assert score.top_ids is not None and score.top_logprobs is not None
            assert score.top_ids.shape == score.top_logprobs.shape == (len(question.completion), k)
            torch.testing.assert_close(score.top_logprobs, top.values, atol=1e-4, rtol=0)
            torch.testing.assert_close(truth.gather(1, score.top_ids), top.values, atol=1e-4, rtol=0)  # up to ties
            assert all(len(set(row)) == k for row in score.top_ids.tolist())
            chosen = true_logprobs(model, question.prompt, question.completion)
            torch.testing.assert_close(torch.tensor(score.logprobs), chosen, atol=1e-4, rtol=0)
    with pytest.raises(ServerError, match="answered 400: .*greater than max allowed: 60"):
        teacher.score(questions, Signal(tier="top_k", k=VOCABULARY + 1))
    teacher.close()


@pytest.mark.server
def test_the_servers_that_sample_also_score_for_a_live_self_teacher(
    sampler: VLLMSampler, model: LlamaForCausalLM
) -> None:
    teacher = PolicyServerTeacher(sampler, (1,))
    teacher.open()
    questions = [ScoreRequest(prompt.token_ids, (7, 8, 9)) for prompt in prompts(4)]
    for question, score in zip(questions, teacher.score(questions, Signal(tier="top_k", k=3)), strict=True):
        truth = true_logprobs(model, question.prompt, question.completion)
        torch.testing.assert_close(torch.tensor(score.logprobs), truth, atol=1e-4, rtol=0)
        assert score.top_ids is not None and score.top_ids.shape == (3, 3)
    teacher.close()
    assert sampler.sample(prompts(1), n=1, iteration=0, sampling=GREEDY), "the servers are the sampler's"


@pytest.mark.server
def test_a_served_teacher_writes_as_the_local_one_does(
    sampler: VLLMSampler, policy_server: VLLMServer, policy_path: str, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    settings = run_config(policy_path, policy_server.url)
    served = ServedTeacher(settings, settings.teacher)
    served.open()
    local = local_scorer(save_model(model, tmp_path), vocabulary=VOCABULARY)
    questions = [ScoreRequest(prompt.token_ids, name=prompt.id) for prompt in prompts(12)]
    a, b = (teacher.write(questions, GREEDY, 0) for teacher in (served, local))
    assert [c.token_ids for c in a] == [c.token_ids for c in b]
    assert [c.finish_reason for c in a] == [c.finish_reason for c in b]
    for ours, theirs in zip(a, b, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    hot = served.write(questions, HOT, 7)
    assert served.write(questions[4:5], HOT, 7) == hot[4:5], "a function of seed, iteration and name"
    assert [c.token_ids for c in served.write(questions, HOT, 8)] != [c.token_ids for c in hot]
    assert {c.finish_reason for c in hot} == {"stop", "length"}
    for question, completion in zip(questions, hot, strict=True):
        truth = true_logprobs(model, question.prompt, completion.token_ids, HOT.temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), truth, atol=1e-4, rtol=0)
    served.close()


@pytest.mark.server
def test_an_unfit_server_is_refused_in_one_line(policy_server: VLLMServer, policy_path: str, tmp_path: Path) -> None:
    other = save_model(tiny_model(1), tmp_path / "other")
    with pytest.raises(
        ServerError, match=rf"expected a server of '{other}', got one of 'policy' .*; .* --served-model-name"
    ) as wrong:
        VLLMSampler(run_config(other, policy_server.url), eos_ids=[EOS]).open()
    namesake = tmp_path / Path(policy_path).name
    save_model(tiny_model(1), namesake)
    with pytest.raises(ServerError, match=f"expected a server of '{namesake}', got one of 'policy' .{policy_path}."):
        VLLMSampler(run_config(str(namesake), policy_server.url), eos_ids=[EOS]).open()
    with pytest.raises(ServerError, match=r"--max-model-len 96, but .* 132 tokens") as short:
        VLLMSampler(run_config(policy_path, policy_server.url, max_tokens=100), eos_ids=[EOS]).open()
    with pytest.raises(ServerError, match=r"GET http://127.0.0.1:9/v1/models: ConnectError") as absent:
        VLLMSampler(run_config(policy_path, "http://127.0.0.1:9"), eos_ids=[EOS]).open()
    assert all("\n" not in str(caught.value) for caught in (wrong, short, absent))


@pytest.mark.server
def test_a_temperature_that_vllm_would_change_is_refused(sampler: VLLMSampler) -> None:
    with pytest.raises(ValueError, match=r"at least 0.01, to which vLLM silently raises .*, got 0.001; use 0"):
        sampler.sample(prompts(1), n=1, iteration=0, sampling=Sampling(temperature=0.001, max_tokens=4, seed=0))


def test_request_seeds_are_fixed_for_all_time() -> None:
    assert request_seed(0, 0, "p0") == 1851750685
    seeds = {request_seed(s, i, f"p{p}") for s in range(4) for i in range(4) for p in range(16)}
    assert len(seeds) == 256 and max(seeds) < 2**31


def choice(token_ids: list[int], entries: list[tuple[int, float | None]]) -> dict[str, Any]:
    content = [{"token_id": token, "logprob": logprob} for token, logprob in entries]
    return {"index": 0, "token_ids": token_ids, "logprobs": {"content": content}}


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (choice([4, 5], [(4, -1.0)]), "2 tokens but 1 log-probs"),
        (choice([4, 5], [(4, -1.0), (6, -1.0)]), "token 1 is 5, but its log-prob is of token 6"),
        (
            choice([4], [(4, -9999.0)]),
            "log-prob of token 0: expected a log-prob, got -9999.0, which is NaN, −inf or missing",
        ),
        (choice([4], [(4, 0.5)]), "log-prob of token 0: expected a log-prob, got 0.5, .* or above 0"),
        (choice([4], [(4, None)]), "log-prob of token 0: expected a log-prob, got None"),
        ({"index": 0, "token_ids": [4], "logprobs": None}, "1 tokens but 0 log-probs"),
    ],
)
def test_an_invalid_log_prob_is_an_error(answer: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ServerError, match=complaint):
        sampled_logprobs(Generated.model_validate(answer), "server")


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([], "expected scores of 3 tokens, got 0"),
        ([None, {"7": {"logprob": -1.0}}], "expected scores of 3 tokens, got 2"),
        ([None, {"7": {"logprob": -1.0}}, {"9": {"logprob": -1.0}}], "no log-prob of completion token 1, which is 8"),
        (
            [None, {"7": {"logprob": -9999.0}}, {"8": {"logprob": -1.0}}],
            "completion token 0: expected a log-prob, got -9999.0",
        ),
    ],
)
def test_a_teachers_invalid_log_prob_is_an_error(entries: list[object], complaint: str) -> None:
    answer = parse(json.dumps({"index": 0, "prompt_logprobs": entries}).encode(), Completed)
    with pytest.raises(ServerError, match=complaint):
        completion_logprobs(answer.prompt_logprobs or [], [6], [7, 8], "server")


def npy(values: object) -> str:
    file = io.BytesIO()
    np.save(file, np.asarray(values, dtype=np.float32))
    return base64.b64encode(file.getvalue()).decode()


GIVEN = ScoreRequest((5, 6, 9), (7, 8), ids=torch.tensor([[7, 9], [3, 99]]))


def given_scores(answer: dict[str, object]) -> tuple[TeacherScores, dict[str, Any]]:
    """(the scores read from a server's response to GIVEN, the request)."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/inference/v1/generate"
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as stub:
        threading.Thread(target=stub.serve_forever, args=(0.01,), daemon=True).start()
        client = VLLMClient(f"http://127.0.0.1:{stub.server_port}", 5.0)
        try:
            return request_given(client, "m", GIVEN), asked[0]
        finally:
            client.close()
            stub.shutdown()


def test_given_tokens_are_requested_in_the_completions_rows() -> None:
    """In vLLM, row i scores its ids as predictions of prompt token prompt_logprob_start + i + 1, as float32
    .npy in base64. A token that the teacher lacks is scored −inf."""
    scores, asked = given_scores(
        {"model": "m", "prompt_token_id_logprobs": npy([[-1.0, -1.0, -3.0], [-2.0, -4.0, -np.inf]])}
    )
    assert asked["token_ids"] == [5, 6, 9, 7, 8]
    parameters = asked["sampling_params"]
    assert parameters["prompt_logprob_start"] == 2
    assert parameters["prompt_logprob_token_ids"] == [[7, 7, 9], [8, 3, 99]]
    assert scores.logprobs == (-1.0, -2.0)
    assert scores.top_ids is not None and scores.top_ids.tolist() == [[7, 9], [3, -1]]
    assert scores.top_logprobs is not None and scores.top_logprobs.tolist() == [[-1.0, -3.0], [-4.0, -np.inf]]


@pytest.mark.parametrize(
    ("figures", "complaint"),
    [
        (None, "expected log-probs of the given tokens, got none"),
        (
            npy([[-1.0, -1.0, -3.0]]),
            r"expected floats of shape \[2, 3\], got float32 of shape \[1, 3\]",
        ),
        (npy([[-1.0, np.nan, -3.0], [-2.0, -4.0, -5.0]]), "a log-prob is NaN"),
        ("AAAA", "log-probs of given tokens: "),
        ("no base64!", "log-probs of given tokens: "),
        (npy([[-1.0, np.inf, -3.0], [-2.0, -4.0, -5.0]]), "a log-prob is NaN"),
        (npy([[-np.inf, -1.0, -3.0], [-2.0, -4.0, -5.0]]), "a completion token's is not finite"),
    ],
)
def test_a_wrong_answer_about_them_is_an_error(figures: str | None, complaint: str) -> None:
    with pytest.raises(ServerError, match=complaint):
        given_scores({"model": "m", "prompt_token_id_logprobs": figures})


def test_a_server_with_its_initial_weights_is_reported() -> None:
    assert parse_version("12", "server") == 12
    with pytest.raises(ServerError, match="server holds its start weights .* publish before sampling"):
        parse_version("default", "server")
    with pytest.raises(ServerError, match="expected a number as weight version, got 'step-3'"):
        parse_version("step-3", "server")
