"""Scores by given tokens: vLLM's own classes for both kinds of answers, and the worker of its V2 runner.

Only its Triton kernel and its copy to the device are replaced. `test_vllm_sampler.py` has a real server without that
runner.
"""

import json
import threading
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import config
from lines import one_line
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse, CompletionResponseChoice
from vllm.entrypoints.scale_out.token_in_token_out.protocol import (
    GenerateRequest,
    GenerateTokensChoice,
    GenerateTokensResponse,
)
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.logprobs import Logprob
from vllm.utils.serial_utils import numpy2base64
from vllm.v1.worker.gpu.sample import prompt_logprob
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

from rlkd.distributed import RunStopped
from rlkd.servers.client import ServerError
from rlkd.teachers.served import ServedTeacher
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Signal

pytestmark = pytest.mark.long

NEW, OLD, BROKEN = "vLLM's V2 runner", "vLLM's old runner", "a server that fails"
QUESTIONS = [ScoreRequest(range(2, 5 + i % 3), range(7, 8 + i), ids=torch.full((1 + i, 2), 3)) for i in range(20)]
"""With ids that are not to be scored on tier `sampled`."""


def logprob(token, place):
    """An fp32 number with many digits."""
    return np.float32(-np.log1p(token + place / 7))


def by_id(asked):
    """vLLM's answer of an array."""
    request = GenerateRequest.model_validate(asked)
    params = request.sampling_params
    rows = params.prompt_logprob_token_ids
    assert len(rows) == len(request.token_ids) - 1 - params.prompt_logprob_start, "as vLLM's input processor checks"
    places = range(params.prompt_logprob_start + 1, len(request.token_ids))
    scores = np.array([[logprob(token, place) for token in row] for place, row in zip(places, rows, strict=True)])
    assert scores.dtype == np.float32
    return GenerateTokensResponse(
        model=request.model,
        choices=[GenerateTokensChoice(index=0, token_ids=[0])],
        prompt_token_id_logprobs=numpy2base64(scores),
    )


def by_json(asked):
    """vLLM's answer of a dictionary a token."""
    request = CompletionRequest.model_validate(asked)
    choices = []
    for index, tokens in enumerate(request.prompt):
        entries = [{t: Logprob(float(logprob(t, i)), rank=1, decoded_token=str(t))} for i, t in enumerate(tokens)]
        choices.append(CompletionResponseChoice(index=index, text="", prompt_logprobs=[None, *entries[1:]]))
    return CompletionResponse(model=request.model, choices=choices, usage=UsageInfo())


class Server:
    """One that answers as vLLM with `runner` does."""

    def __init__(self, runner):
        self.runner, self.asked = runner, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                card = {"id": "teacher", "root": "rlkd/builtin/teacher", "parent": None, "max_model_len": 4096}
                self.answer(json.dumps({"data": [card]}))

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append((self.path, asked))
                if self.path == "/v1/completions":
                    self.answer(by_json(asked).model_dump_json())
                elif outer.runner == NEW:
                    self.answer(by_id(asked).model_dump_json())
                else:
                    message = {"error": {"message": "prompt_logprob_token_ids requires the V2 model runner"}}
                    self.answer(json.dumps(message), 400 if outer.runner == OLD else 500)

            def answer(self, text, status=200):
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def routes(self):
        return {path for path, _ in self.asked}


@contextmanager
def teacher_of(*runners, overrides=()):
    """(an opened teacher with a server of each kind, the servers, whose requests so far are forgotten)."""
    with ExitStack() as stack:
        servers = [Server(runner) for runner in runners]
        for server in servers:
            stack.callback(server.http.server_close)
            stack.callback(server.http.shutdown)
        urls = ",".join(server.url for server in servers)
        settings = config(f"teacher={{backend: served, path: 'builtin:teacher', urls: [{urls}]}}", *overrides)
        teacher = ServedTeacher(settings, settings.teacher)
        stack.callback(teacher.close)
        teacher.open()
        for server in servers:
            server.asked.clear()
        yield teacher, servers


GIVEN = ("algorithm={name: opd, divergence: {tier: top_k, support: sampler, k: 2}}",)
TOP_K = Signal(tier="top_k", k=1)


def test_both_answers_of_the_same_numbers_are_the_same_scores():
    with teacher_of(NEW) as (teacher, (server,)):
        arrays = teacher.score(QUESTIONS, Signal())
        assert server.routes == {"/inference/v1/generate"}
        assert all(
            len(row) == 1 for _, asked in server.asked for row in asked["sampling_params"]["prompt_logprob_token_ids"]
        )
        teacher.score(QUESTIONS, TOP_K)
        assert "/v1/completions" in server.routes, "the server chooses the tokens"
    with teacher_of(OLD) as (teacher, (server,)):
        dictionaries = teacher.score(QUESTIONS, Signal())
        assert server.routes == {"/v1/completions"} and len(server.asked) == 2
    for array, dictionary, question in zip(arrays, dictionaries, QUESTIONS, strict=True):
        assert array.logprobs == dictionary.logprobs, "bit for bit"
        start = len(question.prompt)
        assert array.logprobs == tuple(float(logprob(t, start + i)) for i, t in enumerate(question.completion))
        assert array.top_ids is None and dictionary.top_ids is None


def test_servers_that_differ_are_all_asked_by_the_route_that_all_have():
    with teacher_of(NEW, OLD) as (teacher, servers):
        found = teacher.score(QUESTIONS * 4, Signal())
        assert len(found) == 80 and all(server.routes <= {"/v1/completions"} for server in servers)


def test_given_tokens_need_all_servers_and_that_shows_at_the_start():
    with teacher_of(NEW, overrides=GIVEN) as (teacher, _):
        assert teacher.score(QUESTIONS, Signal(tier="given"))[5].top_ids.shape == (6, 2)
    line = one_line("requires the V2 model runner", "algorithm.divergence.support")
    with pytest.raises(RunStopped, match=line), teacher_of(NEW, OLD, overrides=GIVEN):
        pass


def test_a_server_that_fails_is_not_taken_for_one_of_the_old_runner():
    with pytest.raises(ServerError, match="answered 500"), teacher_of(BROKEN):
        pass


def test_a_server_that_is_back_with_the_old_runner_ends_the_run():
    with teacher_of(NEW) as (teacher, (server,)):
        server.runner = OLD
        teacher.pool.lose(teacher.pool.clients[0], "a test")
        with pytest.raises(ServerError, match=one_line("requires the V2 model runner")):
            teacher.score(QUESTIONS, Signal())


@pytest.mark.parametrize("step", [1, 3, 2000, 5000])
def test_vllms_worker_scores_a_prompt_in_parts_as_in_one(monkeypatch, step):
    """A prompt longer than its 1,024 rows at a time, prefilled `step` tokens at a time; one column, and padded ones."""
    monkeypatch.setattr(prompt_logprob, "async_tensor_h2d", lambda ids, device, dtype: torch.from_numpy(ids).to(dtype))
    monkeypatch.setattr(
        prompt_logprob, "compute_token_logprobs", lambda logits, ids: logits.log_softmax(-1).gather(-1, ids)
    )
    total = 2500 if step > 1000 else 40
    start, generator = total // 2, torch.Generator().manual_seed(0)
    hidden, head = torch.randn(total, 8, generator=generator), torch.randn(8, 30, generator=generator)
    ids = torch.randint(0, 30, (total - 1 - start, 2), generator=generator)
    ids[::3, 1] = -1
    worker = PromptLogprobsWorker(4, torch.device("cpu"))
    params = SimpleNamespace(
        prompt_logprobs=None, prompt_logprob_token_ids=ids.to(torch.int32).numpy(), prompt_logprob_start=start
    )
    worker.add_request("r", 0, params)
    out = {}
    for begin in range(0, total, step):
        assert not out, "only the last part returns scores"
        end = min(begin + step, total)
        batch = SimpleNamespace(
            req_ids=["r"],
            idx_mapping_np=np.array([0]),
            num_computed_prefill_tokens_np=np.array([begin]),
            num_scheduled_tokens=np.array([end - begin]),
            prefill_len_np=np.array([total]),
            query_start_loc_np=np.array([0, end - begin]),
        )
        out = worker.compute_prompt_token_id_logprobs(lambda h: h @ head, hidden[begin:end], batch, np.array([total]))
    truth = (hidden @ head).log_softmax(-1)[start:-1].gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
    torch.testing.assert_close(out["r"], truth, atol=1e-5, rtol=0)
