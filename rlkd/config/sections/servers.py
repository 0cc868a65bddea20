"""The section `rollout`, and the vLLM servers of policy and teachers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rlkd.config.sections.base import Section
from rlkd.plugins import SAMPLER, did_you_mean, find, installed, is_outside

WILDCARDS = ("", "0.0.0.0", "::")
"""Addresses that a server can listen on but a client cannot connect to."""


class ServerConfig(Section):
    """A vLLM server: how to start one, or how to treat a running one."""

    launch: bool = Field(False, description="start the servers, monitor them, and stop them when the run ends")
    devices: list[list[int]] = Field(
        [[]],
        min_length=1,
        description="one server per entry, with its GPU indices; [[]]: one on the CPU or the default GPU",
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "auto", description="vLLM's compute type; float32 on CPU"
    )
    max_model_len: int | None = Field(
        None, gt=1, description="longest prompt + completion; null: as long as the run needs"
    )
    memory: float = Field(0.85, gt=0, lt=1, description="fraction of GPU memory that vLLM may use")
    kv_cache_gb: float = Field(1.0, gt=0, description="key-value cache of a CPU server, in GiB")
    host: str = Field(
        "127.0.0.1",
        description="address of this machine on which launched servers listen; loopback: reachable from this "
        "machine only",
    )
    key_env: str = Field(
        "RLKD_SERVER_KEY",
        pattern=r"^[A-Za-z_]\w*$",
        description="environment variable with the servers' key; if unset, launched servers get a new random key",
    )
    allow_open: bool = Field(
        False,
        description="allow remote servers without authentication (anyone who can reach them could replace the weights)",
    )
    restarts: int = Field(3, ge=0, description="times that a launched server is restarted after it dies, per run")
    retry_s: float = Field(600.0, ge=0, description="seconds to wait when no server responds before the run stops")
    start_timeout_s: float = Field(600.0, gt=0, description="seconds within which a launched server must become ready")
    request_timeout_s: float = Field(
        3600.0, gt=0, description="seconds within which a request must be answered, including its time in the queue"
    )
    extra_args: list[str] = Field([], description="extra arguments for the vLLM command line, passed unchanged")

    @field_validator("host")
    @classmethod
    def _reachable(cls, host: str) -> str:
        if host in WILDCARDS:
            raise ValueError("expected an address that trainers can connect to; use an address of this machine")
        return host


class RolloutServerConfig(ServerConfig):
    """The policy's vLLM servers."""

    urls: list[str] = Field([], description="running servers, e.g. http://host:8000; excludes launch")
    weight_sync: Literal["auto", "file", "nccl", "ipc"] = Field(
        "auto",
        description="how new weights are sent to the servers; auto: nccl to launched servers on GPUs of their own, "
        "ipc to one on the only trainer's GPU, otherwise file",
    )
    sleep: int = Field(
        0,
        ge=0,
        le=2,
        description="launched servers may use the trainers' GPUs, and give their memory back while the student trains: "
        "1 keeps their weights in main memory, 2 nowhere; 0: they never sleep",
    )
    sync_dir: str | None = Field(
        None,
        description="directory for weight_sync: file, on a disk shared by trainer and servers; null: in memory",
    )


class RolloutConfig(Section):
    """How the student samples completions for training."""

    backend: Literal["hf", "vllm"] | str = Field(
        "hf", description="hf: in the trainer process; vllm: one or more servers; or your own module:Class"
    )
    prompts: int = Field(16, ge=1, description="prompts per iteration, summed over all ranks")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; also used for the policy's log-probs")
    max_tokens: int = Field(256, ge=1, description="longest completion, in tokens")
    max_staleness: int = Field(
        0,
        ge=0,
        description="how many iterations are sampled ahead while the student trains, so how many weight versions a "
        "sample is behind the trainer; 0: on-policy",
    )
    in_flight: bool = Field(
        True,
        description="backend: vllm with max_staleness: completions go on under the new weights while these are "
        "published; false: a publish waits for them, so that each is by one version",
    )
    max_mismatch: float = Field(
        0.05,
        gt=0,
        description="the run stops if mean |sampler log-prob − trainer log-prob| exceeds this over 10 iterations, or "
        "4 times this in one",
    )
    batch_rows: int = Field(
        256, ge=1, description="rows that the hf sampler decodes at a time; rewards of the first begin meanwhile"
    )
    server: RolloutServerConfig = Field(RolloutServerConfig(), description="vLLM servers of the policy")

    @field_validator("backend")
    @classmethod
    def _is_a_sampler(cls, name: str) -> str:
        if name in ("hf", "vllm"):
            return name
        if not is_outside(name, SAMPLER):
            known = ["hf", "vllm", *installed(SAMPLER)]
            hint = did_you_mean(name, known).strip(" ()") or f"e.g. {SAMPLER.example}"
            raise ValueError(f"expected {' | '.join(known)} | {SAMPLER.form} of your own; {hint}")
        find(name, SAMPLER, lambda found: found)
        return name
