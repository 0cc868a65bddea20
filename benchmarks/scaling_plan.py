"""Plans for 8, 64 and 1,024 H100s by the cost model: what fits, which split is fastest, where the time goes.

`python benchmarks/scaling_plan.py` prints which students fit on 8, 16 and 64 GPUs; scaling.py prints the rest.

Nothing here is measured. Data sheet: NVIDIA H100 SXM5 (989e12 FLOP/s dense bf16, 3.35e12 B/s, 80 GB, NVLink 450e9 B/s
each way); 400 Gb/s InfiniBand per GPU. The fractions of these that are achieved are assumed, and so are all disk rates.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cost_model as cost
from cost_model import Machine, Model, dense
from transformers import DeepseekV3Config, PreTrainedConfig, Qwen2Config, Qwen3MoeConfig

from rlkd.config_file import load
from rlkd.planning.memory import GIB, Shape, shape, trainer_place

H100 = Machine(
    flops=0.45 * 989e12,  # assumed share
    memory=0.7 * 3.35e12,  # assumed share
    link=0.8 * 450e9,  # NVLink, one machine; assumed share
    network=0.8 * 450e9,
    hop=2e-6,  # assumed: a ring over NVLink and InfiniBand, one rank further
    step=3e-3,  # assumed: vLLM's scheduler, sampling and launches, with CUDA graphs
    disk_write=2e9,  # assumed, as are the next two: a parallel file system
    disk_read=4e9,
    disk_total=100e9,
)
ACROSS = replace(H100, link=0.8 * 8 * 50e9, network=0.8 * 50e9)
"""Rates across machines. An all-gather enters a machine once over its 8 network adapters and is distributed inside it
over NVLink; a single trainer process sends over its own adapter."""
CARD = 0.9 * 80 * GIB
"""Bytes of a card's memory that a plan may use."""
USABLE = 77 * GIB
"""Bytes of an 80 GB card (79 GiB) that are left by CUDA's context and NCCL's buffers, about."""
FITTED = 16384
"""Tokens of a micro-batch in the table of `fits`."""
BOX = 8
GROUP = 8
SLACK = 1.05
"""A split that needs fewer GPUs may take this factor longer than the fastest one."""
WORKSPACE = 10 * GIB
"""Assumed for a trainer with expert parallelism, which rlkd does not have: experts stay in place and tokens are sent to
them, so little is gathered."""
BATCHED = 1024
"""Sequences that a copy runs at once: the default of vLLM 0.32's API server on GPUs of 70 GiB or more, but A100s."""
PROMPT = 512
ADAPTER_RANK = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Student:
    """A model that the plan trains."""

    name: str
    config: PreTrainedConfig
    model: Model
    shape: Shape
    per_copy: tuple[int, ...]
    """Possible numbers of GPUs per model copy on a server; the first is the smallest that holds it."""
    longest: int
    """Tokens of the longest completion; the mean is half of that."""

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch: one sequence of the longest length."""
        return PROMPT + self.longest


def qwen(layers: int, hidden: int, width: int, heads: int, keys: int) -> Qwen2Config:
    """The configuration of a Qwen2.5 model of these sizes."""
    return Qwen2Config(
        vocab_size=152064,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def deepseek(config: DeepseekV3Config, known: Shape) -> Model:
    """Multi-head latent attention (arXiv 2412.19437 §2.1.1): a token caches one latent vector of 512 and a rotary key
    of 64 per layer; a decode step attends to those with 128 heads. 58 layers have 256 routed experts, 8 of them used
    per token."""
    latent, rotary, heads = config.kv_lora_rank, config.qk_rope_head_dim, config.num_attention_heads
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    routed = (config.num_hidden_layers - config.first_k_dense_replace) * config.n_routed_experts * expert
    chosen = config.num_experts_per_tok / config.n_routed_experts
    parameters = float(known.parameters)
    return Model(
        parameters=parameters,
        active=parameters - known.output_layer - (1 - chosen) * routed,
        routed=float(routed),
        chosen=chosen,
        layers=known.layers,
        hidden=known.hidden,
        intermediate=known.intermediate,
        queries=known.queries,
        keys=known.keys,
        heads=heads,
        vocabulary=known.vocabulary,
        attention=2.0 * heads * (2 * latent + rotary) * known.layers,
        cache=float((latent + rotary) * known.layers),
    )


def students() -> list[Student]:
    """Qwen2.5-7B and -32B, and DeepSeek-V3, with the sizes of their published config.json."""
    small, middle = qwen(28, 3584, 18944, 28, 4), qwen(64, 5120, 27648, 40, 8)
    large = DeepseekV3Config()
    of_small, of_middle, mixture = shape(small), shape(middle), shape(large)
    return [
        Student(
            name="7B",
            config=small,
            model=dense(of_small, 28),
            shape=of_small,
            per_copy=(1, 2, 4),
            longest=8192,
        ),
        Student(
            name="32B",
            config=middle,
            model=dense(of_middle, 40),
            shape=of_middle,
            per_copy=(2, 4, 8),
            longest=16384,
        ),
        Student(
            name="671B MoE",
            config=large,
            model=deepseek(large, mixture),
            shape=mixture,
            per_copy=(32,),
            longest=16384,
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak bytes that a trainer GPU needs, estimated by `rlkd.planning.memory`."""

    always: float
    training: float
    publishing: float

    def peak(self, way: str) -> float:
        """Peak bytes; `way`: what is trained, as in the table of `fastest`."""
        return self.always + (WORKSPACE if way == "experts split" else max(self.training, self.publishing))


@functools.cache
def memory(student: Student, ranks: int, way: str) -> Memory:
    """Memory of each of `ranks` trainer GPUs that train `student`."""
    adapters = (f"model.lora={{r: {ADAPTER_RANK}}}",) if way == "adapters" else ()
    return needed(student.config, ranks, student.micro_tokens, *adapters, whole=False)


def needed(model: PreTrainedConfig, ranks: int, tokens: int, *overrides: str, whole: bool) -> Memory:
    """Memory of each of `ranks` trainer GPUs, with micro-batches of `tokens`.

    Args:
        whole: whether every rank gathers all weights in fp32 to publish them, as rlkd did until it published by tensor.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        settings = [
            *(f"model.path={folder}", "model.gradient_checkpointing=true", f"rollout.max_tokens={tokens - PROMPT}"),
            *(f"data.path={folder}", f"data.max_prompt_tokens={PROMPT}", f"rollout.prompts={128 * ranks}"),
            *(f"trainer.micro_batch_tokens={tokens}", f"trainer.devices={ranks}"),
            "rollout.server={launch: false, urls: [http://server:8000], dtype: bfloat16}",  # on other machines
        ]
        place = trainer_place(load([str(Path("configs/grpo.yaml"))], [*settings, *overrides]).config)
        parameters = shape(model).parameters
    parts = {part.what: part.bytes for part in place.phases}
    publishing = parts.get("publishing", 0.0)
    if whole and ranks > 1:
        publishing = 4.0 * parameters
    return Memory(always=place.always, training=parts["training"], publishing=publishing)


@dataclass(frozen=True, kw_only=True)
class Split:
    """A division of the GPUs, and the seconds of the phases, which run one after the other."""

    trainers: int
    servers: int
    per_copy: int
    teachers: int
    rollout: float
    teacher: float
    train: float
    publish: float

    @property
    def total(self) -> float:
        """Seconds of an iteration."""
        return self.rollout + self.teacher + self.train + self.publish

    @property
    def gpus(self) -> int:
        """GPUs in use."""
        return self.trainers + self.servers + self.teachers

    @property
    def slowest(self) -> str:
        """Name of the longest phase."""
        phases = {name: getattr(self, name) for name in ("rollout", "teacher", "train", "publish")}
        return max(phases, key=phases.__getitem__)


def room(student: Student, per_copy: int) -> float:
    """Number of sequences of the mean length that a model copy on a server runs at once: those that fit into its
    memory, at most those that vLLM batches."""
    free = per_copy * CARD - 2 * student.model.parameters
    return min(free / (2 * student.model.cache * (PROMPT + student.longest / 2)), BATCHED)


def publish_seconds(student: Student, trainers: int, boxes: int, way: str, gpu: Machine) -> float:
    """Seconds to publish: all weights by NCCL, adapters in fp32 by disk."""
    if way == "adapters":
        return cost.disk_seconds(4 * cost.adapter_numbers(student.model, ADAPTER_RANK), gpu, boxes)
    count = cost.published_bytes(student.model)
    return cost.gather_seconds(count, gpu, trainers) + cost.nccl_seconds(count, gpu)


def counts(most: int, of: int) -> list[int]:
    """Multiples of `of` up to `most`: 1, 2, 3, 4, 6, 8, 12, 16, 24 … times."""
    times = sorted({1, *(2**i for i in range(1, 11)), *(3 * 2**i for i in range(10))})
    return [of * n for n in times if of * n <= most]


def splits(student: Student, teacher: Student, gpus: int, completions: int, way: str) -> Iterator[Split]:
    """Divisions of `gpus` where the trainers' memory suffices, servers and teachers hold complete copies, and the
    number of prompts is divisible by the trainers, as rlkd requires. Some GPUs may be left over."""
    mean, gpu = PROMPT + student.longest / 2, H100 if gpus <= BOX else ACROSS
    tokens = completions * mean
    adapters = cost.adapter_numbers(student.model, ADAPTER_RANK) if way == "adapters" else 0.0
    for trainers in range(1, gpus):
        if (completions // GROUP) % trainers or memory(student, trainers, way).peak(way) > CARD:
            continue
        projected = completions * student.longest / 2
        train = cost.gpu_training(student.model, gpu, tokens, projected, mean, trainers, student.micro_tokens, adapters)
        for teachers in counts(gpus - trainers, teacher.per_copy[0]):
            scored = cost.served_scoring(teacher.model, gpu, tokens, mean, teachers)
            left = gpus - trainers - teachers
            for size, servers in ((copy, n) for copy in student.per_copy for n in counts(left, copy)):
                rows, at_once = completions * size / servers, room(student, size)
                yield Split(
                    trainers=trainers,
                    servers=servers,
                    per_copy=size,
                    teachers=teachers,
                    rollout=cost.served_rollout(
                        student.model, gpu, rows, at_once, PROMPT, student.longest, size, GROUP
                    ),
                    teacher=scored,
                    # With expert parallelism tokens are communicated, which is not modelled.
                    train=train.compute + train.optimizer if way == "experts split" else train.total,
                    publish=publish_seconds(student, trainers, math.ceil(servers / BOX), way, gpu),
                )


def best_split(student: Student, teacher: Student, gpus: int, completions: int, way: str) -> Split | None:
    """The split on the fewest GPUs within SLACK of the fastest; None if nothing fits."""
    known = list(splits(student, teacher, gpus, completions, way))
    fastest = min((split.total for split in known), default=0.0)
    near = [split for split in known if split.total <= SLACK * fastest]
    return min(near, key=lambda split: (split.gpus, split.total), default=None)


def plan() -> None:
    """Print all tables of the plan."""
    small, middle, large = students()
    memories((small, middle, large))
    fastest(((small, middle), (middle, middle), (large, large)))
    published((small, middle, large))
    steps((small, middle, large))


def memories(known: Sequence[Student]) -> None:
    """Print the memory that each student needs, by number of trainers."""
    print("Memory of a trainer GPU, GiB; a plan may use 72 of 80")
    print("host: main memory of a machine while its processes load the student")
    head = f"{'always':>9}{'+ training':>12}{'+ publishing':>14}{'adapters':>10}{'host':>8}"
    print(f"{'student':<10}{'GPUs':>6}{head}")
    for student in known:
        for ranks in (1, 4, 8, 16, 64, 512):
            full = memory(student, ranks, "all weights")
            adapted = memory(student, ranks, "adapters").peak("adapters") / GIB
            checked = student.shape.outside + student.shape.largest_block
            host = cost.loading_bytes(student.model.parameters, min(ranks, BOX) / ranks, checked) / GIB
            peaks = (full.always, full.always + full.training, full.always + full.publishing)
            cells = "".join(f"{value / GIB:>{width}.0f}" for value, width in zip(peaks, (9, 12, 14), strict=True))
            last = "–" if student.model.routed else f"{adapted:.0f}"
            print(f"{student.name:<10}{ranks:>6}{cells}{last:>10}{host:>8.0f}")


def fastest(pairs: Sequence[tuple[Student, Student]]) -> None:
    """Print the best split of each (student, teacher) on 8, 64 and 1,024 GPUs."""
    print(f"\nThe smallest split within {SLACK - 1:.0%} of the fastest; teacher: 32B, of 671B itself; seconds")
    head = ("trainers", "servers", "a copy", "teachers", "rollout", "teacher", "train", "publish", "step", "idle")
    print(f"{'student':<10}{'GPUs':>5}{'samples':>8}  {'trained':<17}" + "".join(f"{h:>9}" for h in head) + "  slowest")
    for student, teacher in pairs:
        for gpus, completions in ((8, 1024), (64, 1024), (1024, 1024), (1024, 16384)):
            for way in ("all weights", "experts split" if student.model.routed else "adapters"):
                line = f"{student.name:<10}{gpus:>5}{completions:>8}  {way:<17}"
                best = best_split(student, teacher, gpus, completions, way)
                if best is None:
                    print(line + "  nothing fits")
                    continue
                idle = f"{100 * (1 - best.train / best.total):.0f} %"
                cells = "".join(f"{n:>9}" for n in (best.trainers, best.servers, best.per_copy, best.teachers))
                seconds = (best.rollout, best.teacher, best.train, best.publish, best.total)
                print(line + cells + "".join(f"{s:>9.1f}" for s in seconds) + f"{idle:>9}  {best.slowest}")


def published(known: Sequence[Student]) -> None:
    """Print the seconds of publishing, by number of server machines."""
    print("\nPublishing to servers on separate machines, 64 trainers, seconds")
    for student in known:
        count = cost.published_bytes(student.model)
        adapters = 4 * cost.adapter_numbers(student.model, ADAPTER_RANK)
        gathered, sent = cost.gather_seconds(count, ACROSS, 64), cost.nccl_seconds(count, ACROSS)
        print(f"{student.name}: {count / 1e9:.0f} GB, gathered in {gathered:.2f}, by NCCL {sent:.2f} to any number")
        for boxes in (1, 4, 16, 32, 64, 128):
            ways = {"disk": cost.disk_seconds(count, ACROSS, boxes)}
            if not student.model.routed:
                ways[f"adapters ({adapters / 1e9:.2f} GB) by disk"] = cost.disk_seconds(adapters, ACROSS, boxes)
            print(f"{boxes:>6} machines: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in ways.items()))


def steps(known: Sequence[Student]) -> None:
    """Print decode times, and the micro-batch from which communication is hidden."""
    print("\nA decode step of a copy by rows, context 4,096, ms (of which weights, caches)")
    for student in known:
        model, gpus = student.model, student.per_copy[0]
        cells = []
        for rows in (1, 16, 64, 256, 1024):
            seconds = cost.served_step(model, H100, rows, 4096, gpus)
            weights = 2 * (cost.touched(model, rows) + model.output_layer) / H100.memory / gpus
            cache = 2 * rows * 4096 * model.cache / H100.memory / gpus
            cells.append(f"{rows}: {1e3 * seconds:.1f} ({1e3 * weights:.1f}, {1e3 * cache:.1f})")
        print(f"{student.name} on {gpus} GPUs, room for {room(student, gpus):.0f} sequences: " + "; ".join(cells))
    print("\nTokens of a micro-batch from which arithmetic hides FSDP2's communication")
    for student in known:
        cells = []
        for ranks, gpu in ((8, H100), (64, ACROSS), (512, ACROSS)):
            micro = student.micro_tokens
            tokens, length = ranks * micro, student.longest / 2
            projected = tokens * student.longest / student.micro_tokens
            one = cost.gpu_training(student.model, gpu, tokens, projected, length, ranks, micro)
            cells.append(f"{ranks} GPUs {micro * one.communication / one.compute:,.0f}")
        print(f"{student.name}: " + ", ".join(cells))


def fits() -> None:
    """Print which students fit into 80 GB cards, with all weights gathered to publish them and tensor by tensor."""
    known = {
        "7B": qwen(28, 3584, 18944, 28, 4),
        "14B": qwen(48, 5120, 13824, 40, 8),
        "32B": qwen(64, 5120, 27648, 40, 8),
        "70B": qwen(80, 8192, 28672, 64, 8),
        "30B-A3B": Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            dtype="bfloat16",
        ),
    }
    print(
        f"GiB at most on each of N trainer GPUs of 80 GB (of which {USABLE / GIB:.0f} GiB can be used), {FITTED} tokens"
    )
    print("published whole: all weights in fp32 on every rank, 4 P; by tensor: the largest one in fp32 and bf16")
    print(f"{'student':<9}{'1e9':>6}{'GPUs':>6}{'always':>8}{'training':>10}{'whole':>12}{'by tensor':>12}")
    for name, config in known.items():
        for ranks in (8, 16, 64):
            before, after = (needed(config, ranks, FITTED, whole=whole) for whole in (True, False))
            cells = "".join(
                f"{at.peak('all weights') / GIB:>8.0f}{' yes' if at.peak('all weights') <= USABLE else '  no'}"
                for at in (before, after)
            )
            billions = shape(config).parameters / 1e9
            training = (after.always + after.training) / GIB
            print(f"{name:<9}{billions:>6.1f}{ranks:>6}{after.always / GIB:>8.0f}{training:>10.0f}{cells}")


if __name__ == "__main__":
    fits()
