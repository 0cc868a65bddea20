"""What in-process generation takes: rlkd's decode against its first, plain form and transformers' `generate`.

    OMP_NUM_THREADS=2 python benchmarks/generation.py [WORKLOAD ...]

Each workload is 128 completions, 8 of each of 16 prompts of 12 to 23 tokens, by a Llama of random weights whose
completions end at lengths drawn beforehand: the noise forces the end there, and `generate`, which has noise of its own,
is forced by a logits processor. `generate` is called as GRPO in TRL 1.16 calls it. First the tokens of the two decodes
are compared. Then the three run in turn, and the command prints the median of their times in seconds (wall clock, and
the CPU time of the process, which other work on the machine disturbs less) and the ratios to the others.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from decode_reference import left_padded, plain_decode
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from rlkd.generation.hf import decode
from rlkd.types import Completion

PROMPTS, SAMPLES, VOCABULARY, END, PAD = 16, 8, 64, 0, 1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, and how long its completions are."""

    model: str
    longest: int
    lengths: Callable[[np.random.Generator], np.ndarray]
    """Draws the completions' lengths, [128]; those above `longest` are cut off."""


def geometric(mean: float) -> Callable[[np.random.Generator], np.ndarray]:
    """Lengths of completions that may end at any token with probability 1 / `mean`."""
    return lambda draw: draw.geometric(1 / mean, PROMPTS * SAMPLES)


def long_tailed(draw: np.random.Generator) -> np.ndarray:
    """Lengths from 4 to 256, most of them short."""
    return (4 * np.exp(draw.exponential(1.1, PROMPTS * SAMPLES))).astype(int).clip(4, 256)


WORKLOADS = {
    "0.8M-32": Workload(model="0.8M", longest=32, lengths=geometric(22)),
    "0.8M-128": Workload(model="0.8M", longest=128, lengths=geometric(64)),
    "0.8M-tail": Workload(model="0.8M", longest=256, lengths=long_tailed),
    "10M-32": Workload(model="10M", longest=32, lengths=geometric(22)),
    "10M-128": Workload(model="10M", longest=128, lengths=geometric(64)),
}
SIZES = {"0.8M": (128, 4, 344, 4), "10M": (384, 6, 1024, 6)}
"""Hidden size, layers, width of the MLP, heads."""


def llama(size: str) -> LlamaForCausalLM:
    """A model with random weights, in fp32."""
    hidden, layers, width, heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).eval()


def inputs(workload: Workload) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """(prompts [128], noise [128, longest], lengths [128] of the completions)."""
    draw = np.random.default_rng(1)
    prompts = [draw.integers(2, VOCABULARY, draw.integers(12, 24)).tolist() for _ in range(PROMPTS)]
    drawn = workload.lengths(draw)
    noise = 0.3 + 0.7 * draw.random((PROMPTS * SAMPLES, workload.longest))  # no end: its probability is below 0.3
    stops = drawn <= workload.longest
    noise[stops, drawn[stops] - 1] = 0.0  # the end token has id 0
    return [p for p in prompts for _ in range(SAMPLES)], noise, drawn.clip(max=workload.longest)


class EndAt(LogitsProcessor):
    """Completions end at the given lengths, [B], and not before."""

    def __init__(self, lengths: np.ndarray, columns: int):
        self.last = torch.as_tensor(columns + lengths - 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, END] = torch.where(input_ids.shape[1] == self.last, torch.inf, -torch.inf)
        return scores.clamp(max=1e9)


@torch.no_grad()
def by_transformers(hf: LlamaForCausalLM, prompts: list[list[int]], lengths: np.ndarray, longest: int) -> list[int]:
    """Generate as TRL does. Returns: the completions' lengths."""
    ids, mask = left_padded(prompts)
    settings = GenerationConfig(
        max_new_tokens=longest,
        do_sample=True,
        pad_token_id=PAD,
        eos_token_id=[END],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        disable_compile=True,
    )
    enders = LogitsProcessorList([EndAt(lengths, ids.shape[1])])
    tokens = hf.generate(input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=enders)
    written = tokens[:, ids.shape[1] :]
    ended = (written == END).long()
    return torch.where(ended.any(1), ended.argmax(1) + 1, written.shape[1]).tolist()


def check_equal(plain: list[Completion], fast: list[Completion]) -> float:
    """The largest difference of the log-probs. Raises: AssertionError if a token or an end differs."""
    for a, b in zip(plain, fast, strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason), "the two decodes differ"
    return max(np.abs(np.subtract(a.logprobs, b.logprobs)).max() for a, b in zip(plain, fast, strict=True))


def times(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, tuple[float, float]]:
    """Medians of (wall-clock time, CPU time) in seconds of calls that run in turn."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            gc.collect()
            began, used = time.perf_counter(), time.process_time()
            call()
            taken[name].append((time.perf_counter() - began, time.process_time() - used))
    return {name: (median(wall for wall, _ in both), median(cpu for _, cpu in both)) for name, both in taken.items()}


def measure(name: str, repetitions: int) -> None:
    """Print the lines of one workload."""
    workload = WORKLOADS[name]
    hf = llama(workload.model)
    prompts, noise, lengths = inputs(workload)
    calls: dict[str, Callable[[], object]] = {
        "decode": lambda: decode(hf, VOCABULARY, prompts, noise, 1.0, [END]),
        "plain": lambda: plain_decode(hf, VOCABULARY, prompts, noise, 1.0, [END]),
        "generate": lambda: by_transformers(hf, prompts, lengths, workload.longest),
    }
    gap = check_equal(calls["plain"](), calls["decode"]())  # type: ignore[arg-type]
    assert calls["generate"]() == lengths.tolist(), "generate did not end where it should"
    found = times(calls, repetitions)
    count = sum(p.numel() for p in hf.parameters())
    print(
        f"{name}: {count:,} parameters, lengths {lengths.min()} to {lengths.max()}, mean {lengths.mean():.0f}; "
        f"same tokens as the plain form, log-probs within {gap:.1e}"
    )
    for other, (wall, cpu) in found.items():
        ratios = f"; decode takes {found['decode'][0] / wall:.2f} (wall), {found['decode'][1] / cpu:.2f} (CPU) of it"
        print(f"  {other:9} wall {wall:.3f} s, CPU {cpu:.3f} s{ratios if other != 'decode' else ''}", flush=True)


def main() -> None:
    """Measure the workloads that the command line names, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    for name in args.workloads or WORKLOADS:
        measure(name, args.repetitions)


if __name__ == "__main__":
    main()
