"""The command line and environment of the vLLM servers that we start, as functions of the configuration."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from rlkd.config.schema import ServerConfig
from rlkd.servers import plugin
from rlkd.servers.auth import VARIABLE

LAUNCHER_VARIABLES = re.compile(r"(MASTER_|TORCHELASTIC_|ROLE_|GROUP_)\w+|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|PL_\w+")
"""Variables that torchrun sets for its workers; a server that read them would take itself for a worker."""


@dataclass(frozen=True, kw_only=True)
class ServerRole:
    """What a server is for: the part of its command that policy and teacher do not share."""

    name: str
    """The name of the model it serves, and the stem of its log file."""
    model: str
    """Folder or hub id."""
    max_model_len: int
    """Tokens of the longest prompt + completion."""
    padding: range = range(0)
    """Ids of its embedding rows without a token (vocabulary.py); the server must exclude them."""
    samples: bool = False
    """Whether it samples completions; otherwise it only scores."""
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def server_command(
    role: ServerRole, config: ServerConfig, *, host: str, port: int, tensor_parallel: int = 1, data_parallel: int = 1
) -> list[str]:
    """The command line of a server that listens on `host`:`port`. It contains no secret.

    Args:
        tensor_parallel, data_parallel: GPUs of one copy of the model, and copies behind the one address.
    """
    on_cpu = not torch.cuda.is_available()
    adapters = "--enable-lora" in role.arguments  # each API process has its own list of them
    if data_parallel > 1 and not adapters:
        command = [sys.executable, "-m", "rlkd.servers.data_parallel", role.model]
    else:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", role.model]
    command += ["--served-model-name", role.name, "--host", host, "--port", str(port)]
    command += ["--middleware", "rlkd.servers.auth.KeyGuard"]
    command += ["--dtype", "float32" if on_cpu and config.dtype == "auto" else config.dtype]
    command += ["--max-model-len", str(config.max_model_len or role.max_model_len)]
    command += ["--generation-config", "vllm"]  # a model's own top-p or top-k must not slip into a request
    if on_cpu:
        # In bytes: vLLM's own variable, VLLM_CPU_KVCACHE_SPACE, accepts only whole GiB, and takes precedence where it
        # is set.
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(round(config.kv_cache_gb * 2**30))]
    else:
        command += ["--gpu-memory-utilization", str(config.memory)]
    if tensor_parallel > 1:
        command += ["--tensor-parallel-size", str(tensor_parallel)]
    if data_parallel > 1:
        command += ["--data-parallel-size", str(data_parallel)]
    return [*command, *role.arguments, *config.extra_args]


def server_environment(
    role: ServerRole, config: ServerConfig, *, host: str, key: str, cores: str | None = None
) -> dict[str, str]:
    """This process's environment, adapted to a server.

    Args:
        cores: the CPU cores of a CPU server, e.g. "4-7"; None: vLLM's choice.
    """
    variables = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.fullmatch(name)}
    variables |= {
        VARIABLE: key,
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that update weights
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": host,
    }
    if role.padding:
        variables[plugin.VARIABLE] = str(role.padding.start)
    if os.path.isdir(role.model):
        variables["HF_HUB_OFFLINE"] = "1"
    if not torch.cuda.is_available():
        variables.pop("VLLM_CPU_KVCACHE_SPACE", None)
        if cores is not None:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = cores
    return variables | dict(role.environment)
