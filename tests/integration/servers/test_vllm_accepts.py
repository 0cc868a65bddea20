"""What a machine with GPUs sends to vLLM and no CPU test does: vLLM's own parsers and request classes read it here.

The command lines are those of a GPU machine, and the requests go over HTTP to a server that only writes them down.
Fakes stand for CUDA alone.
"""

import json
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from builders import config
from vllm.distributed.weight_transfer import nccl_engine, packed_tensor
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from rlkd.generation.sampler import Sampling
from rlkd.generation.vllm import VLLMSampler, policy_role
from rlkd.models.weights import Weights
from rlkd.servers.client import ServerError, VLLMClient
from rlkd.servers.command import server_command
from rlkd.servers.plugin import ENGINE
from rlkd.teachers.served import request_completion, request_given, request_scores, teacher_role
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Prompt, Signal
from rlkd.weight_sync.nccl import DirectTransfer

pytestmark = pytest.mark.long

SERVED = ("rollout.backend=vllm", "rollout.server.launch=true")
TEACHER = "teacher={backend: served, path: 'builtin:teacher', server: {launch: true, memory: 0.5}}"


def parsed(settings, role, server):
    """What vLLM's own parser makes of a server's command line, with two GPUs a copy and two copies."""
    command = server_command(role, server, host="10.0.0.1", port=8000, tensor_parallel=2, data_parallel=2)
    adapters = "--enable-lora" in command
    module = "vllm.entrypoints.openai.api_server" if adapters else "rlkd.servers.data_parallel"
    assert command[1:3] == ["-m", module], "an API process for each copy, except that each has its own adapters"
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])
    validate_parsed_serve_args(args)
    engine = AsyncEngineArgs.from_cli_args(args)
    assert (args.host, args.port, args.middleware) == ("10.0.0.1", 8000, ["rlkd.servers.auth.KeyGuard"])
    assert (engine.tensor_parallel_size, engine.data_parallel_size) == (2, 2)
    assert (engine.gpu_memory_utilization, engine.enforce_eager) == (server.memory, False)
    assert (engine.dtype, engine.max_logprobs, args.enable_scale_out) == ("auto", -1, True)
    return engine


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("rollout.server.weight_sync=file",), {"backend": ENGINE}),
        (("rollout.server.weight_sync=nccl",), {"backend": "nccl"}),
        (("rollout.server.weight_sync=ipc",), {"backend": "ipc"}),
        (("rollout.server.weight_sync=nccl", "model.fp32_head=true"), {"backend": "nccl", "head": "float32"}),
        (("model.lora={r: 100}", "rollout.max_staleness=1"), {"rank": 128}),
        (("model.lora={r: 16}", "model.fp32_head=true"), {"rank": 16, "head": "float32"}),
        (("model.trust_remote_code=true",), {"backend": ENGINE, "trusted": True}),
    ],
)
def test_a_policy_server_of_a_gpu_machine_is_started_with_arguments_that_exist(monkeypatch, overrides, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = config(*SERVED, *overrides)
    engine = parsed(settings, policy_role(settings), settings.rollout.server)
    transfer = engine.weight_transfer_config
    found = {
        "backend": None if transfer is None else transfer.backend,
        "head": engine.hf_overrides.get("head_dtype"),
        "rank": engine.max_lora_rank if engine.enable_lora else None,
        "trusted": engine.trust_remote_code or None,
    }
    assert {name: value for name, value in found.items() if value is not None} == expected
    assert engine.logprobs_mode == "processed_logprobs"
    assert engine.enable_chunked_prefill is not False, "only vLLM's runner for CPUs cannot do it"


@pytest.mark.parametrize("trusted", [False, True])
def test_a_teacher_server_of_a_gpu_machine_is_started_with_arguments_that_exist(monkeypatch, trusted):
    settings = config(TEACHER, f"model.trust_remote_code={str(trusted).lower()}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = parsed(settings, teacher_role(settings, settings.teacher), settings.teacher.server)
    assert engine.trust_remote_code is trusted
    assert engine.max_num_batched_tokens is None, "vLLM's choice: its runner for GPUs splits the log-probs itself"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = teacher_role(settings, settings.teacher).arguments
    assert arguments[arguments.index("--max-num-batched-tokens") + 1] == "2048"
    assert ("--trust-remote-code" in arguments) is trusted


@pytest.fixture
def wire():
    """(a client, the requests that its server got: path, body)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.answer(b'{"world_size": 2}')

        def do_POST(self):
            text = self.rfile.read(int(self.headers.get("content-length", 0)))
            requests.append((self.path, json.loads(text) if text else None))
            self.answer(b"{}")

        def answer(self, body):
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield VLLMClient(f"http://127.0.0.1:{server.server_port}", 10.0), requests
    server.shutdown()
    server.server_close()


def test_vllm_reads_the_requests_for_samples_and_scores(wire):
    client, requests = wire
    sampling = Sampling(temperature=0.7, max_tokens=9, seed=3, top_k=4)
    question = ScoreRequest((5, 6, 7), (8, 9), ids=torch.tensor([[3, -1], [4, 5]]))
    sampler = VLLMSampler(config(*SERVED), eos_ids=[1, 2])
    prompt = Prompt(id="p", messages=(), token_ids=(5, 6, 7))
    for ask in (
        lambda: sampler._one_prompt(client, "policy", prompt, 8, 0, sampling),
        lambda: request_given(client, "teacher", question),
        lambda: request_given(client, "teacher", ScoreRequest((5, 6, 7), (8, 9))),
        lambda: request_scores(client, "teacher", [question, question], Signal(tier="top_k", k=5)),
        lambda: request_completion(client, "teacher", (5, 6), sampling, 4, [1]),
    ):
        with pytest.raises(ServerError, match="but not as a vLLM server does"):
            ask()
    (_, sample), (_, given), (_, actual), (_, scores), (_, written) = requests
    read = GenerateRequest.model_validate(sample)
    assert (read.token_ids, read.model, read.sampling_params.n) == ([5, 6, 7], "policy", 8)
    assert (read.sampling_params.temperature, read.sampling_params.max_tokens) == (0.7, 9)
    assert (read.sampling_params.logprobs, read.sampling_params.stop_token_ids) == (5, [1, 2])
    params = GenerateRequest.model_validate(given).sampling_params
    assert params.prompt_logprob_token_ids == [[8, 3, -1], [9, 4, 5]] and params.prompt_logprob_start == 2
    assert GenerateRequest.model_validate(actual).sampling_params.prompt_logprob_token_ids == [[8], [9]]
    read = CompletionRequest.model_validate(scores)
    assert (read.prompt, read.prompt_logprobs) == ([[5, 6, 7, 8, 9]] * 2, 5) and not read.model_extra
    read = CompletionRequest.model_validate(written)
    assert (read.prompt, read.seed, read.return_token_ids) == ([[5, 6]], 4, True) and not read.model_extra


class Device:
    """Stands for a GPU, a stream and a communicator: nothing is waited for or sent."""

    uuid = "a GPU"

    def synchronize(self):
        pass

    def broadcast(self, tensor, src, stream=None):
        pass

    def destroy(self):
        pass


@pytest.fixture
def cuda(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **({n: v for n, v in k.items() if n != "device"})))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Device)
    for name in ("ipc_collect", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", Device)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, count: (Device(),) * count)
    monkeypatch.setattr(packed_tensor, "reduce_tensor", lambda tensor: (None, ("handle", 0, 1, 2, 3, 4, 5, 6)))
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: Device())


@pytest.mark.parametrize(
    ("kind", "init", "update"),
    [
        ("nccl", nccl_engine.NCCLWeightTransferInitInfo, nccl_engine.NCCLWeightTransferUpdateInfo),
        ("ipc", IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo),
    ],
)
def test_vllm_reads_the_calls_of_a_weight_update(wire, cuda, monkeypatch, kind, init, update):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    client, requests = wire
    transfer = DirectTransfer(kind, [client])
    weights = Weights.of({"a.weight": torch.zeros(3, 4), "b.bias": torch.zeros(4)})
    for version in (1, 2):
        transfer.send(weights, version)
    paths = [path for path, _ in requests]
    assert paths == ["/init_weight_transfer_engine"] + 2 * [
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
    ]
    bodies = dict(requests)
    made = init(**WeightTransferInitRequest(**bodies["/init_weight_transfer_engine"]).init_info)
    assert made.packed
    if kind == "nccl":
        assert (made.rank_offset, made.world_size) == (1, 3), "a trainer, and a server of two GPUs"
    found = update(**WeightTransferUpdateRequest(**bodies["/update_weights"]).update_info)
    assert (found.names, found.dtype_names) == (["a.weight", "b.bias"], ["float32", "float32"])
    assert found.shapes == [[3, 4], [4]]
    assert bodies["/finish_weight_update"] == {"weight_version": "2"}
    transfer.close()
