"""Mutated responses of a server, sent over HTTP: each is used unchanged, or it is a one-line ServerError."""

import base64
import copy
import io
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from builders import config
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from trees import at, walk

from rlkd.generation.sampler import Sampling
from rlkd.generation.vllm import VLLMSampler
from rlkd.servers.client import ServerError, VLLMClient
from rlkd.teachers.served import request_completion, request_given, request_scores
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Prompt, Signal

pytestmark = [pytest.mark.long, pytest.mark.timeout(3 * 3600)]

EOS = 3
SAMPLING = Sampling(temperature=1.0, max_tokens=3, seed=0, top_k=2)
QUESTIONS = [ScoreRequest((5, 6), (7, 8)), ScoreRequest((9,), (4,))]
GIVEN = ScoreRequest((5, 6, 9), (7, 8), ids=torch.tensor([[7, 9], [3, 99]]))


def entry(token, logprob):
    top = [{"token_id": token, "logprob": logprob}, {"token_id": 11, "logprob": -2.5}]
    return {"token": "x", "token_id": token, "logprob": logprob, "top_logprobs": top}


def generated(index, tokens, reason):
    spans = [{"start": 0, "end": 1, "version": "4"}, {"start": 1, "end": len(tokens), "version": "5"}]
    content = [entry(token, -0.5 - position) for position, token in enumerate(tokens)]
    return {
        **{"index": index, "token_ids": tokens, "logprobs": {"content": content}},
        **{"finish_reason": reason, "weight_versions": spans},
    }


def npy(values):
    file = io.BytesIO()
    np.save(file, np.asarray(values, dtype=np.float32))
    return base64.b64encode(file.getvalue()).decode()


def scored(question):
    tokens = [*question.prompt, *question.completion]
    return [None] + [{str(t): {"logprob": -1.0 - i}, "12": {"logprob": -9.0}} for i, t in enumerate(tokens[1:])]


ANSWERS = {
    "card": {"data": [{"id": "m", "root": "m", "parent": None, "max_model_len": 64}]},
    "version": {"weight_version": "12"},
    "sample": {"model": "m", "choices": [generated(1, [7, 8, EOS], "stop"), generated(0, [7, 9, 9], "length")]},
    "scores": {
        "model": "m",
        "choices": [{"index": i, "prompt_logprobs": scored(question)} for i, question in enumerate(QUESTIONS)],
    },
    "given": {"model": "m", "prompt_token_id_logprobs": npy([[-1.0, -1.0, -3.0], [-2.0, -4.0, -np.inf]])},
    "written": {
        "model": "m",
        "choices": [{"index": 0, "token_ids": [7, EOS], "logprobs": {"token_logprobs": [-1.0, -2.0]}}],
    },
}
ODD = [
    *(None, True, False, -1, 0, 1, 7, 2**31, 10**30, 0.5, -9999.0, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", "m", "x\n", "default", "5", "９", "9" * 5000, "stop", "NaN", "é\ud800", [], {}, [[]], [None], {"a": 1}),
    *([7, 8, 9], [7] * 5000, {"content": []}, {"content": None}, [{"start": 0, "end": 10**12, "version": "1"}]),
    *(npy(np.zeros((1, 3))), npy(np.zeros(10**4)), base64.b64encode(b"\x93NUMPY\x01\x00\x05\x00{}\n").decode()),
    base64.b64encode(
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 3), }".ljust(117)
        + b"\n"
    ).decode(),
]
TEXT = ["", "null", "[]", '"', "}", "]", ",", "NaN", "1e999", "\x00", "<html>", "[" * 3000, "é", '{"model": "m"}', "\n"]


@st.composite
def bodies(draw) -> tuple[str, bytes]:
    """(the request, the body of the response)."""
    kind = draw(st.sampled_from(sorted(ANSWERS)))
    tree = copy.deepcopy(ANSWERS[kind])
    for _ in range(draw(st.integers(0, 2))):
        *above, key = draw(st.sampled_from([path for path, _ in walk(tree) if path] or [("model",)]))
        parent = at(tree, above)
        deed = draw(st.sampled_from(["replace", "replace", "remove", "double", "number"]))
        if deed == "remove":
            parent.pop(key, None) if isinstance(parent, dict) else parent.pop(key)
        elif deed == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif deed == "number":
            parent[key] = draw(st.one_of(st.integers(-2, 14), st.floats(-10, 1)))
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    text = json.dumps(tree)
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
        start = draw(st.integers(0, len(text)))
        gone = draw(st.sampled_from([0, 1, 4, len(text)]))
        text = text[:start] + draw(st.sampled_from(TEXT)) + text[start + gone :]
    return kind, text.encode()


@dataclass
class Stub:
    """A server that responds with `body` to everything."""

    body: bytes = b"{}"
    content_type: str = "application/json"
    url: str = ""


@pytest.fixture(scope="module")
def stub():
    said = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header("content-type", said.content_type)
            self.send_header("content-length", str(len(said.body)))
            self.end_headers()
            self.wfile.write(said.body)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        said.url = f"http://127.0.0.1:{server.server_port}"
        yield said
        server.shutdown()


@pytest.fixture(scope="module")
def client(stub):
    asking = VLLMClient(stub.url, 20.0)
    yield asking
    asking.close()


@pytest.fixture(scope="module")
def sampler():
    return VLLMSampler(config(), eos_ids=[EOS])


def ask(kind, client, sampler):
    prompt = Prompt(id="p", messages=(), token_ids=(5, 6))
    return {
        "card": lambda: client.model_card("m", 8),
        "version": client.weight_version,
        "sample": lambda: sampler._one_prompt(client, "m", prompt, 2, 5, SAMPLING),
        "scores": lambda: request_scores(client, "m", QUESTIONS, Signal(tier="top_k", k=2)),
        "given": lambda: request_given(client, "m", GIVEN),
        "written": lambda: request_completion(client, "m", [5], SAMPLING, 0, [EOS]),
    }[kind]()


def said_of(kind, body):
    """(the values of an accepted response parsed by plain JSON, the same values as rlkd parsed them)."""
    choices = sorted(body["choices"], key=lambda choice: choice["index"]) if "choices" in body else []
    if kind == "sample":
        return [(c["token_ids"], [e["logprob"] for e in c["logprobs"]["content"]], c["finish_reason"]) for c in choices]
    if kind == "scores":
        rows = zip(choices, QUESTIONS, strict=True)
        return [
            [c["prompt_logprobs"][len(q.prompt) + i][str(t)]["logprob"] for i, t in enumerate(q.completion)]
            for c, q in rows
        ]
    if kind == "given":
        values = np.load(io.BytesIO(base64.b64decode(body["prompt_token_id_logprobs"])))
        return values[:, 0].tolist()
    if kind == "written":
        return choices[0]["token_ids"], choices[0]["logprobs"]["token_logprobs"]
    return {"card": lambda: body["data"][0]["id"], "version": lambda: body["weight_version"]}[kind]()


def read_as(kind, result):
    if kind == "sample":
        return [(list(r.token_ids), list(r.logprobs), r.finish_reason) for r in result]
    if kind == "scores":
        return [list(scores.logprobs) for scores in result]
    if kind == "given":
        return list(result.logprobs)
    if kind == "written":
        return list(result.token_ids), list(result.logprobs)
    return result if kind == "card" else "default" if result is None else str(result)


def test_the_answers_are_right_before_they_are_mutated(stub, client, sampler):
    for kind, answer in ANSWERS.items():
        stub.body, stub.content_type = json.dumps(answer).encode(), "application/json"
        assert read_as(kind, ask(kind, client, sampler)) == said_of(kind, answer)


@cases(300, 10_000)
@given(drawn=bodies(), content_type=st.sampled_from(["application/json"] * 3 + ["text/html; charset=nowhere", "é;;"]))
def test_an_answer_is_used_unchanged_or_is_one_line(stub, client, sampler, drawn, content_type):
    kind, stub.body = drawn
    stub.content_type = content_type
    try:
        result = ask(kind, client, sampler)
    except ServerError as error:
        line = str(error)
        assert line == " ".join(line.splitlines()) and stub.url in line and len(line) < 700, line
        return
    body = json.loads(stub.body)
    assert body.get("model", "m") == "m"
    if kind == "version":  # "007" is 7
        assert int(said_of(kind, body)) == result if result is not None else said_of(kind, body) == "default"
    elif kind != "card" or len(body["data"]) == 1:
        assert read_as(kind, result) == said_of(kind, body)
