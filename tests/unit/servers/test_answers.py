"""How a server's responses are parsed, and the one-line error for an invalid one."""

import base64
import io

import numpy as np
import pytest
from builders import config

from rlkd.generation.sampler import Sampling
from rlkd.generation.vllm import VLLMSampler
from rlkd.servers.client import ServerError
from rlkd.servers.process import cause_in
from rlkd.servers.responses import (
    CompletionsAnswer,
    GenerateAnswer,
    ModelList,
    WeightInfo,
    float_array,
    in_order,
    parse,
)
from rlkd.types import Prompt

EOS = 3


@pytest.mark.parametrize(
    ("content", "kind", "line"),
    [
        (b'{"weight_version": 3}', WeightInfo, "weight_version: Input should be a valid string, got 3"),
        (b"{}", WeightInfo, "weight_version: Field required, got {}"),
        (b"[1]", WeightInfo, "the answer: Input should be an object, got [1]"),
        (
            b'{"data": [',
            ModelList,
            'the answer: Invalid JSON: EOF while parsing a list at line 1 column 10, got {"data": [',
        ),
        (
            b"<html>\n</html>",
            ModelList,
            "the answer: Invalid JSON: expected value at line 1 column 1, got <html> </html>",
        ),
        (b"", ModelList, "the answer: Invalid JSON: EOF while parsing a value at line 1 column 0, got"),
        (
            b'{"model": "m", "choices": [{"index": 0, "logprobs": {"content": [{"token_id": "7", "logprob": -1}]}}]}',
            *(GenerateAnswer, "choices[0].logprobs.content[0].token_id: Input should be a valid integer, got '7'"),
        ),
        (
            b'{"model": "m", "choices": [{"index": 0, "prompt_logprobs": [{"7": {"logprob": NaN}}]}]}',
            *(CompletionsAnswer, "choices[0].prompt_logprobs[0].7.logprob: Input should be a finite number, got nan"),
        ),
    ],
)
def test_a_field_that_is_wrong_is_named(content, kind, line):
    with pytest.raises(ValueError) as caught:
        parse(content, kind)
    assert str(caught.value) == line


def test_the_card_of_an_adapter_has_no_length_of_its_own():
    """As vLLM 0.32 writes it."""
    cards = parse(b'{"data": [{"id": "a", "root": "/a", "parent": "m", "max_model_len": null}]}', ModelList).data
    assert (cards[0].parent, cards[0].max_model_len) == ("m", None)


def test_choices_come_in_any_order_and_each_once():
    assert in_order([2, 0, 1], 3) == [1, 2, 0]
    for indices in ([0], [0, 0], [1, 2], [0, 1, 2]):
        with pytest.raises(ValueError, match=f"expected 2 completions numbered from 0, got {len(indices)}"):
            in_order(indices, 2)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 99999999999), }"


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (npy(np.zeros((1, 2), np.float32)), r"expected floats of shape \[2, 2\], got float32 of shape \[1, 2\]"),
        (npy(np.zeros((2, 2), np.int64)), "int64 of shape"),
        (npy(np.zeros((2, 2), np.float32))[:-1], "expected a .npy file as long as its header states, got 143 bytes"),
        (b"\x93NUMPY\x01\x00\x76\x00" + HUGE.ljust(117) + b"\n", r"got float32 of shape \[2, 99999999999\]"),
        (npy(np.array([[None, {}]], dtype=object)), "object of shape"),
        (b"\x93NUMPY\x01\x00\x04\x00((\n\n", "expected a .npy file, got a broken header"),
        (b"\x93NUMPY\x01\x00\x0b\x00 if x:\n  1\n", "expected a .npy file, got a broken header|not"),
        (b"x", ""),
        (b"", ""),
    ],
)
def test_an_array_that_is_not_the_one_that_was_asked_for(raw, line):
    with pytest.raises(ValueError, match=line):
        float_array(base64.b64encode(raw).decode(), (2, 2))


def test_an_array():
    values = np.array([[1.5, -np.inf], [0.0, 2.0]], np.float16)
    assert (float_array(base64.b64encode(npy(values)).decode(), (2, 2)) == values).all()


@pytest.mark.parametrize(
    "spans",
    [
        None,
        [],
        [(0, 1)],
        [(0, 3)],
        [(1, 2)],
        [(0, 1), (0, 2)],
        [(0, 0), (0, 2)],
        [(0, 2), (2, 1)],
        [(-1, 2)],
        [(0, 10**12)],
    ],
)
def test_each_token_has_one_weight_version(spans):
    """Otherwise the rollout would fail as our own mistake, or be expanded token by token without end."""

    class Client:
        url = "http://server"

        def post(self, path, body, kind):
            said = None if spans is None else [{"start": a, "end": b, "version": "1"} for a, b in spans]
            content = [{"token_id": token, "logprob": -1.0, "top_logprobs": []} for token in (7, EOS)]
            choice = {"index": 0, "token_ids": [7, EOS], "logprobs": {"content": content}, "finish_reason": "stop"}
            return kind.model_validate({"model": "m", "choices": [{**choice, "weight_versions": said}]})

    prompt, sampling = Prompt(id="p", messages=(), token_ids=(5,)), Sampling(temperature=1.0, max_tokens=4, seed=0)
    with pytest.raises(ServerError, match="expected one weight version for each of 2 tokens"):
        VLLMSampler(config(), [EOS])._one_prompt(Client(), "m", prompt, 1, 1, sampling)


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (["INFO started", "Killed"], None),
        (["WARNING such as OSError: [Errno 24] Too many open files"], None),
        (
            ["ValueError: no such layer", "RuntimeError: Engine core initialization failed. See above"],
            "ValueError: no such layer",
        ),
        (
            ["RuntimeError: Engine core initialization failed. See above"],
            "RuntimeError: Engine core initialization failed. See above",
        ),
        (
            [
                "pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "  Value error, Model architectures ['X'] are not there. Supported architectures: dict_keys(['A'])",
                "    For further information visit https://errors.pydantic.dev",
            ],
            "ValidationError: 1 validation error for ModelConfig Value error, Model architectures ['X'] are not there",
        ),
    ],
)
def test_why_a_server_ended_is_the_first_cause_that_its_log_names(log, cause):
    assert cause_in([line.replace("WARNING", "(APIServer) WARNING 11-28") for line in log]) == cause
