"""python -m rlkd.serve --config X.yaml --role policy|teacher --host ADDRESS --port P [key=value …]

A vLLM server for trainers on this or any other machine, with all that they will ask of it (model, lengths, log-probs,
weight updates, the key) from their own configuration. Prints the command, which holds no secret, and becomes it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlkd.config.schema import WILDCARDS, Config, ServedTeacherConfig, ServerConfig
from rlkd.config_file import ConfigError, load_stages

if TYPE_CHECKING:  # what imports torch is imported once the configuration is right
    from rlkd.servers.command import ServerRole


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = argparse.ArgumentParser(prog="rlkd.serve", description="A vLLM server as a configuration wants it.")
    known.add_argument("--config", action="append", required=True, metavar="X.yaml", help="the trainers' own; repeat")
    known.add_argument("--role", required=True, choices=("policy", "teacher"), help="whose model is served")
    known.add_argument("--host", required=True, help="address of this machine at which trainers reach the server")
    known.add_argument("--port", required=True, type=int)
    known.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs that share one copy")
    known.add_argument("--data-parallel", type=int, default=1, metavar="M", help="copies behind the one address")
    known.add_argument("overrides", nargs="*", metavar="key=value", help="the trainers' own")
    return known


def server_of(config: Config, role: str) -> tuple[ServerRole, ServerConfig]:
    """What the policy's or the teacher's server of `config` is started as.

    Raises: ValueError, one line, where the configuration has no such server.
    """
    if role == "policy":
        if config.rollout.backend != "vllm":
            raise ValueError("rollout.backend: is hf, which samples in the trainer; set it to vllm to serve the policy")
        from rlkd.generation.vllm import policy_role

        return policy_role(config), config.rollout.server
    if not isinstance(config.teacher, ServedTeacherConfig):
        raise ValueError(f"teacher.backend: is {config.teacher.backend}; set it to served to serve the teacher")
    from rlkd.teachers.served import teacher_role

    return teacher_role(config, config.teacher), config.teacher.server


def plan(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The vLLM command line and its environment.

    Raises: ConfigError for a wrong configuration; ValueError, one line, for one that has no such server, for stages
        that want different ones, for an address that nobody could reach, and where the server would have no key.
    """
    args = parser().parse_intermixed_args(argv)
    servers = [server_of(stage.loaded.config, args.role) for stage in load_stages(args.config, args.overrides)]
    role, config = servers[0]
    if any(other != servers[0] for other in servers[1:]):
        raise ValueError(f"stages: want different {args.role} servers; set launch: true, and each starts its own")
    if args.host in WILDCARDS:
        raise ValueError(f"--host: got {args.host!r}, wants the address of this machine at which trainers reach it")
    from rlkd.servers.command import server_command, server_environment
    from rlkd.servers.process import server_key

    key = server_key(config)
    if key is None:
        raise ValueError(
            f"{config.key_env}: not set; the server asks every caller for a key: choose one, e.g. by openssl rand -hex "
            "16, and set it here and for the trainers"
        )
    command = server_command(
        role,
        config,
        host=args.host,
        port=args.port,
        tensor_parallel=args.tensor_parallel,
        data_parallel=args.data_parallel,
    )
    return command, server_environment(role, config, host=args.host, key=key)


def main(argv: Sequence[str]) -> int:
    """Becomes the server. Returns: 2, for what cannot be started; why is on stderr, a line each."""
    try:
        command, environment = plan(argv)
    except ConfigError as error:
        print("\n".join(error.lines), file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(shlex.join(command), flush=True)
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
