"""What can be known to be wrong before a model is loaded: paths, vocabularies, lengths, data, rewards, servers."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from rlkd import lora
from rlkd.config import Config, DataConfig, ServedTeacher, ServerConfig
from rlkd.data.chat import first_difference, load_tokenizer
from rlkd.data.prompts import PromptStream
from rlkd.data.sources import load_source
from rlkd.evaluate import heldout
from rlkd.export import rehearse
from rlkd.output_layer import logit_transform
from rlkd.resume import checkpoints
from rlkd.rewards import registry
from rlkd.rollout.client import ServerError, VLLMClient
from rlkd.rollout.sampler import end_ids
from rlkd.rollout.server import server_key
from rlkd.rollout.vllm import longest
from rlkd.teachers.served import teacher_longest
from rlkd.tiny import resolve

_ANSWER_S = 5.0
"""Patience with a server that should be running."""


def check(config: Config) -> list[str]:
    """What would stop the run `config`, one line each with its dotted key; empty: nothing that is known beforehand.

    Loads configurations and tokenizers of the models, and the data, but no weights. Safe on all ranks at once.
    """
    problems = _run_directory(config) + _devices(config)
    lengths = config.algorithm.trained_lengths(config)
    student = _model("model.path", config.model.path, config.model.trust_remote_code, lengths, problems)
    lengths = config.algorithm.teacher_lengths(config)
    for key, settings in config.teachers:
        teacher = _model(f"{key}.path", settings.path, config.model.trust_remote_code, lengths, problems)
        difference = first_difference(student, teacher) if student is not None and teacher is not None else None
        if difference is not None:
            problems.append(
                f"{key}.path: {settings.path} has another vocabulary than model.path: {difference}; token "
                "ids are compared one by one, so both must agree (model.path is the first)"
            )
    if student is not None:
        problems += _generation(config) + _export(config, student) + _data(config, student)
    problems += [f"reward.functions: {line}" for line in registry.check(config.reward.functions)]
    return problems + _servers(config)


def check_evaluation(config: Config) -> list[str]:
    """What would stop `rlkd.evaluate`, one line each; empty: nothing that is known beforehand."""
    if heldout(config) is None:
        return ["eval.path: got nothing, wants held-out data"]
    problems: list[str] = []
    lengths = config.algorithm.trained_lengths(config)
    student = _model("model.path", config.model.path, config.model.trust_remote_code, lengths, problems)
    if student is not None:
        problems += _data(config, student)
    problems += [f"reward.functions: {line}" for line in registry.check(config.reward.functions)]
    return problems + _servers(config)


def _generation(config: Config) -> list[str]:
    """The student must say how completions end and how its logits are made, and have the layers to be adapted."""
    try:
        end_ids(config.model.path)
        known = AutoConfig.from_pretrained(resolve(config.model.path), trust_remote_code=config.model.trust_remote_code)
        logit_transform(known)
        if config.model.lora is not None:
            frozen = lora.unadapted(lora.skeleton(config.model), config.model.lora)
            launched = config.publishes_adapter and config.rollout.server.launch and not torch.cuda.is_available()
            if launched and any("experts" in name.split(".") for name in frozen):
                raise ValueError(
                    "model.lora: vLLM serves no adapters of a mixture of experts on a CPU (its kernel for them is a "
                    "GPU's); use rollout.backend: hf, or a GPU"
                )
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        return [line if line.startswith("model.") else f"model.path: {line}"]
    return []


def _export(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What would make the export fail when all is trained."""
    if not config.checkpoint.export:
        return []
    try:
        rehearse(config, tokenizer)
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        return [f"checkpoint.export: the student could not be exported: {line}; correct {config.model.path}"]
    return []


def _run_directory(config: Config) -> list[str]:
    """Only what a training run writes counts: another rank of this run may just have made the directory."""
    resume, folder = config.run.resume, Path(config.run_dir)
    if resume == "never":
        if Path(folder, "metrics.jsonl").exists() or checkpoints(folder):
            return [
                f"run.name: {folder} holds a run already; go on with it by run.resume=auto, or choose another run.name"
            ]
    elif resume != "auto" and not Path(resume).is_dir():
        names = ", ".join(str(path) for path in checkpoints(folder)[-3:])
        hint = f"; {folder} has {names}" if names else ""
        return [f"run.resume: no checkpoint {resume}; wants never, auto, or the folder of a checkpoint{hint}"]
    return []


def _devices(config: Config) -> list[str]:
    problems = []
    started = int(os.environ.get("WORLD_SIZE", config.world_size))  # set by torchrun
    if started != config.world_size:
        problems.append(
            f"trainer.devices: torchrun started {started} processes, but trainer.devices × trainer.num_nodes is "
            f"{config.trainer.devices} × {config.trainer.num_nodes}; make them agree"
        )
    gpus = torch.cuda.device_count()
    if config.trainer.accelerator == "gpu" and config.trainer.devices > gpus:
        problems.append(
            f"trainer.devices: is {config.trainer.devices} with trainer.accelerator gpu, but this node has {gpus}; "
            "lower it, or set trainer.accelerator: cpu"
        )
    launches: dict[str, ServerConfig] = {"rollout.server.launch": config.rollout.server}
    if isinstance(config.teacher, ServedTeacher):
        launches["teacher.server.launch"] = config.teacher.server
    for key, launch in launches.items():
        if launch.launch and config.trainer.num_nodes > 1 and _is_loopback(launch.host):
            problems.append(
                f"{key.replace('launch', 'host')}: is {launch.host}, which the other nodes of trainer.num_nodes = "
                f"{config.trainer.num_nodes} cannot reach; give an address of the first node, or start servers by "
                "python -m rlkd.serve and give their urls"
            )
        if launch.launch and importlib.util.find_spec("vllm") is None:
            problems.append(f"{key}: vllm is not installed in this environment; pip install 'rlkd[vllm]'")
    return problems


def _model(
    key: str, path: str, trust_remote_code: bool, lengths: Mapping[str, int], problems: list[str]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None where something is wrong, which is then added to `problems`.

    `lengths`: key → tokens, which together the model must have room for.
    """
    try:
        folder = resolve(path)
    except ValueError as error:
        problems.append(f"{key}: {error}")
        return None
    if not Path(folder).is_dir() and (folder[:1] in "/.~" or folder.count("/") > 1):
        hint = " (~ is not expanded here)" if folder.startswith("~") else ""
        problems.append(f"{key}: no folder {folder}{hint}")
        return None
    if Path(folder).is_dir() and not Path(folder, "config.json").is_file():
        problems.append(f"{key}: {path} has no config.json; wants a model folder in Hugging Face form")
        return None
    try:
        model = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(path, trust_remote_code)
    except (OSError, ValueError) as error:
        what = path if Path(folder).is_dir() else f"{path} is no folder here, and as a hub id"
        problems.append(f"{key}: {what}: {' '.join(str(error).split())[:300]}")
        return None
    limit = _positions(model)
    longest = sum(lengths.values())
    if limit is not None and longest > limit:
        problems.append(
            f"{list(lengths)[-1]}: {' + '.join(lengths)} = {longest}, but {key} {path} has {limit} positions; lower "
            "one of them"
        )
    return tokenizer


def _positions(model: Any) -> int | None:
    """The longest sequence that a model knows; None where its architecture has no such bound."""
    limit = getattr(model.get_text_config(), "max_position_embeddings", None)  # a state-space model has none
    return None if limit is None else int(limit)


def _data(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    problems = []
    sources: list[tuple[str, DataConfig]] = [("data.path", config.data)]
    held_out = heldout(config)
    if held_out is not None and config.eval.every > 0:
        sources.append(("eval.path", held_out))
    for key, source in sources:
        try:
            prompts = load_source(source, tokenizer)
            if key == "data.path":
                blocks = config.algorithm.sampling_rounds
                PromptStream(prompts, seed=0).take(0, config.rollout.prompts, blocks=blocks)  # enough of them?
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return problems


def _servers(config: Config) -> list[str]:
    """Asks servers that should be running already who they are."""
    asked: list[tuple[str, str, ServerConfig, str, int]] = []
    policy = config.rollout.server
    if config.rollout.backend == "vllm":
        asked += [("rollout.server.urls", url, policy, config.model.path, longest(config)) for url in policy.urls]
    asked += [
        (f"{key}.{'url' if teacher.urls == [] else 'urls'}", url, teacher.server, teacher.path, teacher_longest(config))
        for key, teacher in config.teachers
        if isinstance(teacher, ServedTeacher)
        for url in teacher.addresses
    ]
    problems = []
    for key, url, server, path, tokens in asked:
        if not url.startswith(("http://", "https://")):
            problems.append(f"{key}: got {url!r}, wants an address such as http://host:8000")
            continue
        try:
            _ask(VLLMClient(url, _ANSWER_S, server_key(server)), path, tokens, trains=key.startswith("rollout"))
            if not server.allow_open and not _is_loopback(urlsplit(url).hostname or ""):
                _refuse_open(url)
        except (ServerError, httpx.InvalidURL) as error:
            problems.append(f"{key}: {' '.join(str(error).split())}")
    return problems


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name that does not resolve is nobody's loopback."""
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _refuse_open(url: str) -> None:
    """Raises: ServerError when whoever reaches the server may change its weights.

    vLLM's own --api-key leaves these routes open.
    """
    stranger = VLLMClient(url, _ANSWER_S)
    try:
        stranger.order("/weight_info", method="GET")
    except ServerError:
        return
    finally:
        stranger.close()
    raise ServerError(
        f"{url} lets everybody who reaches it change its weights: start it by python -m rlkd.serve, which asks for a "
        "key on every route, or accept it by server.allow_open=true"
    )


def _ask(client: VLLMClient, path: str, tokens: int, trains: bool) -> None:
    """Raises: ServerError, one line, when the server is not the one that is wanted."""
    try:
        if not client.healthy():
            raise ServerError(
                f"no healthy server at {client.url} (GET /health, {_ANSWER_S:g} s); start it, or correct the address"
            )
        client.model_card(resolve(path), tokens)
        if trains:
            client.weight_version()  # only a server in dev mode takes new weights
    finally:
        client.close()
