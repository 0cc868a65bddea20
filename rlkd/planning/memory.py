"""python -m rlkd.train --estimate[=GIB] …: the memory that a configuration needs, before anything is started.

Reads the models' config.json and no weights. What is resident (weights, optimizer, gradients, copies) is exact up to
small buffers; activations and temporaries are an estimate, and so is what a library keeps in reserve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rlkd.algorithms.registry import build_algorithm
from rlkd.config.schema import (
    Config,
    LocalTeacherConfig,
    NoTeacherConfig,
    SelfTeacherConfig,
    ServedTeacherConfig,
    ServerConfig,
)
from rlkd.generation.vllm import longest
from rlkd.models.logprob_head import CHUNK_LOGITS, VOCABULARY_CHUNK
from rlkd.models.lora import layers, skeleton
from rlkd.models.student import blocks
from rlkd.models.vocabulary import load_config
from rlkd.teachers.served import teacher_longest

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2}
_TOKEN_CHUNK = 4096
"""Tokens whose logits TRL's kernel has at a time."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The properties of a model that determine its memory."""

    name: str
    """The architecture's name."""
    parameters: int
    largest_block: int
    """Parameters of the largest of the repeated layers, the unit of sharding."""
    largest_tensor: int
    """Parameters of the largest tensor: an embedding, or the fused experts of a layer."""
    outside: int
    """Parameters outside the repeated layers: embeddings, last norm, output layer."""
    output_layer: int
    """Parameters of the output layer's weight, V · H; a tied one counts once in `outside`."""
    vocabulary: int
    layers: int
    hidden: int
    intermediate: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together, and of all value heads."""
    dtype: str
    """The dtype in which the weights are saved."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some memory, and the reason for it."""

    bytes: float
    what: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process, and the device that it uses alone."""

    name: str
    resident: tuple[Part, ...]
    """Allocated all the time."""
    phases: tuple[Part, ...]
    """Allocated one at a time, on top of `resident`."""
    budget: float = 1.0
    """Share of the device that it may use."""

    @property
    def always(self) -> float:
        """Bytes."""
        return sum(part.bytes for part in self.resident)

    @property
    def peak(self) -> float:
        """Bytes."""
        return self.always + max((part.bytes for part in self.phases), default=0.0)


def shape_of(path: str, trust_remote_code: bool = False) -> Shape:
    """The shape of the model at `path`, built on the meta device: no weights are read, no memory is used.

    Raises: ValueError, one line, if there is no such model, or it has no attention heads.
    """
    try:
        return shape(load_config(path, trust_remote_code), trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from error


def shape(config: PreTrainedConfig, trust_remote_code: bool = False) -> Shape:
    """See `shape_of`. Tied weights are one parameter, as in training."""
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    known: dict[str, Any] = text.to_dict()
    missing = [name for name in ("num_attention_heads", "num_hidden_layers", "intermediate_size") if name not in known]
    if missing:
        raise ValueError(f"{text.model_type} has no {missing[0]}, so its memory cannot be estimated")
    heads = known["num_attention_heads"]
    head_width = known.get("head_dim") or text.hidden_size // heads
    per_block = [sum(p.numel() for p in block.parameters()) for block in blocks(hf)]
    total = sum(p.numel() for p in hf.parameters())
    return Shape(
        name=type(hf).__name__,
        parameters=total,
        largest_block=max(per_block),
        largest_tensor=max(p.numel() for p in hf.parameters()),
        outside=total - sum(per_block),
        output_layer=hf.get_output_embeddings().weight.numel(),
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        queries=heads * head_width,
        keys=(known.get("num_key_value_heads") or heads) * head_width,
        dtype=_saved(config),
    )


def kv_bytes(model: Shape, bytes_each: int) -> int:
    """Key-value cache of one token: a key and a value of every layer (GQA, arXiv 2305.13245: of fewer heads)."""
    return 2 * model.layers * model.keys * bytes_each


def block_activations(model: Shape, bytes_each: int) -> int:
    """What autograd keeps of one token in one dense, gated block, in bytes.

    The terms of Korthikanti et al. (arXiv 2205.05198, §4.1) for this block, without dropout and without the scores of
    attention, which fused attention does not keep: each norm its input in fp32, the normalised and the scaled one;
    attention its queries, keys, values, output and that output again before the projection; the gate, its activation,
    the other half and the product.
    """
    norms = 2 * model.hidden * (4 + 2 * bytes_each)
    attention = (3 * model.queries + 2 * model.keys) * bytes_each
    return norms + attention + 4 * model.intermediate * bytes_each


def trainer_place(config: Config) -> Place:
    """One trainer process: its shard of the student, and whatever else lives beside it.

    FSDP2 (`fully_shard`, arXiv 2304.11277 for the scheme): parameters, gradients and AdamW's two moments in fp32, all
    sharded. What is outside the blocks stays gathered through forward and backward, a block while it is computed, with
    the next one on its way.
    """
    model = shape_of(config.model.path, config.model.trust_remote_code)
    ranks = config.world_size
    shard = model.parameters / ranks
    split = f"{_billions(model.parameters)} parameters / {ranks}"
    trained = adapter_parameters(config) if config.model.lora is not None else model.parameters
    of_trained = split if config.model.lora is None else f"{_billions(trained)} in adapters / {ranks}"
    resident = [
        Part(bytes=4 * shard, what="master weights", why=f"4 B · {split}"),
        Part(bytes=8 * trained / ranks, what="AdamW's moments", why=f"2 · 4 B · {of_trained}"),
        Part(bytes=4 * trained / ranks, what="gradients", why=f"4 B · {of_trained}"),
        *_beside(config, model),
    ]
    if config.model.lora is not None:
        resident.append(Part(bytes=4 * trained / ranks, what="adapters", why=f"4 B · {of_trained}"))
    phases = [
        _training(config, model),
        Part(bytes=4 * trained / ranks, what="AdamW steps", why=f"4 B · {of_trained}, a temporary"),
        *_sampling(config, model),
        *_publishing(config, model, trained),
    ]
    name = f"student: each of {ranks} trainer processes, {model.name}"
    return Place(name=name, resident=tuple(resident), phases=tuple(phases))


def _publishing(config: Config, model: Shape, trained: int) -> list[Part]:
    """What every rank holds on top of its shard while weights are published, and while the student is exported.

    Weights are gathered one tensor at a time, so the largest one counts, in fp32 and in the dtype in which it leaves.
    That is too high for publishing without adapters, where a shard is cast before it is gathered. One rank alone
    gathers nothing.
    """
    largest = f"the largest tensor, {_billions(model.largest_tensor)} parameters"
    parts = []
    if config.world_size > 1 and config.publishes_adapter:
        parts.append(Part(bytes=4 * trained, what="publishing", why="the adapters in fp32, on every rank"))
    elif config.world_size > 1:
        each = _width(model.dtype, config.rollout.server) if config.rollout.backend == "vllm" else 4
        why = f"(4 + {each}) B · {largest}, on every rank"
        parts.append(Part(bytes=(4 + each) * model.largest_tensor, what="publishing", why=why))
    if config.checkpoint.export and (config.world_size > 1 or config.model.lora is not None):
        each, how = (4, "gathered") if config.model.lora is None else (8, "gathered, and merged with its adapter")
        why = f"{each} B · {largest}, {how}"
        parts.append(Part(bytes=each * model.largest_tensor, what="exporting", why=why))
    return parts


def published_bytes(config: Config, on_cpu: bool) -> int:
    """What `weight_sync: file` keeps in its directory: the published version, and the one that is being written.

    Weights are written in the servers' dtype; of adapters, in fp32, all versions that requests may still name.
    """
    if config.publishes_adapter:
        return 4 * adapter_parameters(config) * (config.rollout.max_staleness + 2)
    hf = skeleton(config.model)
    width = 4 if on_cpu and config.rollout.server.dtype == "auto" else _width(_saved(hf.config), config.rollout.server)
    return 2 * width * sum(p.numel() for p in hf.parameters())


def _width(saved: str, server: ServerConfig) -> int:
    """Bytes of a weight at a server on a GPU. `saved`: the dtype of the model's files."""
    return _BYTES[saved if server.dtype == "auto" else server.dtype]


def _saved(config: PreTrainedConfig) -> str:
    return str(config.get_text_config().dtype or torch.float32).removeprefix("torch.")


def adapter_parameters(config: Config) -> int:
    """Of the adapters of `model.lora`: r · (inputs + outputs) of each layer that has one (arXiv 2106.09685, §4.1)."""
    lora = config.model.lora
    assert lora is not None
    hf = skeleton(config.model)
    weights = [hf.get_parameter(f"{name}.weight") for name in layers(hf, lora)]
    return sum(lora.r * (outputs + inputs) for outputs, inputs in (weight.shape for weight in weights))


def _trainer_bytes(config: Config) -> int:
    """Of a number in `trainer.precision`. The estimate is of a GPU, unless `trainer.accelerator` is cpu."""
    trainer = config.trainer
    if trainer.precision == "auto":
        return 4 if trainer.accelerator == "cpu" else 2
    return _BYTES[trainer.precision]


def _training(config: Config, model: Shape) -> Part:
    """Forward and backward of one micro-batch."""
    each = _trainer_bytes(config)
    tokens = config.trainer.micro_batch_tokens
    gathered = each * (model.outside + 2 * model.largest_block)
    gradients = each * (model.outside + model.largest_block) + 4 * max(model.outside, model.largest_block)
    inner = block_activations(model, each)
    recomputed = math.ceil(model.layers / config.model.recompute_every) if config.model.gradient_checkpointing else 0
    activations = tokens * inner * (model.layers - recomputed)
    if recomputed:
        activations += tokens * (each * model.hidden * recomputed + inner)
    logits = 4 * model.output_layer + 4 * max(VOCABULARY_CHUNK.values()) * min(tokens, _TOKEN_CHUNK)
    if not isinstance(config.teacher, NoTeacherConfig):
        logits = max(logits, 4 * model.output_layer + 8 * 4 * CHUNK_LOGITS)  # a divergence: see logprob_head.py
    why = (
        f"gathered weights {gib(gathered)}, their gradients {gib(gradients)}, activations of {tokens} tokens "
        f"{gib(activations)}, output layer {gib(logits)}"
    )
    return Part(bytes=gathered + gradients + activations + logits, what="training", why=why)


def _beside(config: Config, model: Shape) -> list[Part]:
    """Further models in every trainer process."""
    parts = []
    algorithm = build_algorithm(config)
    ranks = config.world_size if config.trainer.shard_frozen else 1
    if algorithm.needs_reference and config.model.lora is None:
        parts.append(_copy(model, _trainer_bytes(config), "reference", ranks))
    for key, teacher in config.teachers:
        if isinstance(teacher, LocalTeacherConfig):
            theirs = shape_of(teacher.path, config.model.trust_remote_code)
            parts.append(_copy(theirs, _BYTES[teacher.dtype], key, ranks))
    if isinstance(config.teacher, SelfTeacherConfig) and config.teacher.scorer == "local":
        parts.append(_copy(model, _BYTES[config.teacher.dtype], "teacher (self)", ranks))
        if config.teacher.weights == "ema":
            parts.append(_copy(model, 4, "teacher's moving average"))
        if config.teacher.weights != "fixed" and algorithm.scorer_signal("teacher").tier == "hidden":
            each = _BYTES[config.teacher.dtype]
            why = f"{each} B · {_billions(model.output_layer)} parameters, copied since the teacher follows the student"
            parts.append(Part(bytes=each * model.output_layer, what="output layer of a batch", why=why))
    reads_the_students = config.world_size == 1 and config.rollout.max_staleness == 0 and config.model.lora is None
    if config.rollout.backend == "hf" and not (reads_the_students and _trainer_bytes(config) == 4):
        parts.append(_copy(model, _trainer_bytes(config), "hf sampler"))
    return parts


def _copy(model: Shape, each: int, whose: str, ranks: int = 1) -> Part:
    """A model of `each` bytes a parameter, of which every rank has an equal part of the repeated layers."""
    layers = model.parameters - model.outside
    why = f"{each} B · {_billions(model.parameters)} parameters, whole"
    if ranks > 1:
        why = f"{each} B · ({_billions(model.outside)} + {_billions(layers)} / {ranks} parameters)"
    return Part(bytes=each * (model.outside + layers / ranks), what=whose, why=why)


def _sampling(config: Config, model: Shape) -> list[Part]:
    if config.rollout.backend != "hf":
        return []
    rows = min(config.rollout.batch_rows, config.rollout.prompts * config.algorithm.group_size // config.world_size)
    tokens = rows * (config.data.max_prompt_tokens + config.rollout.max_tokens)
    cache = tokens * kv_bytes(model, _trainer_bytes(config))
    return [Part(bytes=cache, what="sampling", why=f"key-value cache of {tokens} tokens")]


def server_places(config: Config) -> list[Place]:
    """One GPU of each kind of vLLM server."""
    places = []
    trust = config.model.trust_remote_code
    if config.rollout.backend == "vllm":
        policy = config.rollout.server
        model = shape_of(config.model.path, trust)
        places += _servers("policy", model, policy, policy.urls, longest(config))
    for key, teacher in config.teachers:
        if isinstance(teacher, ServedTeacherConfig):
            model = shape_of(teacher.path, trust)
            places += _servers(key, model, teacher.server, teacher.addresses, teacher_longest(config))
    return places


def _servers(role: str, model: Shape, server: ServerConfig, urls: Sequence[str], length: int) -> list[Place]:
    """The number of GPUs of a running server is unknown, so the numbers are those of one GPU."""
    if urls:
        return [server_place(f"{role}: {url}, for one GPU a copy", model, server, 1, length) for url in urls]
    return [
        server_place(f"{role}: GPU {', '.join(map(str, gpus)) or 'of trainer 0'}", model, server, len(gpus), length)
        for gpus in server.devices
    ]


def server_place(name: str, model: Shape, server: ServerConfig, gpus: int, length: int) -> Place:
    """One of the GPUs that share a copy of the model: an equal part of the weights and of the key and value heads."""
    gpus, each = max(gpus, 1), _width(model.dtype, server)
    tokens = server.max_model_len or length
    weights = Part(
        bytes=each * model.parameters / gpus,
        what="weights",
        why=f"{each} B · {_billions(model.parameters)} parameters / {gpus}",
    )
    cache = kv_bytes(model, each) / gpus
    sequence = Part(
        bytes=cache * tokens,
        what="serving one sequence",
        why=f"key-value cache of {tokens} tokens, {cache / 1024:.4g} KiB each",
    )
    return Place(name=name, resident=(weights,), phases=(sequence,), budget=server.memory)


ON_CPU = "on the CPU (trainer.accelerator: cpu), so on no GPU"
"""Of a trainer, in place of whether a GPU has room for it."""


def report(config: Config, device_bytes: float | None) -> str:
    """A line for each part of the memory, by process, and whether it fits a GPU of `device_bytes`; None: unknown."""
    lines = []
    trainer = trainer_place(config)
    for place in [trainer, *server_places(config)]:
        lines.append(place.name)
        lines += [f"  {gib(part.bytes):>10}  {part.what}: {part.why}" for part in place.resident]
        lines += [f"  {gib(part.bytes):>10}  while {part.what}: {part.why}" for part in place.phases if part.bytes]
        on_cpu = place is trainer and config.trainer.accelerator == "cpu"
        verdict = f", {ON_CPU}" if on_cpu else _verdict(place, device_bytes)
        lines.append(f"  {gib(place.peak):>10}  at most at a time{verdict}")
    return "\n".join(lines)


def _verdict(place: Place, device_bytes: float | None) -> str:
    if device_bytes is None:
        return "; give the size of the device by --estimate=GIB"
    room = place.budget * device_bytes
    answer = "fits" if place.peak <= room else "DOES NOT FIT"
    if place.budget == 1:
        return f": {answer} in {gib(room)}"
    (weights,), (sequence,) = place.resident, place.phases
    many = max(0, int((room - weights.bytes) / sequence.bytes))
    return f": {answer} in {place.budget:g} · {gib(device_bytes)} = {gib(room)}, {many} such sequences side by side"


def gib(count: float) -> str:
    """Bytes for the console: 1.25 GiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def _billions(count: float) -> str:
    return f"{count / 1e9:.3g}e9"
