"""rlkd and TRL on the same work, side by side: `make bench` runs this and writes benchmarks/RESULTS.md.

    python benchmarks/against_trl.py [--only CASE …] [--repeats 7] [--threads 2]

For each case both frameworks run in a process of their own, with the same model, prompts, reward and number of threads.
The parent lets them do one iteration each in turn, so that whatever else the machine does hits both alike, and compares
the medians. Before that it checks that both give the same log-probs to the same tokens. Sampled tokens differ, so the
mean length of the completions is printed beside the times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WARM_UP = 2
"""Iterations before the first one that counts."""


@dataclass(frozen=True)
class Case:
    """One comparison of whole iterations, or of trainer steps alone."""

    name: str
    what: str
    hidden: int
    layers: int
    intermediate: int
    max_tokens: int
    target: float
    """The largest ratio of the times, rlkd / TRL, that we want."""
    prompts: int = 16
    group: int = 8
    prompt_tokens: int = 12
    vocabulary: int = 64
    """Untrained models end a completion with a probability of about 1 / vocabulary a token."""
    distilled: bool = False
    """On-policy distillation instead of GRPO: reverse KL over the whole vocabulary to a teacher of the same size."""
    step_only: bool = False
    """Train on the same completions again and again: no sampling, no rewards."""
    options: tuple[str, ...] = ()
    """Further options of rlkd."""

    @property
    def models(self) -> tuple[str, ...]:
        """The folders of the student and, if there is one, the teacher."""
        return ("model", "teacher") if self.distilled else ("model",)


SMALL, LARGE = {"hidden": 128, "layers": 4, "intermediate": 384}, {"hidden": 384, "layers": 6, "intermediate": 1024}
CASES = (
    Case("small_32", "GRPO, 0.8M parameters, 128 completions ≤ 32", **SMALL, max_tokens=32, target=0.67),
    Case(
        *("small_32_compiled", "… with trainer.compile"),
        **SMALL,
        max_tokens=32,
        target=0.5,
        options=("trainer.compile=true",),
    ),
    Case("small_128", "GRPO, 0.8M parameters, 128 completions ≤ 128", **SMALL, max_tokens=128, target=0.5),
    Case("large_32", "GRPO, 10M parameters, 128 completions ≤ 32", **LARGE, max_tokens=32, target=0.8),
    Case(
        *("large_32_shared", "… with trainer.share_prompts"),
        **LARGE,
        max_tokens=32,
        target=0.8,
        options=("trainer.share_prompts=true",),
    ),
    Case("large_128", "GRPO, 10M parameters, 128 completions ≤ 128", **LARGE, max_tokens=128, target=0.5),
    Case("long_tail", "GRPO, 0.8M parameters, lengths 1–256", **SMALL, max_tokens=256, target=0.33, vocabulary=40),
    Case(
        *("shared_prompts", "trainer step, 8 completions of 64, prompts of 512"),
        **SMALL,
        max_tokens=64,
        target=0.33,
        prompts=4,
        prompt_tokens=512,
        vocabulary=4096,
        step_only=True,
        options=("trainer.share_prompts=true",),
    ),
    Case(
        *("distillation", "on-policy distillation, vocabulary 151,936, 32 completions of 32"),
        **{"hidden": 256, "layers": 4, "intermediate": 768},
        max_tokens=32,
        target=0.5,
        prompts=32,
        group=1,
        vocabulary=151_936,
        distilled=True,
    ),
)


def even(completion: str, **_: Any) -> float:
    """The reward: 1 if the completion has an even number of characters."""
    return float(len(completion) % 2 == 0)


def write_work(case: Case, folder: Path) -> None:
    """A random Llama with a tokenizer of one character a token, another as its teacher, and the prompts."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        intermediate_size=case.intermediate,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=case.prompt_tokens + case.max_tokens + 8,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    for seed, name in enumerate(case.models):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
    letters = [chr(0x10000 + i) for i in range(case.vocabulary - 3)]
    words = {"<pad>": 0, "<eos>": 1, "<turn>": 2} | {letter: i for i, letter in enumerate(letters, 3)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", additional_special_tokens=["<turn>"]
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}<turn>"
    for name in case.models:
        tokenizer.save_pretrained(folder / name)
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
        for row in range(256):
            text = "".join(letters[(7 * row + 3 * t) % len(letters)] for t in range(case.prompt_tokens - 1))
            file.write(json.dumps({"prompt": text, "answer": "", "id": str(row)}) + "\n")


def fixed_tokens(case: Case) -> tuple[list[int], list[int]]:
    """(prompt, completion) on which both frameworks' log-probs are compared."""
    return [3 + t % 20 for t in range(8)], [3 + 5 * t % 20 for t in range(12)]


TRL_PLAIN: dict[str, Any] = {
    "temperature": 1.0,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""Settings of TRL's trainers on a CPU, with nothing logged or saved."""


# ---- the two sides ---------------------------------------------------------------------------------------------------


def say(**message: Any) -> None:
    print("@" + json.dumps(message), flush=True)


def wait() -> None:
    """Wait for the parent's word; exit when it closes the pipe."""
    if not sys.stdin.readline():
        os._exit(0)


def algorithm(case: Case, folder: Path) -> list[str]:
    """rlkd's options of the method."""
    if not case.distilled:
        reward = "reward={functions: [{name: 'against_trl:even'}]}"
        return [f"algorithm={{name: grpo, group_size: {case.group}}}", "teacher=null", reward]
    divergence = "{tier: full, kind: reverse_kl}"
    teacher = f"teacher={{backend: local, path: {folder / 'teacher'}}}"
    return [f"algorithm={{name: opd, group_size: 1, divergence: {divergence}}}", teacher, "data.answer_column=null"]


def rlkd_side(case: Case, folder: Path) -> None:
    """Iterations of rlkd, one for each line of stdin."""
    import torch
    from divergence_memory import resident

    from rlkd.config_file import load
    from rlkd.models.logprob_head import token_logprobs
    from rlkd.models.student import load_causal_lm
    from rlkd.pipeline.loader import RolloutLoader
    from rlkd.run.fit import build_trainer, callbacks
    from rlkd.training.module import PolicyModule
    from rlkd.types import Batch

    config = load(
        [],
        [
            *(f"model.path={folder / 'model'}", f"data.path={folder / 'prompts.jsonl'}", f"run.dir={folder}"),
            *("data.id_column=id", f"data.max_prompt_tokens={case.prompt_tokens}", "run.name=run"),
            *(*algorithm(case, folder), "run.iterations=1000000"),
            *(f"rollout={{backend: hf, prompts: {case.prompts}, max_tokens: {case.max_tokens}}}", "optim.lr=1.0e-6"),
            *("log={rollouts_every: 0, progress: false}", "eval.every=0"),
            *("checkpoint={every: 0, export: false}", "trainer.accelerator=cpu"),
            *("trainer.micro_batch_tokens=65536", *case.options),
        ],
    ).config
    hf = load_causal_lm(config.model.path, torch.float32, attention=None, trust_remote_code=False)
    prompt, completion = fixed_tokens(case)
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        hidden = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = hf.get_output_embeddings()
        logprobs, _ = token_logprobs(hidden, head, ids, temperature=1.0, config=hf.config)
    say(ready=True, logprobs=logprobs[0, len(prompt) :].tolist())

    class Stepped(RolloutLoader):
        """Begins an iteration when the parent says so, and reports its time when it is over."""

        def __iter__(self) -> Iterator[Batch]:
            kept: Batch | None = None
            while True:
                if case.step_only and kept is None:
                    kept = self.batch(0)
                wait()
                started = time.perf_counter()
                batch = self.batch(self.iteration) if kept is None else kept
                self.iteration += 1
                yield batch
                seconds = time.perf_counter() - started
                length = (batch.lengths - batch.prompt_lengths).double().mean()
                say(seconds=seconds, length=float(length), memory=resident("VmHWM"))

    module = PolicyModule(config)
    loader = Stepped(config, module.algorithm)
    build_trainer(config, callbacks(config, loader)).fit(module, loader)


def trl_side(case: Case, folder: Path) -> None:
    """Steps of TRL's GRPOTrainer or DistillationTrainer, one for each line of stdin."""
    import torch
    from datasets import Dataset
    from divergence_memory import resident
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    model, *teachers = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in case.models
    )
    lengths: list[float] = []

    def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.append(statistics.fmean(map(len, completion_ids)))
        return [even(completion[0]["content"]) for completion in completions]

    class Stepped(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            # Untrained models of a large vocabulary do not end before the limit.
            length = case.max_tokens if case.distilled else lengths[-1]
            say(seconds=time.perf_counter() - self.started, length=length, memory=resident("VmHWM"))

    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": case.prompts * case.group,
        "max_completion_length": case.max_tokens,
        "learning_rate": 1e-6,
        "max_steps": 1_000_000,
        "weight_decay": 0.0,
        **TRL_PLAIN,
    }
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows])
    parts: dict[str, Any] = {
        "model": model,
        "train_dataset": data,
        "processing_class": AutoTokenizer.from_pretrained(folder / "model"),
        "callbacks": [Stepped()],
    }
    if case.distilled:
        trainer = DistillationTrainer(args=DistillationConfig(beta=1.0, **common), teacher_model=teachers[0], **parts)
    else:
        arguments = GRPOConfig(
            num_generations=case.group,
            num_iterations=1_000_000 if case.step_only else 1,
            beta=0.0,
            loss_type="dapo",
            **common,
        )
        trainer = GRPOTrainer(args=arguments, reward_funcs=reward, **parts)
    prompt, completion = fixed_tokens(case)
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        if case.distilled:
            logits = trainer.model(ids).logits[:, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(-1, ids[:, len(prompt) :, None]).squeeze(-1)
        else:
            logprobs, *_ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), len(completion)
            )
    say(ready=True, logprobs=logprobs[0].tolist())
    trainer.train()


# ---- the parent ------------------------------------------------------------------------------------------------------


class Side:
    """One of the two processes."""

    def __init__(self, side: str, case: Case, folder: Path, threads: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
            "HF_HUB_OFFLINE": "1",
        }
        own = folder / side
        own.mkdir()
        self.log = open(own / "log.txt", "w", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--side", side, "--only", case.name, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            cwd=own,
        )

    def hear(self) -> dict[str, Any]:
        """The next message. Raises: RuntimeError if the process has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return dict(json.loads(line[1:]))
        raise RuntimeError(f"a side has ended: {Path(self.log.name).read_text(encoding='utf-8')[-2000:]}")

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def compare(case: Case, repeats: int, threads: int) -> dict[str, Any]:
    """Medians and their ratio for one case. Raises: RuntimeError if the log-probs of both sides differ."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_work(case, folder)
        sides = {side: Side(side, case, folder, threads) for side in ("rlkd", "trl")}
        try:
            ours, theirs = (side.hear()["logprobs"] for side in sides.values())
            gap = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            if not gap < 1e-4:
                raise RuntimeError(f"{case.name}: the log-probs differ by {gap:.2g}")
            first: dict[str, float] = {}
            found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for i in range(WARM_UP + repeats):
                for side in sorted(sides, reverse=bool(i % 2)):  # neither is always the first
                    answer = sides[side].step()
                    first.setdefault(side, answer["seconds"])
                    if i >= WARM_UP:
                        found[side].append(answer)
        finally:
            for side in sides.values():
                side.end()
    medians = {side: statistics.median(one["seconds"] for one in of) for side, of in found.items()}
    ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(found["rlkd"], found["trl"], strict=True))
    return {
        "case": case,
        "gap": gap,
        "seconds": medians,
        "first": first,
        "ratio": medians["rlkd"] / medians["trl"],
        "range": (ratios[0], ratios[-1]),
        "length": {side: statistics.fmean(one["length"] for one in of) for side, of in found.items()},
        "memory": {side: max(one["memory"] for one in of) for side, of in found.items()},
    }


HEADER = """# rlkd against TRL

Generated by `make bench` (`benchmarks/against_trl.py`). Both frameworks did the same work in turn, an iteration each,
on the CPU with {threads} threads in fp32: TRL {trl}, torch {torch}, transformers {transformers}. Seconds are medians of
{repeats} iterations after {warm_up} to warm up; the range is that of the ratios of neighbouring iterations. Before each
case both gave the same tokens the same log-probs, up to the gap in the last column. The first iteration (`first`),
memory and lengths are those of rlkd / TRL. Memory is the peak of the whole process, libraries and optimizer included.

| work | rlkd s | TRL s | ratio | range | target | first s | GiB | mean length | gap |
|---|---|---|---|---|---|---|---|---|---|
"""


def line(result: dict[str, Any]) -> str:
    """A row of the table."""
    case, seconds = result["case"], result["seconds"]
    low, high = result["range"]
    cells = (
        case.what,
        f"{seconds['rlkd']:.3f}",
        f"{seconds['trl']:.3f}",
        f"**{result['ratio']:.2f}**",
        f"{low:.2f}–{high:.2f}",
        f"≤ {case.target}",
        *(
            " / ".join(f"{result[name][side]:.1f}" for side in ("rlkd", "trl"))
            for name in ("first", "memory", "length")
        ),
        f"{result['gap']:.1g}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="where to write the table; by default it is only printed")
    parser.add_argument("--side", choices=("rlkd", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = [case for case in CASES if case.name in args.only]
    if args.side is not None:
        {"rlkd": rlkd_side, "trl": trl_side}[args.side](chosen[0], args.folder)
        return
    header = HEADER.format(
        **{name: version(name) for name in ("trl", "torch", "transformers")},
        threads=args.threads,
        repeats=args.repeats,
        warm_up=WARM_UP,
    )
    lines = []
    for case in chosen:
        lines.append(line(compare(case, args.repeats, args.threads)))
        print(lines[-1], flush=True)
    if args.output is not None:
        args.output.write_text(header + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
