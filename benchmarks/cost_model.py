"""What an iteration costs: FLOPs and bytes of its phases, and the seconds that a machine takes for them.

Pure functions. The counts follow from the architecture and from how rlkd uses it. The rates are those of a Machine,
which benchmarks/scaling.py measures (this box) or assumes (GPUs). Nothing is fitted to a training run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from rlkd.planning.memory import Shape

CHUNKS = 64
"""Number of chunks into which a rollout's steps are divided; rows and context change little within a chunk."""


class Work(NamedTuple):
    """The work of a phase. Can be added up and scaled."""

    flops: float = 0.0
    """FLOPs of matrix products; a multiplication and an addition count as two."""
    weights: float = 0.0
    """Bytes of weights that these products read from memory, however few tokens share them."""
    passes: float = 0.0
    """Bytes that element-wise operations read and write."""
    exps: float = 0.0
    """Number of exponentials, of softmax and SiLU."""
    stream: float = 0.0
    """Bytes of weights, moments, caches or logits moved outside of products; they are too large for a CPU's cache."""

    def plus(self, other: Work) -> Work:
        """The sum of both, field by field."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> Work:
        """This work, `count` times."""
        return Work(*(count * a for a in self))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates that one trainer process, or one server's device, achieves; not the peaks of a data sheet."""

    flops: float
    """FLOP/s of matrix products."""
    memory: float
    """Bytes/s between memory and device."""
    cache: float = math.inf
    """Bytes/s of element-wise operations on activations; infinite if `flops` already includes their time."""
    exps: float = math.inf
    """Exponentials per second; infinite as `cache` is."""
    draw: float = 0.0
    """Seconds per logit to draw a token (in process)."""
    step: float = 0.0
    """Fixed seconds of a decode step, whatever the model."""
    step_layer: float = 0.0
    """Fixed seconds of a decode step per layer."""
    update: float = 0.0
    """Fixed seconds of an update (forward, backward, step), whatever the model."""
    update_layer: float = 0.0
    """Fixed seconds of an update per layer."""
    forward: float = 0.0
    """Fixed seconds of a forward without gradient, whatever the model."""
    forward_layer: float = 0.0
    publish: float = 0.0
    """Fixed seconds of a publish, whatever the model."""
    publish_layer: float = 0.0
    link: float = math.inf
    """Bytes/s that a rank receives in an all-gather among the trainers."""
    hop: float = 0.0
    """Seconds that a collective takes per additional rank, however short the message."""
    network: float = math.inf
    """Bytes/s from one trainer process to another machine."""
    disk_write: float = math.inf
    """Bytes/s of one writer."""
    disk_read: float = math.inf
    """Bytes/s of one reader."""
    disk_total: float = math.inf
    """Bytes/s of all readers together."""

    def seconds(self, work: Work) -> float:
        """Products are bound by arithmetic or by reading weights; all other work is added to that."""
        products = max(work.flops / self.flops, work.weights / self.memory)
        return products + work.passes / self.cache + work.exps / self.exps + work.stream / self.memory


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a model on which FLOPs and bytes depend."""

    parameters: float
    active: float
    """Parameters that a token uses: blocks and output layer, without the embedding, which is looked up."""
    routed: float = 0.0
    """Parameters of all routed experts."""
    chosen: float = 1.0
    """Fraction of the routed experts that a token uses."""
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
    """Numbers cached per token over all layers (keys and values, or the latent that replaces them)."""

    @property
    def blocks(self) -> float:
        """Active parameters of the blocks."""
        return self.active - self.output_layer

    @property
    def output_layer(self) -> float:
        """Parameters of the output layer."""
        return float(self.vocabulary * self.hidden)


def dense(shape: Shape, heads: int) -> Model:
    """A model in which every token uses every parameter."""
    embeddings = shape.output_layer  # one row is looked up; a tied embedding is also the output layer
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

    Element-wise passes of transformers' eager Llama, in numbers per token and layer: two norms of 7 passes over H, two
    residual sums of 3, rotary embedding 10 over queries and keys, the copy of attention's output, SiLU and product 5
    over I. One exponential per SiLU and per score.

    Args:
        each: bytes per number.
    """
    numbers = 20 * model.hidden + 12 * model.queries + 10 * model.keys + 5 * model.intermediate
    return Work(
        flops=tokens * (2 * model.blocks + model.attention * context),
        weights=each * touched(model, tokens),
        passes=each * tokens * numbers * model.layers,
        exps=tokens * model.layers * (model.intermediate + model.heads * context),
    )


def touched(model: Model, tokens: float) -> float:
    """Block parameters that `tokens` tokens read: of the routed experts, the expected share that receives at least one
    token when all experts are equally likely."""
    fixed = model.blocks - model.chosen * model.routed
    return fixed + model.routed * (1 - (1 - model.chosen) ** tokens)


def logprobs(model: Model, tokens: float, each: int) -> Work:
    """Log-probs of given tokens from hidden states: forward of the kernel in rlkd.models.logprob_head. 12 passes over
    the logits, which do not fit into a cache."""
    logits = tokens * model.vocabulary
    return Work(flops=2 * logits * model.hidden, weights=each * model.output_layer, exps=logits, stream=12 * 4 * logits)


def logprobs_backward(model: Model, tokens: float, each: int) -> Work:
    """Backward of `logprobs`: the logits are recomputed, then the gradients of hidden states and layer. 16 passes over
    the logits."""
    logits = tokens * model.vocabulary
    return Work(
        flops=6 * logits * model.hidden, weights=2 * each * model.output_layer, exps=logits, stream=16 * 4 * logits
    )


def divergence(model: Model, teacher: Model, tokens: float) -> Work:
    """A divergence over the full vocabulary, with its gradient: logits of both models from hidden states, and two
    gradients for the student. About 30 passes; exponentials of two log-softmaxes, a divergence, and a backward."""
    logits = tokens * model.vocabulary
    flops = 6 * logits * model.hidden + 2 * logits * teacher.hidden
    return Work(flops=flops, exps=4 * logits, stream=30 * 4 * logits)


# ---- the phases of an iteration in this process (rollout.backend hf, a local teacher) -------------------------------


def decode_step(model: Model, machine: Machine, rows: float, context: float, each: int) -> float:
    """Seconds to generate one token for each of `rows` rows with `context` tokens, in process. Keys and values are
    written in place; attention reads them all. That buffers are copied when they are full is left out."""
    work = trunk(model, rows, context, each)
    work = work.plus(Work(flops=2 * rows * model.output_layer, weights=each * model.output_layer))
    work = work.plus(Work(stream=each * rows * context * model.cache))
    fixed = machine.step + machine.step_layer * model.layers
    return fixed + machine.seconds(work) + machine.draw * rows * model.vocabulary


def rollout(model: Model, machine: Machine, rows: int, prompt: float, length: int, group: int, each: int = 4) -> float:
    """Seconds of `rows` completions of `length` tokens each, in process: one pass over the prompts, each once for the
    `group` completions that it gets, which gives the first token, then one step for each further token."""
    first = machine.seconds(trunk(model, rows / group * prompt, prompt, each)) + machine.draw * rows * model.vocabulary
    first += machine.step + machine.step_layer * model.layers
    return first + sum(decode_step(model, machine, rows, prompt + t, each) for t in range(1, length))


def scoring(
    model: Model, machine: Machine, tokens: float, projected: float, length: float, passes: int, each: int = 4
) -> float:
    """Seconds that a teacher in this process takes to score `tokens` tokens of sequences of `length`, in `passes`
    forwards. On average a token attends to half of its sequence. `projected`: as in `Update`.
    """
    work = trunk(model, tokens, length / 2, each).plus(logprobs(model, projected, each))
    return passes * (machine.forward + machine.forward_layer * model.layers) + machine.seconds(work)


class Update(NamedTuple):
    """An optimizer step of one rank."""

    tokens: float
    """Tokens of this rank, padding included."""
    projected: float
    """Those of completions, the only ones that are projected onto the vocabulary."""
    length: float
    micro_batches: int
    ranks: int = 1
    adapters: float = 0.0
    """Trained adapter parameters; the other weights are frozen. 0: no adapters, all weights are trained."""


def training(model: Model, machine: Machine, update: Update, teacher: Model | None = None, each: int = 4) -> float:
    """Seconds of one update in process: 6 FLOPs per parameter and token (4 where weights are frozen), FSDP2's copies
    and transfers for each micro-batch, and AdamW.

    The backward is assumed to need twice the forward's element-wise passes, as it does for products. `teacher`: the
    model compared by a divergence over the full vocabulary, of which log-probs are a by-product (a loss without a
    policy gradient), or None.
    """
    tokens, ranks = update.tokens, update.ranks
    forward = trunk(model, tokens, update.length / 2, each)
    frozen = update.adapters > 0
    backward = forward.times(2)
    if frozen:  # no weight gradients; the adapters add a forward, and a backward of twice that
        backward = backward._replace(flops=forward.flops + 6 * tokens * update.adapters)
        outputs = 2 * model.hidden + model.queries + 2 * model.keys + 2 * model.intermediate
        # An adapter's result is scaled and added: 5 passes over its layer's outputs, and twice that backward.
        backward = backward.plus(Work(passes=3 * 5 * each * tokens * outputs * model.layers))
    work, projected = forward.plus(backward), update.projected
    if teacher is not None:
        work = work.plus(divergence(model, teacher, projected))
    else:
        work = work.plus(logprobs(model, projected, each)).plus(logprobs_backward(model, projected, each))
    trained = update.adapters if frozen else model.parameters
    work = work.plus(fsdp_copies(model.parameters, trained).times(update.micro_batches))
    work = work.plus(Work(stream=ADAMW * trained / ranks))
    fixed = machine.update + machine.update_layer * model.layers
    moved = exchanged(model.parameters, trained, ranks, each) / machine.link + (ranks - 1) * machine.hop * (
        3 * (model.layers + 1)
    )
    return machine.seconds(work) + update.micro_batches * (fixed + moved)


ADAMW = 84
"""Bytes per trained parameter: torch's unfused AdamW reads or writes fp32 numbers 18 times, clipping 3 times."""


def fsdp_copies(parameters: float, trained: float) -> Work:
    """Bytes that FSDP2's own copies move through memory for one micro-batch, fp32: into and out of the buffers of two
    all-gathers (forward and backward) and of the reduce-scatter; each copy reads 4 bytes and writes 4."""
    return Work(stream=2 * 16 * parameters + 16 * trained)


def exchanged(parameters: float, trained: float, ranks: int, each: int) -> float:
    """Bytes that a rank receives for one micro-batch: all-gathers of the weights for forward and backward, in the
    compute dtype, and a reduce-scatter of fp32 gradients."""
    return (ranks - 1) / ranks * (2 * each * parameters + 4 * trained)


def publishing(model: Model, machine: Machine, ranks: int, merged: bool) -> float:
    """Seconds to gather the weights, one fp32 tensor at a time, and copy them into the sampler: 16 bytes read or
    written per parameter. One rank does neither, since its sampler reads the student's own tensors.

    Args:
        merged: whether adapters are merged first: a product, scaled and added, 24 bytes per parameter.
    """
    fixed = machine.publish + machine.publish_layer * model.layers
    gathered = (ranks - 1) / ranks * 4 * model.parameters / machine.link
    moved = (16 if ranks > 1 else 0) + (24 if merged else 0)
    return fixed + gathered + machine.seconds(Work(stream=moved * model.parameters))


# ---- the phases on GPUs: servers that batch continuously, trainers that overlap communication -----------------------


def served_step(model: Model, gpu: Machine, rows: float, context: float, gpus: int, each: int = 2) -> float:
    """Seconds to generate one token for each of `rows` sequences on a server whose copy is split over `gpus`. Bound by
    arithmetic, or by reading weights and caches once. A split copy needs two all-reduces per layer, each a ring of
    2 (gpus − 1) hops."""
    work = trunk(model, rows, context, each)
    flops = work.flops + 2 * rows * model.output_layer
    read = work.weights + each * (model.output_layer + rows * context * model.cache)
    split = 2 * model.layers * 2 * (gpus - 1) * gpu.hop
    return gpu.step + split + max(flops / gpu.flops, read / gpu.memory) / gpus


def served_rollout(
    model: Model, gpu: Machine, rows: float, room: float, prompt: float, longest: int, gpus: int, group: int
) -> float:
    """Seconds that a server takes to sample `rows` completions whose lengths are spread evenly up to `longest`.

    It runs up to `room` of them at a time. While some are queued, a finished one is replaced immediately; after that
    the batch shrinks until the longest has finished. A prompt is computed once per group (prefix cache).
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
    """Seconds for `work` that is divided evenly over `gpus`."""
    return gpu.seconds(work) / gpus


def served_scoring(teacher: Model, gpu: Machine, tokens: float, length: float, gpus: int) -> float:
    """Seconds that `gpus` GPUs take to score `tokens` tokens: a forward, and a log-softmax over fp32 logits, which are
    written once and read twice."""
    work = trunk(teacher, tokens, length / 2, 2)._replace(weights=0.0)  # enough batches that arithmetic is the bound
    work = work.plus(Work(flops=2 * tokens * teacher.output_layer, stream=12 * tokens * teacher.vocabulary))
    return gpu_seconds(gpu, work, gpus)


class Trained(NamedTuple):
    """Seconds of an update on GPUs. Communication and arithmetic overlap, so the longer of the two counts."""

    compute: float
    communication: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the update."""
        return max(self.compute, self.communication) + self.optimizer


def gpu_training(
    model: Model,
    gpu: Machine,
    tokens: float,
    projected: float,
    length: float,
    ranks: int,
    micro_tokens: int,
    adapters: float = 0.0,
) -> Trained:
    """One update on all `tokens` over `ranks` GPUs, bf16, with gradient checkpointing: each block runs forward twice
    and backward once, so 8 FLOPs per parameter and token, 6 where weights are frozen. `projected`: as in `Update`."""
    share = tokens / ranks
    forward = trunk(model, share, length / 2, 2).flops
    frozen = adapters > 0
    flops = forward * (3 if frozen else 4) + 8 * projected / ranks * model.output_layer + 8 * share * adapters
    trained = adapters if frozen else model.parameters
    micro_batches = math.ceil(share / micro_tokens)
    waits = 3 * (model.layers + 1) * (ranks - 1) * gpu.hop
    moved = exchanged(model.parameters, trained, ranks, 2) / gpu.link + waits
    return Trained(
        compute=flops / gpu.flops, communication=micro_batches * moved, optimizer=ADAMW * trained / ranks / gpu.memory
    )


def published_bytes(model: Model, each: int = 2) -> float:
    """Bytes of all weights in the servers' dtype. A shard is cast before it is gathered (rlkd.models.weights), so this
    is what is gathered, sent and written. Norms and biases, which stay in fp32, are too small to count."""
    return each * model.parameters


def gather_seconds(count: float, gpu: Machine, ranks: int) -> float:
    """Seconds to gather `count` sharded bytes on every rank, one tensor after another."""
    return (ranks - 1) / ranks * count / gpu.link


def nccl_seconds(count: float, gpu: Machine) -> float:
    """Seconds to broadcast `count` bytes from rank 0 to all workers of all servers, which are one group
    (rlkd.weight_sync.nccl): in a ring that passes buffers on, each link carries each byte once. The hops of the first
    buffer are left out."""
    return count / gpu.network


def disk_seconds(count: float, gpu: Machine, servers: int) -> float:
    """Seconds for rank 0 to write `count` bytes and then for `servers` machines to read them at the same time."""
    return count / gpu.disk_write + max(count / gpu.disk_read, servers * count / gpu.disk_total)


LOADING = 1.1
"""Peak host memory of two ranks that load in shards, by the model's size in fp32, measured on a CPU (CHANGELOG.md)."""


def loading_bytes(parameters: float, shard_share: float, checked: float) -> float:
    """Bytes of host memory that all processes of a machine need together to load the student in shards
    (rlkd.models.sharded_loading): their fp32 shards, times what two ranks on a CPU were measured to need. On a GPU
    machine shards go to the cards, so this is too high rather than too low.

    Args:
        shard_share: the machine's share of all ranks.
        checked: parameters that rank 0 holds in fp32 while it runs a few tokens through the model on its CPU: those
            outside the blocks, and one block.
    """
    return max(LOADING * 4 * parameters * shard_share, 4 * checked)


def adapter_numbers(model: Model, rank: int) -> float:
    """Parameters of adapters on all seven linear layers of each dense, gated block: r · (inputs + outputs) each."""
    h, i, q, k = model.hidden, model.intermediate, model.queries, model.keys
    return float(model.layers * rank * (2 * (h + q) + 2 * (h + k) + 3 * (h + i)))
