"""New weights reach a running server exactly, completely, and only from the agreed directory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from vllm_fixtures import EOS, KEY, SAMPLING, mismatch, opened, prompts, tiny_model

from rlkd.distributed import RunStopped
from rlkd.models.weights import Whole
from rlkd.servers.client import ServerError, ServerLost, VLLMClient
from rlkd.servers.process import VLLMServer
from rlkd.servers.responses import WorldSize
from rlkd.teachers.served import PolicyServerTeacher
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Signal
from rlkd.weight_sync.nccl import Source, all_servers
from rlkd.weight_sync.weight_file import WeightFile


@pytest.mark.server
def test_published_weights_are_the_served_ones(policy_server: VLLMServer, policy_path: str) -> None:
    sampler = opened(policy_path, policy_server)
    for version, seed in ((11, 21), (12, 22), (13, 0)):
        model = tiny_model(seed)
        sampler.publish(Whole(model.state_dict()), version)
        assert mismatch(sampler, model, version) < 1e-4
        assert mismatch(sampler, tiny_model(seed + 100), version) > 1.0, "otherwise this test could not see old weights"
    sampler.close()


@pytest.mark.server
def test_a_failed_update_loses_the_server_until_a_complete_one_succeeds(
    policy_server: VLLMServer, policy_path: str
) -> None:
    sampler, model = opened(policy_path, policy_server), tiny_model(31)
    weights: Mapping[str, Tensor] = model.state_dict()
    partial = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    with pytest.raises(RunStopped, match="a weight update failed, and .* lost: .*/update_weights") as caught:
        sampler.publish(Whole(partial), 14)
    assert "\n" not in str(caught.value)
    with pytest.raises(ServerLost, match="no policy server is in service: .*/update_weights"):
        sampler.sample(prompts(1), n=1, iteration=0, sampling=SAMPLING)
    sampler.publish(Whole(weights), 15)
    assert mismatch(sampler, model, 15) < 1e-4
    # A third of a layer that vLLM fuses, and biases, which it treats as those of a quantised checkpoint: it skips both.
    third = {name: tensor for name, tensor in weights.items() if "layers.0.self_attn.k_proj" not in name}
    norm = weights["model.norm.weight"]
    unknown = {"model.norm.bias": norm + 1, "model.layers.1.mlp.up_proj.bias": norm + 2}
    for refused, line in (
        (third, "lacks some of the weights of 1 layers, e.g. model.layers.0.self_attn.qkv_proj"),
        ({**weights, **unknown}, "has 2 weights that the model does not know, e.g. model.layers.1.mlp.up_proj.bias"),
    ):
        with pytest.raises(RunStopped, match="a weight update failed, and .* lost: .*/update_weights"):
            sampler.publish(Whole(refused), 16)
        assert line in policy_server.log.read_text()
        sampler.publish(Whole(weights), 17)
        assert mismatch(sampler, model, 17) < 1e-4
    sampler.close()


@pytest.mark.server
def test_a_server_that_lost_its_weights_is_given_them_again(policy_server: VLLMServer, policy_path: str) -> None:
    """As after a restart: it reports "default". Scores do not name their version, so it is requested separately."""
    sampler, model = opened(policy_path, policy_server), tiny_model(32)
    sampler.publish(Whole(model.state_dict()), 18)
    teacher = PolicyServerTeacher(sampler, (EOS,))
    client = VLLMClient(policy_server.url, 60.0, KEY)
    client.order("/update_weight_version", {"new_version": "default"})
    with pytest.raises(ServerLost, match="holds its start weights .version 'default'."):
        sampler.sample(prompts(2), n=1, iteration=0, sampling=SAMPLING)
    sampler.recover()
    assert mismatch(sampler, model, 18) < 1e-4
    assert teacher.score([ScoreRequest((4, 5), (6, 7))], Signal())
    client.order("/update_weight_version", {"new_version": "default"})
    with pytest.raises(ServerLost, match=f"{policy_server.url}: expected weight version 18, got None"):
        teacher.score([ScoreRequest((4, 5), (6, 7))], Signal())
    sampler.recover()
    client.order("/pause", query={"mode": "wait"})
    client.order("/start_weight_update")  # by a trainer that died during an update
    sampler.publish(Whole(tiny_model(33).state_dict()), 19)
    assert mismatch(sampler, tiny_model(33), 19) < 1e-4
    other = opened(policy_path, policy_server)  # another run, whose version 19 is not ours
    other.publish(Whole(tiny_model(34).state_dict()), 19)
    sampler._holds.clear()
    sampler.recover()
    assert mismatch(sampler, tiny_model(33), 19) < 1e-4
    other.close()
    client.order("/pause", query={"mode": "keep"})  # publishing was interrupted after the weights, before the resume
    sampler.recover()
    assert mismatch(sampler, tiny_model(33), 19) < 1e-4
    client.close()
    sampler.close()


@pytest.mark.server
def test_the_engine_reads_only_inside_its_directory(
    policy_server: VLLMServer, policy_path: str, tmp_path: Path
) -> None:
    weights = tiny_model(41).state_dict()
    outside = WeightFile(str(tmp_path / "outside"))
    stream = Whole(weights).checkpoint_weights(torch.float32)
    secret = outside.directory / outside.write(stream.infos, stream, 1)
    sampler = opened(policy_path, policy_server)
    sampler.publish(Whole(weights), 16)
    assert sampler._file is not None
    (sampler._file.directory / "link.safetensors").symlink_to(secret)
    client = VLLMClient(policy_server.url, 60.0, KEY)
    for name in (f"../{secret.name}", str(secret), "link.safetensors", "."):
        client.order("/start_weight_update")
        with pytest.raises(ServerError, match="answered"):
            client.order("/update_weights", {"update_info": {"file": name}})
        assert "is not a file inside" in policy_server.log.read_text().rsplit(repr(name), 1)[1][:60]
    client.close()
    sampler.publish(Whole(weights), 17)
    sampler.close()


def test_a_weight_file_is_atomic_private_and_replaces_the_last() -> None:
    weights = tiny_model(0).state_dict()
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    files, stream = WeightFile(None), Whole(weights).checkpoint_weights(torch.float32)
    assert files.directory.stat().st_mode & 0o777 == 0o700
    first, second = (files.write(stream.infos, stream, version) for version in (1, 2))
    with pytest.raises(ValueError, match="expected 20 tensors"):
        files.write(stream.infos, list(stream)[1:], 3)
    files.keep_only(second)
    assert [path.name for path in files.directory.iterdir()] == [second] != [first]
    with safe_open(files.directory / second, framework="pt") as file:
        assert set(file.keys()) == set(weights) - {"lm_head.weight"}, "a tied tensor once"
        assert all(torch.equal(file.get_tensor(name), weights[name]) for name in set(file.keys()))
    files.close()
    assert not files.directory.exists()


def test_the_plugin_does_nothing_without_vllm() -> None:
    code = "import sys, rlkd.servers.plugin; assert not {'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_gpu_engines_http_calls_carry_the_version() -> None:
    """vLLM's own engines finish an update without its version; the server would still report "default"."""
    calls: list[tuple[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", 0))
            assert self.headers["authorization"] == "Bearer secret"
            calls.append((self.path, json.loads(self.rfile.read(length) or "null")))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    stub = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=stub.serve_forever, args=(0.01,), daemon=True).start()
    ours = VLLMClient(f"http://127.0.0.1:{stub.server_port}", 5.0, "secret")
    client = all_servers([ours])
    client.version = 4
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    client.finish_weight_update()
    ours.close()
    stub.shutdown()
    assert calls == [
        ("/start_weight_update", None),
        ("/update_weights", {"update_info": {"names": ["a"]}}),
        ("/finish_weight_update", {"weight_version": "4"}),
    ]


def test_the_source_of_the_gpu_engines_describes_what_it_yields() -> None:
    source = Source()
    for seed in (0, 1):
        weights = Whole(tiny_model(seed).state_dict()).checkpoint_weights(torch.float32)
        source.take(weights)
        told = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
        assert told == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]


def test_each_server_has_its_own_ranks_in_the_transfer_group() -> None:
    """The trainer is rank 0, and every server begins where the one before it ends."""
    calls: dict[str, object] = {}

    class Server:
        def __init__(self, name: str, ranks: int) -> None:
            self.name, self.ranks = name, ranks

        def get(self, path: str, kind: type[WorldSize]) -> WorldSize:
            return WorldSize(world_size=self.ranks)

        def order(self, path: str, body: dict[str, dict[str, object]]) -> None:
            calls[self.name] = body["init_info"]

    servers: Any = [Server("a", 2), Server("b", 1), Server("c", 4)]
    all_servers(servers).init_weight_transfer_engine({"rank_offset": 1, "world_size": 8})
    assert calls == {name: {"rank_offset": at, "world_size": 8} for name, at in (("a", 1), ("b", 3), ("c", 4))}
