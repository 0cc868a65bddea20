"""What an iteration costs: FLOPs and bytes of its phases, and the seconds that a machine takes for them.

Pure functions. The counts follow from the architecture and from what rlkd does with it; rates are those of a Machine,
which benchmarks/scaling.py measures (this box) or assumes (GPUs). Nothing is fitted to a training run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from rlkd.planning.memory import Shape

CHUNKS = 64
"""Pieces in which the steps of a rollout are added up: rows and context change little within one."""


class Work(NamedTuple):
    """What a machine has to do. Adds up, and scales."""

    flops: float = 0.0
    """Of matrix products: a multiplication and an addition are two."""
    weights: float = 0.0
    """Bytes that these products read from memory however few tokens share them."""
    passes: float = 0.0
    """Bytes that element-wise operations read and write."""
    exps: float = 0.0
    """Exponentials: softmax and SiLU."""
    stream: float = 0.0
    """Bytes of whole weights, moments, caches or logits, outside of products: too large for a CPU's cache."""

    def plus(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> Work:
        return Work(*(count * a for a in self))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one trainer process, or one server's device, achieves; not the peak of a data sheet."""

    flops: float
    """FLOP/s of matrix products."""
    memory: float
    """Bytes/s between memory and device."""
    cache: float = math.inf
    """Bytes/s of element-wise operations on activations; infinite where that is part of what `flops` achieves."""
    exps: float = math.inf
    """Exponentials a second; see `cache`."""
    draw: float = 0.0
    """Seconds a logit for drawing a token (in process)."""
    step: float = 0.0
    """Seconds of a decode step whatever the model."""
    step_layer: float = 0.0
    """The same, a layer."""
    update: float = 0.0
    """Seconds of an update (forward, backward, step) whatever the model."""
    update_layer: float = 0.0
    """The same, a layer."""
    forward: float = 0.0
    """Seconds of a forward without gradient, whatever the model."""
    forward_layer: float = 0.0
    publish: float = 0.0
    """Seconds of a publish, whatever the model."""
    publish_layer: float = 0.0
    link: float = math.inf
    """Bytes/s that a rank receives in an all-gather among the trainers."""
    hop: float = 0.0
    """Seconds that a collective takes for each further rank, however short."""
    network: float = math.inf
    """Bytes/s from one trainer process to another machine."""
    disk_write: float = math.inf
    """Bytes/s of one writer."""
    disk_read: float = math.inf
    """Bytes/s of one reader."""
    disk_total: float = math.inf
    """Bytes/s of all readers together."""

    def seconds(self, work: Work) -> float:
        """Products are bound by arithmetic or by their weights; the rest comes one after the other."""
        products = max(work.flops / self.flops, work.weights / self.memory)
        return products + work.passes / self.cache + work.exps / self.exps + work.stream / self.memory


@dataclass(frozen=True, kw_only=True)
class Model:
    """What FLOPs and bytes depend on."""

    parameters: float
    active: float
    """Parameters that a token passes, but the embedding, which is looked up: blocks and output layer."""
    routed: float = 0.0
    """Parameters of all routed experts."""
    chosen: float = 1.0
    """Share of the routed experts that a token passes."""
    layers: int
    hidden: int
    intermediate: int
    queries: int
    """Width of all query heads together."""
    keys: int
    heads: int
    vocabulary: int
    attention: float
    """FLOPs of one token's queries against one earlier token, all layers."""
    cache: float
    """Numbers that a token keeps, all layers (keys and values, or what stands for them)."""

    @property
    def blocks(self) -> float:
        return self.active - self.output_layer

    @property
    def output_layer(self) -> float:
        return float(self.vocabulary * self.hidden)


def dense(shape: Shape, heads: int) -> Model:
    """A model in which every token passes every parameter."""
    embeddings = shape.output_layer  # a row of it is looked up; tied ones are the output layer too
    tied = shape.outside < 2 * embeddings
    return Model(
        parameters=shape.parameters,
        active=shape.parameters - (0 if tied else embeddings),
        layers=shape.layers,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        queries=shape.queries,
        keys=shape.keys,
        heads=heads,
        vocabulary=shape.vocabulary,
        attention=4.0 * shape.queries * shape.layers,  # scores and weighted values, two FLOPs each
        cache=2.0 * shape.keys * shape.layers,
    )


# ---- one pass over some tokens --------------------------------------------------------------------------------------


def trunk(model: Model, tokens: float, context: float, each: int) -> Work:
    """Forward of the blocks over `tokens` tokens, each of which attends to `context` others.

    Element-wise passes of transformers' eager Llama, in numbers a token and layer: two norms of 7 passes over H, two
    residual sums of 3, rotary embedding 10 over queries and keys, the copy of attention's output, SiLU and product 5
    over I. One exponential for each SiLU and for each score.

    Args:
        each: bytes a number.
    """
    numbers = 20 * model.hidden + 12 * model.queries + 10 * model.keys + 5 * model.intermediate
    return Work(
        flops=tokens * (2 * model.blocks + model.attention * context),
        weights=each * touched(model, tokens),
        passes=each * tokens * numbers * model.layers,
        exps=tokens * model.layers * (model.intermediate + model.heads * context),
    )


def touched(model: Model, tokens: float) -> float:
    """Block parameters that `tokens` tokens read: of routed experts those that at least one of them is sent to, if all
    are as likely."""
    fixed = model.blocks - model.chosen * model.routed
    return fixed + model.routed * (1 - (1 - model.chosen) ** tokens)


def logprobs(model: Model, tokens: float, each: int) -> Work:
    """Log-probs of given tokens, from hidden states: policy_head's kernel, forward. 12 passes over the logits,
    which no cache holds."""
    logits = tokens * model.vocabulary
    return Work(flops=2 * logits * model.hidden, weights=each * model.output_layer, exps=logits, stream=12 * 4 * logits)


def logprobs_backward(model: Model, tokens: float, each: int) -> Work:
    """Its backward: logits again, then the gradients of hidden states and of the layer. 16 passes."""
    logits = tokens * model.vocabulary
    return Work(
        flops=6 * logits * model.hidden, weights=2 * each * model.output_layer, exps=logits, stream=16 * 4 * logits
    )


def divergence(model: Model, teacher: Model, tokens: float) -> Work:
    """A divergence over the whole vocabulary, gradient included: logits of both models from hidden states, two
    gradients of the student's. About 30 passes, exponentials of two log-softmaxes, a divergence, and a backward."""
    logits = tokens * model.vocabulary
    flops = 6 * logits * model.hidden + 2 * logits * teacher.hidden
    return Work(flops=flops, exps=4 * logits, stream=30 * 4 * logits)


# ---- the phases of an iteration in this process (rollout.backend hf, a local teacher) -------------------------------


def decode_step(model: Model, machine: Machine, rows: float, context: float, each: int) -> float:
    """Seconds of one token for each of `rows` rows that hold `context` tokens; in process, with a cache that grows by
    concatenation: it is read and written for that, and read by attention."""
    work = trunk(model, rows, context, each)
    work = work.plus(Work(flops=2 * rows * model.output_layer, weights=each * model.output_layer))
    work = work.plus(Work(stream=3 * each * rows * context * model.cache))
    fixed = machine.step + machine.step_layer * model.layers
    return fixed + machine.seconds(work) + machine.draw * rows * model.vocabulary


def rollout(model: Model, machine: Machine, rows: int, prompt: float, length: int, each: int = 4) -> float:
    """Seconds of `rows` completions of `length` tokens each, in process: prompts first, then a step for each token
    but the one that follows from them."""
    first = machine.seconds(trunk(model, rows * prompt, prompt, each)) + machine.draw * rows * model.vocabulary
    first += machine.step + machine.step_layer * model.layers
    return first + sum(decode_step(model, machine, rows, prompt + t, each) for t in range(1, length))


def scoring(model: Model, machine: Machine, tokens: float, length: float, passes: int, each: int = 4) -> float:
    """Seconds in which a teacher in this process scores `tokens` tokens of sequences of `length`, in `passes`
    forwards. In the mean a token attends to half of its sequence."""
    work = trunk(model, tokens, length / 2, each).plus(logprobs(model, tokens, each))
    return passes * (machine.forward + machine.forward_layer * model.layers) + machine.seconds(work)


class Update(NamedTuple):
    """An optimizer step of one rank."""

    tokens: float
    """Of this rank, padding included."""
    length: float
    micro_batches: int
    ranks: int = 1
    adapters: float = 0.0
    """Trained parameters beside frozen weights; 0: all weights are trained."""


def training(model: Model, machine: Machine, update: Update, teacher: Model | None = None, each: int = 4) -> float:
    """Seconds of one update in process: 6 FLOPs a parameter and token (4 where the weights are frozen), what FSDP2
    moves for each micro-batch, and AdamW.

    Backward element-wise passes are taken as twice the forward's, as products are. `teacher`: of a divergence over the
    whole vocabulary.
    """
    tokens, ranks = update.tokens, update.ranks
    forward = trunk(model, tokens, update.length / 2, each)
    frozen = update.adapters > 0
    backward = forward.times(2)
    if frozen:  # no gradients of the weights, but products of the adapters: their forward and twice that
        backward = backward._replace(flops=forward.flops + 6 * tokens * update.adapters)
        outputs = 2 * model.hidden + model.queries + 2 * model.keys + 2 * model.intermediate
        # What an adapter computes is scaled and added: 5 passes over the outputs of its layer, and twice that backward.
        backward = backward.plus(Work(passes=3 * 5 * each * tokens * outputs * model.layers))
    work = forward.plus(backward).plus(logprobs(model, tokens, each)).plus(logprobs_backward(model, tokens, each))
    if teacher is not None:
        work = work.plus(divergence(model, teacher, tokens))
    trained = update.adapters if frozen else model.parameters
    work = work.plus(fsdp_copies(model.parameters, trained).times(update.micro_batches))
    work = work.plus(Work(stream=ADAMW * trained / ranks))
    fixed = machine.update + machine.update_layer * model.layers
    moved = exchanged(model.parameters, trained, ranks, each) / machine.link + (ranks - 1) * machine.hop * (
        3 * (model.layers + 1)
    )
    return machine.seconds(work) + update.micro_batches * (fixed + moved)


ADAMW = 84
"""Bytes a trained parameter: torch's AdamW without fusion reads and writes fp32 numbers 18 times, clipping 3 times."""


def fsdp_copies(parameters: float, trained: float) -> Work:
    """Bytes through memory of FSDP2's own copies for one micro-batch, fp32: in and out of the buffer of each of two
    all-gathers (forward and backward), and of the reduce-scatter; 4 bytes read and 4 written each."""
    return Work(stream=2 * 16 * parameters + 16 * trained)


def exchanged(parameters: float, trained: float, ranks: int, each: int) -> float:
    """Bytes that a rank receives for one micro-batch: all-gathers of the weights for forward and for backward in the
    compute type, and a reduce-scatter of fp32 gradients."""
    return (ranks - 1) / ranks * (2 * each * parameters + 4 * trained)


def publishing(model: Model, machine: Machine, ranks: int = 1) -> float:
    """Seconds to gather all fp32 weights on every rank and copy them into the sampler: 16 bytes read and written a
    parameter."""
    fixed = machine.publish + machine.publish_layer * model.layers
    gathered = (ranks - 1) / ranks * 4 * model.parameters / machine.link
    return fixed + gathered + machine.seconds(Work(stream=16 * model.parameters))


# ---- the phases on GPUs: servers that batch continuously, trainers that overlap communication -----------------------


def served_step(model: Model, gpu: Machine, rows: float, context: float, gpus: int, each: int = 2) -> float:
    """Seconds of one token for each of `rows` sequences at a server whose copy is split over `gpus`: bound by
    arithmetic, or by reading weights and caches once. Where the copy is split, two all-reduces a layer,
    each a ring of 2 (gpus − 1) hops."""
    work = trunk(model, rows, context, each)
    flops = work.flops + 2 * rows * model.output_layer
    read = work.weights + each * (model.output_layer + rows * context * model.cache)
    split = 2 * model.layers * 2 * (gpus - 1) * gpu.hop
    return gpu.step + split + max(flops / gpu.flops, read / gpu.memory) / gpus


def served_rollout(
    model: Model, gpu: Machine, rows: float, room: float, prompt: float, longest: int, gpus: int, group: int
) -> float:
    """Seconds in which a server samples `rows` completions, of lengths spread evenly up to `longest`.

    It runs `room` of them at a time. While more wait, a finished one is replaced at once; then the batch empties, down
    to the longest. Prompts are computed once a group (prefix cache).
    """
    first = rows / group * prompt
    read = gpu_seconds(gpu, trunk(model, first, prompt / 2, 2), gpus)
    together = min(rows, room)
    queued = (rows - together) * longest / 2 / together  # steps
    seconds = read + queued * served_step(model, gpu, together, prompt + longest / 3, gpus)
    for chunk in range(CHUNKS):
        done = (chunk + 0.5) / CHUNKS
        alive = together * (1 - done)
        seconds += longest / CHUNKS * served_step(model, gpu, max(alive, 1.0), prompt + done * longest, gpus)
    return seconds


def gpu_seconds(gpu: Machine, work: Work, gpus: int) -> float:
    return gpu.seconds(work) / gpus


def served_scoring(teacher: Model, gpu: Machine, tokens: float, length: float, gpus: int) -> float:
    """Seconds in which `gpus` GPUs score `tokens` tokens: a forward, and log-softmax over fp32 logits, which are
    written once and read twice."""
    work = trunk(teacher, tokens, length / 2, 2)._replace(weights=0.0)  # many batches' worth: arithmetic decides
    work = work.plus(Work(flops=2 * tokens * teacher.output_layer, stream=12 * tokens * teacher.vocabulary))
    return gpu_seconds(gpu, work, gpus)


class Trained(NamedTuple):
    """Seconds of an update on GPUs; communication is hidden behind arithmetic, or the other way round."""

    compute: float
    communication: float
    optimizer: float

    @property
    def total(self) -> float:
        return max(self.compute, self.communication) + self.optimizer


def gpu_training(
    model: Model, gpu: Machine, tokens: float, length: float, ranks: int, micro_tokens: int, adapters: float = 0.0
) -> Trained:
    """One update of all `tokens` over `ranks` GPUs, bf16, with gradient checkpointing: each block forward twice and
    backward once, so 8 FLOPs a parameter and token, 6 where weights are frozen."""
    share = tokens / ranks
    forward = trunk(model, share, length / 2, 2).flops
    frozen = adapters > 0
    flops = forward * (3 if frozen else 4) + 8 * share * model.output_layer + 8 * share * adapters
    trained = adapters if frozen else model.parameters
    micro_batches = math.ceil(share / micro_tokens)
    waits = 3 * (model.layers + 1) * (ranks - 1) * gpu.hop
    moved = exchanged(model.parameters, trained, ranks, 2) / gpu.link + waits
    return Trained(
        compute=flops / gpu.flops, communication=micro_batches * moved, optimizer=ADAMW * trained / ranks / gpu.memory
    )


def gather_seconds(count: float, gpu: Machine, ranks: int) -> float:
    """All of `count` bytes on every rank."""
    return (ranks - 1) / ranks * count / gpu.link


def nccl_seconds(count: float, gpu: Machine, servers: int) -> float:
    """`count` bytes from rank 0 to the workers of each server, one server after the other (rlkd.weight_sync.nccl)."""
    return servers * count / gpu.network


def disk_seconds(count: float, gpu: Machine, servers: int) -> float:
    """`count` bytes written by rank 0, then read by all servers at once."""
    return count / gpu.disk_write + max(count / gpu.disk_read, servers * count / gpu.disk_total)


def adapter_numbers(model: Model, rank: int) -> float:
    """Parameters of adapters beside all seven linear layers of each dense, gated block: r · (inputs + outputs)."""
    h, i, q, k = model.hidden, model.intermediate, model.queries, model.keys
    return float(model.layers * rank * (2 * (h + q) + 2 * (h + k) + 3 * (h + i)))
