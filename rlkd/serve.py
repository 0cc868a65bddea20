"""python -m rlkd.serve --config X.yaml --role policy|teacher --host ADDRESS --port P [key=value …]

Starts a vLLM server for trainers on this or any other machine, with the settings of their own configuration (model,
lengths, log-probs, weight updates, the key). Prints the command, which contains no secret, and then executes it.
"""

from __future__ import annotations

import errno
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from rlkd.command_line import Command, Words, config_option, missing_config, run
from rlkd.config.schema import WILDCARDS, Config, ServedTeacherConfig, ServerConfig
from rlkd.config_file import ConfigError, load_stages

if TYPE_CHECKING:  # modules that import torch are imported after the configuration is checked
    from rlkd.servers.command import ServerRole


def server_of(config: Config, role: str) -> tuple[ServerRole, ServerConfig]:
    """How the policy's or the teacher's server of `config` is started.

    Raises: ValueError, one line, if the configuration has no such server.
    """
    if role == "policy":
        if config.rollout.backend != "vllm":
            raise ValueError(
                "rollout.backend: expected vllm, got hf, which samples in the trainer; set vllm to serve the policy"
            )
        from rlkd.generation.vllm import policy_role

        # Trainers reach it by its address, so `weight_sync: auto` must mean here what it means there with urls.
        server = config.rollout.server.model_copy(update={"launch": False})
        rollout = config.rollout.model_copy(update={"server": server})
        return policy_role(config.model_copy(update={"rollout": rollout})), server
    if not isinstance(config.teacher, ServedTeacherConfig):
        raise ValueError(
            f"teacher.backend: expected served, got {config.teacher.backend}; set served to serve the teacher"
        )
    from rlkd.teachers.served import teacher_role

    return teacher_role(config, config.teacher), config.teacher.server


def plan(
    config: Sequence[str],
    words: Sequence[str],
    role: str,
    host: str,
    port: int,
    tensor_parallel: int,
    data_parallel: int,
) -> tuple[list[str], dict[str, str]]:
    """The vLLM command line and its environment.

    Raises: ConfigError for a wrong configuration; ValueError, one line, if it has no such server, if its stages
        need different servers, if trainers cannot reach the address, or if the server would have no key.
    """
    if not config:
        raise missing_config(words)
    servers = [server_of(stage.loaded.config, role) for stage in load_stages(config, words)]
    started, settings = servers[0]
    if any(other != servers[0] for other in servers[1:]):
        raise ValueError(
            f"stages: expected one {role} server, got different ones; set launch: true, and each stage starts its own"
        )
    if host in WILDCARDS:
        raise ValueError(f"--host: expected an address at which trainers reach this machine, got {host!r}; name one")
    from rlkd.servers.command import server_command, server_environment
    from rlkd.servers.process import server_key

    key = server_key(settings)
    if key is None:
        raise ValueError(
            f"{settings.key_env}: expected the key that the server asks callers for, got nothing; make one, e.g. by "
            "openssl rand -hex 16, and set it here and for the trainers"
        )
    command = server_command(
        started, settings, host=host, port=port, tensor_parallel=tensor_parallel, data_parallel=data_parallel
    )
    return command, server_environment(started, settings, host=host, key=key)


def require_free(host: str, port: int) -> None:
    """Raises: ValueError, one line, if a server cannot listen there; vLLM would find out after half a minute."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
            probe.bind((host, port))
    except OverflowError as error:
        raise ValueError(f"--port: expected a port from 1 to 65535, got {port}") from error
    except OSError as error:
        flag, asked = ("--port", port) if error.errno in (errno.EADDRINUSE, errno.EACCES) else ("--host", host)
        what = "a free port of this machine" if flag == "--port" else "an address of this machine"
        raise ValueError(f"{flag}: expected {what}, got {asked} ({error.strerror}); choose another one") from error


def serve(**given: Any) -> int:
    """Replace this process by the server; `given` is what `plan` takes. Returns: 2 if it cannot be started."""
    try:
        line, environment = plan(**given)
        require_free(given["host"], given["port"])
    except ConfigError:
        raise
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(shlex.join(line), flush=True)
    os.execve(line[0], line, environment)


command = Command(
    "serve",
    params=[
        config_option(),
        click.Option(["--role"], required=True, type=click.Choice(["policy", "teacher"]), help="which model is served"),
        click.Option(["--host"], required=True, help="address at which trainers reach this machine"),
        click.Option(["--port"], required=True, type=int),
        click.Option(["--tensor-parallel"], default=1, metavar="N", help="GPUs that share one copy; by default 1"),
        click.Option(["--data-parallel"], default=1, metavar="M", help="copies behind the one address; by default 1"),
        Words("words"),
    ],
    callback=serve,
    help="Start the vLLM server that the trainers' configuration describes.",
)


def main(argv: Sequence[str]) -> int:
    """Replace this process by the server. Returns: 2 if it cannot be started, with one line per mistake on stderr."""
    return run(command, argv, "python -m rlkd.serve")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
