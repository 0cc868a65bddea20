"""The section `rollout`, and the vLLM servers of policy and teachers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rlkd.config.sections.base import Section

WILDCARDS = ("", "0.0.0.0", "::")
"""Addresses that a server can listen on but that no client can connect to."""


class ServerConfig(Section):
    """A vLLM server: how to start one, or how to treat a running one."""

    launch: bool = Field(False, description="start the server, watch it, and stop it with the run")
    devices: list[list[int]] = Field(
        [[]],
        min_length=1,
        description="one server per entry, with its GPU indices; [[]]: one on the CPU or the default GPU",
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "auto", description="vLLM's compute type; float32 on CPU"
    )
    max_model_len: int | None = Field(
        None, gt=1, description="longest prompt + completion; null: the rollout's own lengths"
    )
    memory: float = Field(0.85, gt=0, lt=1, description="GPU memory fraction that vLLM may use")
    kv_cache_gb: float = Field(1.0, gt=0, description="key-value cache of a CPU server, in GiB")
    host: str = Field(
        "127.0.0.1", description="address of this machine that started servers listen on; loopback: this machine only"
    )
    key_env: str = Field(
        "RLKD_SERVER_KEY",
        pattern=r"^[A-Za-z_]\w*$",
        description="environment variable with the servers' key; for started ones, unset, a fresh key is made",
    )
    allow_open: bool = Field(
        False, description="use servers on other machines whose weights anybody may change, since they ask for no key"
    )
    restarts: int = Field(3, ge=0, description="how often a started server that died is started again, in one run")
    retry_s: float = Field(
        600.0, ge=0, description="seconds to wait for servers, when none answers any more, before the run ends"
    )
    start_timeout_s: float = Field(600.0, gt=0, description="seconds until a started server must answer")
    request_timeout_s: float = Field(
        3600.0, gt=0, description="seconds until a request must be answered, queue included"
    )
    extra_args: list[str] = Field([], description="further arguments for the vLLM command line, as they are")

    @field_validator("host")
    @classmethod
    def _reachable(cls, host: str) -> str:
        if host in WILDCARDS:
            raise ValueError("expected an address that trainers can connect to; name one of this machine")
        return host


class RolloutServerConfig(ServerConfig):
    """The policy's vLLM servers."""

    urls: list[str] = Field([], description="running servers, e.g. http://host:8000; excludes launch")
    weight_sync: Literal["file", "nccl", "ipc"] = Field("file", description="how new weights reach the server")
    sync_dir: str | None = Field(
        None,
        description="directory of the file engine, on a disk that trainer and servers share; null: in memory",
    )


class RolloutConfig(Section):
    """What the student samples for training."""

    backend: Literal["hf", "vllm"] = Field("hf", description="hf: in this process; vllm: one or more servers")
    prompts: int = Field(16, ge=1, description="prompts per iteration, over all ranks")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; policy log-probs are taken at it")
    max_tokens: int = Field(256, ge=1, description="longest completion, in tokens")
    max_staleness: int = Field(0, ge=0, description="weight versions that a sample may lag behind; 0: on-policy")
    max_mismatch: float = Field(
        0.05, gt=0, description="mean |log-prob by sampler − by trainer| above which the run stops"
    )
    batch_rows: int = Field(256, ge=1, description="rows that the hf sampler decodes at a time")
    server: RolloutServerConfig = Field(RolloutServerConfig(), description="vLLM servers of the policy")
