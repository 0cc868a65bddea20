"""Checks before a model is loaded: paths, vocabularies, lengths, data, rewards, servers."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedTokenizerBase

from rlkd.algorithms.registry import build_algorithm
from rlkd.builtin import resolve
from rlkd.config.schema import Config, DataConfig, ServedTeacherConfig, ServerConfig
from rlkd.data.chat import first_difference, load_tokenizer, mentions
from rlkd.data.faults import DataError
from rlkd.data.heldout import heldout, part_of
from rlkd.data.mixture import load_training_data
from rlkd.data.sources import load_source
from rlkd.data.split import Part
from rlkd.generation.sampler import eos_ids
from rlkd.generation.vllm import longest
from rlkd.losses.lm_head import logit_transform
from rlkd.models import lora
from rlkd.models.found import find
from rlkd.models.vocabulary import embedding_rows, load_config, vocabulary_size
from rlkd.planning.first_look import run_directory
from rlkd.planning.gpu_plan import gpu_memory, gpu_plan, room_problems, too_many_trainers
from rlkd.rewards import registry
from rlkd.rewards.answers import check_answers
from rlkd.run.export import rehearse
from rlkd.run.tracking import tracking_problems
from rlkd.servers.client import ServerError, VLLMClient
from rlkd.servers.placement import weight_sync
from rlkd.servers.process import server_key
from rlkd.teachers.served import teacher_longest
from rlkd.types import Prompt

_ANSWER_S = 5.0
"""Time limit for a server that should be running already."""


def check(config: Config) -> list[str]:
    """Problems that would stop the run, one line each with its dotted key; empty if none is found.

    Loads configurations and tokenizers of the models, and the data, but no weights. Safe on all ranks at once.
    """
    problems = run_directory(config) + _devices(config) + tracking_problems(config)
    lengths = config.algorithm.trained_lengths(config)
    trusted = config.model.trust_remote_code
    student = _model("model.path", config.model.path, trusted, lengths, problems)
    found_all = student is not None
    lengths = config.algorithm.teacher_lengths(config)
    for key, settings in config.teachers:
        served = isinstance(settings, ServedTeacherConfig)
        teacher = _model(f"{key}.path", settings.path, trusted, lengths, problems, loaded_here=not served)
        found_all = found_all and teacher is not None
        # A scorer on a server needs its end tokens too.
        if teacher is not None and (served or config.algorithm.teacher_writes):
            try:
                eos_ids(settings.path, trusted)
            except (ValueError, OSError) as error:
                problems.append(f"{key}.path: {' '.join(str(error).split())}")
        difference = first_difference(student, teacher) if student is not None and teacher is not None else None
        if difference is not None:
            problems.append(
                f"{key}.path: expected the vocabulary of model.path, since token ids are compared, got that of "
                f"{settings.path}: {difference} (model.path is the first); choose another teacher"
            )
        elif student is not None and teacher is not None:
            problems += _fewer_rows(config, key, settings.path)
    if found_all and _first_node(config):
        problems += room_problems(config, torch.cuda.device_count()) + gpu_plan(config, gpu_memory()).memory_problems()
    if student is not None:
        problems += _generation(config) + _export(config, student) + _template(config, student)
        problems += _prompts(config, student)
    problems += [f"reward.functions: {line}" for line in registry.check(config.reward.functions)]
    return problems + _server_lengths(config) + _servers(config)


def check_evaluation(benchmarks: Mapping[str, Config]) -> list[str]:
    """Problems that would stop `rlkd evaluate`, one line each; empty if none is found.

    `benchmarks`: name → configuration; they differ only in their held-out data.
    """
    config = next(iter(benchmarks.values()))
    if heldout(config) is None:
        return ["eval.path: expected held-out data, got nothing; set eval.path=FILE, or --data FILE"]
    plan = gpu_plan(config, gpu_memory(), roles=["policy"])
    problems = _vllm(["rollout.server"] if config.rollout.server.launch else []) + plan.problems()
    lengths = config.algorithm.trained_lengths(config)
    student = _model("model.path", config.model.path, config.model.trust_remote_code, lengths, problems)
    if student is not None:
        problems += _generation(config) + _template(config, student)
        for one in benchmarks.values():
            problems += _prompts(one, student, training=False)
    problems += [f"reward.functions: {line}" for line in registry.check(config.reward.functions)]
    own = "to start a server for the evaluation: rollout.server.urls=[] rollout.server.launch=true"
    return problems + [f"{line}; {own}" if "rollout.server.urls" in line else line for line in _servers(config)]


def check_generation(config: Config) -> list[str]:
    """Problems that would stop `rlkd.generate`, one line each; empty if none is found."""
    plan = gpu_plan(config, gpu_memory(), roles=["policy"])
    problems = _vllm(["rollout.server"] if config.rollout.server.launch else []) + plan.problems()
    lengths = {"data.max_prompt_tokens": config.data.max_prompt_tokens, "rollout.max_tokens": config.rollout.max_tokens}
    if _model("model.path", config.model.path, config.model.trust_remote_code, lengths, problems) is not None:
        problems += _generation(config)
    return problems + _servers(config)


def _fewer_rows(config: Config, key: str, path: str) -> list[str]:
    """A teacher must have an embedding for every token of the student."""
    tokens, rows = vocabulary_size(config.model), embedding_rows(path, config.model.trust_remote_code)
    if rows >= tokens:
        return []
    return [
        f"{key}.path: expected embeddings for the student's {tokens} tokens, got {rows} in "
        f"{path}; choose another teacher"
    ]


def _generation(config: Config) -> list[str]:
    """The student's files must define its end tokens and its logits, and it must have the layers to be adapted."""
    model = config.model
    try:
        eos_ids(model.path, model.trust_remote_code)
        known = load_config(model.path, model.trust_remote_code)
        logit_transform(known)
        if model.fp32_head and config.rollout.backend == "vllm" and hasattr(known, "quantization_config"):
            raise ValueError(
                "model.fp32_head: vLLM computes logits in fp32 only if the output layer is not quantised, got the "
                f"quantised model {model.path}; set it to false"
            )
        if config.model.lora is not None:
            frozen = lora.unadapted(lora.skeleton(config.model), config.model.lora)
            launched = config.publishes_adapter and config.rollout.server.launch and not torch.cuda.is_available()
            if launched and any("experts" in name.split(".") for name in frozen):
                raise ValueError(
                    "model.lora: vLLM serves no adapters of a mixture of experts on a CPU (it has a kernel only for "
                    "GPUs); use rollout.backend: hf, or a GPU"
                )
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        return [line if line.startswith("model.") else f"model.path: {line}"]
    return []


def _export(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Problems that would make the export fail after the training."""
    if not config.checkpoint.export:
        return []
    try:
        rehearse(config, tokenizer)
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        return [f"checkpoint.export: the student could not be exported: {line}; correct {config.model.path}"]
    return []


def _devices(config: Config) -> list[str]:
    problems = []
    started = int(os.environ.get("WORLD_SIZE", config.world_size))  # set by torchrun
    if started != config.world_size:
        problems.append(
            f"trainer.devices: torchrun started {started} processes, but trainer.devices × trainer.num_nodes is "
            f"{config.trainer.devices} × {config.trainer.num_nodes}; make them agree"
        )
    problems += too_many_trainers(config, torch.cuda.device_count())
    for key, launch in _launched(config).items():
        if config.trainer.num_nodes > 1 and _is_loopback(launch.host):
            problems.append(
                f"{key}.host: is {launch.host}, which the other nodes of trainer.num_nodes = "
                f"{config.trainer.num_nodes} cannot reach; give an address of the first node, or start servers by "
                "python -m rlkd.serve and give their urls"
            )
    if _first_node(config):
        problems += _vllm(_launched(config)) + gpu_plan(config, gpu_memory()).problems()
    return problems


def _launched(config: Config) -> dict[str, ServerConfig]:
    """section → settings of the servers that the run starts."""
    servers: dict[str, ServerConfig] = {"rollout.server": config.rollout.server}
    if isinstance(config.teacher, ServedTeacherConfig):
        servers["teacher.server"] = config.teacher.server
    return {key: server for key, server in servers.items() if server.launch}


def _vllm(servers: Iterable[str]) -> list[str]:
    if importlib.util.find_spec("vllm") is not None:
        return []
    return [f"{key}.launch: vllm is not installed in this environment; pip install 'rlkd[vllm]'" for key in servers]


def _first_node(config: Config) -> bool:
    """Whether this process is on the node that starts the servers."""
    return int(os.environ.get("RANK", "0")) < config.trainer.devices


def _model(
    key: str,
    path: str,
    trust_remote_code: bool,
    lengths: Mapping[str, int],
    problems: list[str],
    *,
    loaded_here: bool = True,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None if there is a problem, which is added to `problems`.

    `lengths`: key → tokens; their sum must fit into the model. `loaded_here`: whether transformers loads it as a causal
    language model. A server may have other models, such as Qwen3-VL, and checks them itself.
    """
    try:
        folder = find(path)
    except ValueError as error:
        problems.append(f"{key}: {error}")
        return None
    kind, its_code = _kind(folder)
    if kind is not None and kind not in CONFIG_MAPPING and not its_code:
        problems.append(
            f"{key}: expected a model that transformers {transformers.__version__} knows, got {path} of type {kind}; "
            "install a version that knows it, or use another model"
        )
        return None
    try:
        model = load_config(path, trust_remote_code)
        tokenizer = load_tokenizer(path, trust_remote_code)
    except Exception as error:  # a model's files and code may raise anything
        what = path if Path(folder).is_dir() else f"{path} is no folder here, and as a hub id"
        problems.append(f"{key}: {what}: {' '.join(str(error).split())[:300]}")
        return None
    its_own = trust_remote_code and "AutoModelForCausalLM" in getattr(model, "auto_map", {})
    if loaded_here and type(model) not in MODEL_FOR_CAUSAL_LM_MAPPING and not its_own:
        problems.append(
            f"{key}: expected a model that writes text from left to right, got {path} of type {model.model_type}, for "
            "which transformers has no causal language model"
        )
        return None
    limit = _positions(model)
    longest = sum(lengths.values())
    if limit is not None and longest > limit:
        problems.append(
            f"{list(lengths)[-1]}: {' + '.join(lengths)} = {longest}, but {key} {path} has {limit} positions; lower "
            "one of them"
        )
    return tokenizer


def _kind(folder: str) -> tuple[str | None, bool]:
    """(the architecture that the config.json of a folder names, whether the folder has code for it).

    (None, False) if it names none, or is not in this folder or no JSON, which transformers reports.
    """
    try:
        settings = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, False
    return (settings.get("model_type"), "auto_map" in settings) if isinstance(settings, dict) else (None, False)


def _positions(model: Any) -> int | None:
    """The maximum length of a sequence; None if the architecture has none."""
    limit = getattr(model.get_text_config(), "max_position_embeddings", None)  # a state-space model has none
    return None if limit is None else int(limit)


def _prompts(config: Config, tokenizer: PreTrainedTokenizerBase, *, training: bool = True) -> list[str]:
    """Problems with the held-out data, and with those to train on."""
    problems: list[str] = []
    sources: list[tuple[str, DataConfig, Part | None]] = []
    if training:
        sources.append(("data.path", config.data, part_of(config, held_out=False)))
    held_out = heldout(config)
    if held_out is not None and config.eval.every > 0:
        key = "eval.path" if config.eval.fraction is None else "eval.fraction"
        sources.append((key, held_out, part_of(config, held_out=True)))
    try:
        ends = eos_ids(config.model.path, config.model.trust_remote_code)
    except (ValueError, OSError):
        ends = ()  # reported by _generation
    for key, source, rows in sources:
        try:
            data = load_training_data(source, tokenizer, ends, rows) if key == "data.path" else None
            prompts = load_source(source, tokenizer, ends=ends, part=rows) if data is None else data.prompts
        except DataError as error:
            problems += [f"{key}: {line}" for line in error.lines]
            if rows is not None:
                break  # the other part of the same data has the same faults
            continue
        problems += _answers(config, key, prompts)
        try:
            if data is not None:
                data.check(config.rollout.prompts, config.algorithm.sampling_rounds)
            _check_embedded(prompts, vocabulary_size(config.model), tokenizer)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return problems


def _check_embedded(prompts: Sequence[Prompt], vocabulary: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: ValueError, one line, for token ids in the data without an embedding in the student."""
    beyond = {
        prompt.id: highest
        for prompt in prompts
        if (highest := max((*prompt.token_ids, *(prompt.completion or ()), *(prompt.rejected or ())))) >= vocabulary
    }
    if beyond:
        name, token = next(iter(beyond.items()))
        raise ValueError(
            f"prompt {name[:80]!r} has token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), but the model has "
            f"embeddings for {vocabulary} tokens only; resize its embeddings, or take the tokenizer that belongs to it "
            f"({len(beyond)} prompts have such tokens)"
        )


def _template(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The chat template must have the variables that the config gives it."""
    names = config.data.template_variables
    if not names:
        return []
    if not config.data.chat_template:
        return ["data.template_variables: has values, but data.chat_template is false; drop one of the two"]
    if tokenizer.chat_template is None:
        return []  # reported by load_source
    return [
        f"data.template_variables: has {name}, which the chat template of {config.model.path} never reads; correct or "
        "remove it"
        for name in names
        if not mentions(tokenizer, name, tools=config.data.tools_column is not None)
    ]


def _answers(config: Config, key: str, prompts: Sequence[Prompt]) -> list[str]:
    """Answers in the data of `key` that its rewards cannot use; none if the algorithm needs no rewards."""
    if not build_algorithm(config).needs_rewards:
        return []
    rows = ((prompt.id, prompt.answer) for prompt in prompts)
    return [f"{key}: {line}" for line in check_answers(config.reward.functions, rows)]


def _server_lengths(config: Config) -> list[str]:
    """Servers that would be started too short for what they are asked."""
    lengths: dict[str, tuple[ServerConfig, int]] = {}
    if config.rollout.server.launch:
        lengths["rollout.server"] = (config.rollout.server, longest(config))
    if isinstance(config.teacher, ServedTeacherConfig) and config.teacher.server.launch:
        lengths["teacher.server"] = (config.teacher.server, teacher_longest(config))
    return [
        f"{key}.max_model_len: is {server.max_model_len}, but the longest sequence has {tokens} tokens; raise it, or "
        "set it to null"
        for key, (server, tokens) in lengths.items()
        if server.max_model_len is not None and server.max_model_len < tokens
    ]


def _servers(config: Config) -> list[str]:
    """Check the servers that should be running already."""
    asked: list[tuple[str, str, ServerConfig, str, int]] = []
    policy = config.rollout.server
    if config.rollout.backend == "vllm":
        asked += [("rollout.server.urls", url, policy, config.model.path, longest(config)) for url in policy.urls]
    asked += [
        (f"{key}.{'url' if teacher.urls == [] else 'urls'}", url, teacher.server, teacher.path, teacher_longest(config))
        for key, teacher in config.teachers
        if isinstance(teacher, ServedTeacherConfig)
        for url in teacher.addresses
    ]
    problems = []
    for key, url, server, path, tokens in asked:
        if not url.startswith(("http://", "https://")):
            problems.append(f"{key}: expected an address such as http://host:8000, got {url!r}")
            continue
        try:
            _ask(VLLMClient(url, _ANSWER_S, server_key(server)), path, tokens, trains=key.startswith("rollout"))
            if not server.allow_open and not _is_loopback(urlsplit(url).hostname or ""):
                _refuse_open(url)
            if key.startswith("rollout") and policy.sync_dir is None and weight_sync(config) == "file":
                _refuse_elsewhere(url)
        except (ServerError, httpx.InvalidURL) as error:
            problems.append(f"{key}: {' '.join(str(error).split())}")
    return problems


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; False for a name that does not resolve."""
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _refuse_elsewhere(url: str) -> None:
    """Raises: ServerError if the server is on another machine, which cannot read the memory of this one."""
    address = socket.getaddrinfo(urlsplit(url).hostname, None)[0][4][0]
    family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            raise ServerError(
                f"{url} is on another machine, but weights are written to this one's memory; set "
                "rollout.server.sync_dir to a folder on a disk that both share"
            ) from None


def _refuse_open(url: str) -> None:
    """Raises: ServerError if the server accepts new weights from anyone.

    vLLM's own --api-key does not protect these routes.
    """
    stranger = VLLMClient(url, _ANSWER_S)
    try:
        stranger.order("/weight_info", method="GET")
    except ServerError:
        return
    finally:
        stranger.close()
    raise ServerError(
        f"{url} accepts new weights from anyone who can reach it: start it by python -m rlkd.serve, which requires a "
        "key on every route, or accept it by server.allow_open=true"
    )


def _ask(client: VLLMClient, path: str, tokens: int, trains: bool) -> None:
    """Raises: ServerError, one line, if it is not the expected server."""
    try:
        if not client.healthy():
            raise ServerError(
                f"no healthy server at {client.url} (GET /health, {_ANSWER_S:g} s); start it, or correct the address"
            )
        client.model_card(resolve(path), tokens)
        if trains:
            client.weight_version()  # only a server in dev mode accepts new weights
    finally:
        client.close()
