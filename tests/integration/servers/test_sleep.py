"""Servers that sleep while the student trains. The routes are vLLM's own, and so is the bookkeeping of what is awake
(`Executor`); what is missing is the device, since vLLM cannot sleep on a CPU."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from run_results import rows
from runs import run_code
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.rl.online.api_router import router as updates
from vllm.entrypoints.serve.dev.cache.api_router import router as caches
from vllm.entrypoints.serve.dev.sleep.api_router import router as sleeping
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.executor.abstract import Executor
from vllm_fixtures import EOS, prompts, run_config, tiny_model

from rlkd.config.schema import Config
from rlkd.generation.sampler import Sampling
from rlkd.generation.vllm import VLLMSampler, policy_role
from rlkd.models.weights import Whole
from rlkd.servers.client import ServerError, VLLMClient
from rlkd.servers.process import VLLMServer

SAMPLING = Sampling(temperature=1.0, max_tokens=4, seed=0)


class Engine:
    """What vLLM's routes call: an engine whose memory is two flags, kept by vLLM's own `Executor`."""

    is_sleeping = Executor.is_sleeping

    def __init__(self) -> None:
        self.sleeping_tags: set[str] = set()
        self.calls: list[str] = []
        self.version: str | None = None
        self.weights: str | None = "as started"
        self.updating = False
        self.refuses = ""

    def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
        """What a GPU's worker does to its memory."""
        if name == self.refuses:
            raise RuntimeError("CUDA Error: out of memory")
        if name == "sleep" and kwargs["level"] == 2:
            self.weights = None

    async def sleep(self, level: int, mode: str) -> None:
        assert mode == "wait", "abort would end requests of others"
        self.calls.append(f"sleep {level}")
        Executor.sleep(self, level)

    async def wake_up(self, tags: list[str]) -> bool:
        self.calls.append(f"wake {' '.join(tags)}")
        Executor.wake_up(self, tags)
        return not self.is_sleeping

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        self.calls.append("pause")

    async def resume_generation(self) -> None:
        assert not self.is_sleeping and self.weights is not None
        self.calls.append("resume")

    async def init_weight_transfer_engine(self, request: Any) -> None:
        pass

    async def start_weight_update(self) -> None:
        assert "weights" not in self.sleeping_tags, "new weights would be written to memory that is not there"
        self.calls.append("update")

    async def update_weights(self, request: Any) -> None:
        self.weights = request.update_info["file"]

    async def finish_weight_update(self, version: str) -> None:
        self.version = version

    async def get_weight_version(self) -> str:
        return self.version or "default"

    async def reset_prefix_cache(self, running: bool, connector: bool) -> bool:
        assert not self.is_sleeping
        return True


@pytest.fixture
def served(policy_path: str) -> Iterator[tuple[Engine, str]]:
    """(the engine, the address of vLLM's routes in front of it)."""
    engine, app = Engine(), FastAPI()
    for router in (sleeping, updates, caches):
        app.include_router(router)
    app.state.engine_client = engine

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    @app.get("/server_info")
    def info() -> dict[str, Any]:
        return {"vllm_config": {"model_config": {"dtype": "torch.float32"}, "scheduler_config": {"max_num_seqs": 256}}}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "policy", "root": policy_path, "parent": None, "max_model_len": 96}]}

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield engine, f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def settings(path: str, url: str, level: int) -> Config:
    """A run whose running server sleeps; only tests have one, since a run must start those that sleep."""
    config = run_config(path, url)
    server = config.rollout.server.model_copy(update={"sleep": level})
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"server": server})})


PUBLISHED = ["wake weights", "pause", "update", "wake kv_cache", "resume"]


@pytest.mark.parametrize("level", [1, 2])
def test_a_server_sleeps_while_the_student_trains(level: int, policy_path: str, served: tuple[Engine, str]) -> None:
    engine, url = served
    sampler = VLLMSampler(settings(policy_path, url, level), [EOS])
    sampler.open()
    assert engine.calls == [f"sleep {level}"] and engine.is_sleeping, "the student is loaded next"
    for version in range(3):
        with pytest.raises(AssertionError, match="publish before you sample"):
            sampler.sample(prompts(1), n=1, iteration=0, sampling=SAMPLING)
        engine.calls.clear()
        sampler.publish(Whole(tiny_model(0).state_dict()), version)
        assert engine.calls == PUBLISHED and not engine.is_sleeping
        assert engine.weights == f"weights-{version}.safetensors"
        sampler.sleep()  # as the loader does, once all ranks have their completions
        assert engine.is_sleeping
    sampler.close()


def test_a_server_that_was_restarted_is_awake_and_gets_the_weights(
    policy_path: str, served: tuple[Engine, str]
) -> None:
    engine, url = served
    sampler = VLLMSampler(settings(policy_path, url, 2), [EOS])
    sampler.open()
    sampler.publish(Whole(tiny_model(0).state_dict()), 0)
    engine.version, engine.weights = None, "as started"
    engine.calls.clear()
    sampler.recover()
    assert engine.calls == PUBLISHED and engine.weights == "weights-0.safetensors"
    engine.calls.clear()
    sampler.recover()  # it has the weights still
    assert engine.calls == ["wake kv_cache", "resume"]
    sampler.close()


def test_a_gpu_without_room_for_the_cache_is_one_line(policy_path: str, served: tuple[Engine, str]) -> None:
    engine, url = served
    sampler = VLLMSampler(settings(policy_path, url, 1), [EOS])
    sampler.open()
    engine.refuses = "wake_up"
    with pytest.raises(ServerError, match=f"POST {url}/wake_up answered 500") as error:
        sampler.publish(Whole(tiny_model(0).state_dict()), 0)
    assert "\n" not in str(error.value)
    sampler.close()


def test_a_server_that_refuses_to_sleep_stops_the_run_and_one_that_is_gone_does_not(
    policy_path: str, served: tuple[Engine, str]
) -> None:
    engine, url = served
    sampler = VLLMSampler(settings(policy_path, url, 1), [EOS])
    sampler.open()
    sampler.publish(Whole(tiny_model(0).state_dict()), 0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but not listening
        gone = VLLMClient(f"http://127.0.0.1:{closed.getsockname()[1]}", timeout_s=5.0)
        sampler.pool.clients.append(gone)
        sampler.sleep()
        assert engine.is_sleeping and set(sampler.pool.lost) == {gone.url}
        sampler.publish(Whole(tiny_model(0).state_dict()), 1)
        engine.refuses = "sleep"
        with pytest.raises(ServerError, match=f"POST {url}/sleep.* answered 500") as error:
            sampler.sleep()
        assert "\n" not in str(error.value)
        assert set(sampler.pool.lost) == {gone.url, url}
    sampler.close()


def test_the_command_line_of_a_server_that_can_sleep_is_vllms(policy_path: str) -> None:
    config = run_config(policy_path)
    server = config.rollout.server.model_copy(update={"sleep": 2})
    asleep = config.model_copy(update={"rollout": config.rollout.model_copy(update={"server": server})})
    parser = make_arg_parser(FlexibleArgumentParser())
    for given, can in ((config, False), (asleep, True)):
        parsed = parser.parse_args(["--model", policy_path, *policy_role(given).arguments])
        assert EngineArgs.from_cli_args(parsed).enable_sleep_mode is can


RUN = """
import sys
from rlkd.config_file import load
from rlkd.run.fit import run
loaded = load(["configs/quickstart.yaml"], sys.argv[2:])
rollout = loaded.config.rollout
rollout = rollout.model_copy(update={"server": rollout.server.model_copy(update={"sleep": 1})})
run(loaded.config.model_copy(update={"rollout": rollout}), loaded.text)
"""


@pytest.mark.server
@pytest.mark.process
def test_a_run_of_two_ranks_with_a_real_server(policy_server: VLLMServer, policy_path: str, tmp_path: Path) -> None:
    """vLLM's CPU worker ignores the calls, but its engine does not: it serves nothing until all is awake."""
    data = tmp_path / "data.jsonl"
    texts = ["abcdefgh"[i % 5 :] + chr(97 + i % 8) + chr(97 + i // 8) for i in range(16)]
    data.write_text("\n".join(json.dumps({"prompt": text, "answer": "a"}) for text in texts), encoding="utf-8")
    served = f"server: {{urls: ['{policy_server.url}']}}"
    overrides = (
        *(f"run.dir={tmp_path}", "run.name=run", "run.iterations=2", f"model.path={policy_path}", "teacher=null"),
        f"rollout={{backend: vllm, prompts: 8, max_tokens: 8, max_mismatch: 0.001, {served}}}",
        *("algorithm={name: grpo, group_size: 4}", "trainer.devices=2", "trainer.accelerator=cpu"),
        *(f"data={{path: {data}, max_prompt_tokens: 32, chat_template: false}}", f"eval.path={data}"),
        *("eval.every=1", "eval.prompts=8", "eval.samples=2", "checkpoint.export=false"),
        "reward={functions: [{name: format, options: {pattern: '.*[a-f]{2}.*'}}]}",
    )
    before = len(policy_server.log.read_text())
    run_code(RUN, tmp_path / "ranks", *overrides)
    asked = re.findall(r"POST (/\S+) HTTP/1.1\S* 200", policy_server.log.read_text()[before:])
    kinds = ("/sleep", "/wake_up", "/pause", "/update_weights", "/resume", "/inference/v1/generate")
    asked = [path for path, _ in groupby(asked) if path.startswith(kinds)]
    publish = ["/wake_up?tags=weights", "/pause?mode=wait", "/update_weights", "/wake_up?tags=kv_cache", "/resume"]
    sampled = [*publish, "/inference/v1/generate", "/sleep?level=1&mode=wait"]
    assert asked == ["/sleep?level=1&mode=wait", *sampled, *sampled, *sampled[:-1]], "evaluation is part of sampling"
    assert [row["iteration"] for row in rows(tmp_path / "run")] == [0, 1, 2]
