"""What the stream of groups gains: sampling ahead, rewards while others sample, and how an iteration grows.

python benchmarks/stream.py slow_reward [--before 9d77969] [--repeats 3]     a judge of 0.2 s a completion
python benchmarks/stream.py staleness [--seeds 0 1 2] [--iterations 150]     server and trainer on a core each
python benchmarks/stream.py growth [--plot benchmarks/growth.png]            completions, lengths, and ranks

Each prints a table, and --output writes it to a file. Every run is a process of `python -m rlkd.train`, and all times
are medians over its iterations, as metrics.jsonl has them. Two idle cores are needed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from against_trl import SMALL, Case, write_work

from rlkd.servers import supervisor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
JUDGE_S = 0.2
GROUP = 8
TRAINER_CORE, SERVER_CORE = 0, 1
START_S = 300.0
"""Within which a server must answer."""
QUIET = ("log={rollouts_every: 0, progress: false}", "checkpoint={every: 0, export: false}")

Row = dict[str, Any]


def judge(completion: str, **_: Any) -> float:
    """A slow reward, like a model that is asked elsewhere: 1 if the completion has an even number of characters."""
    time.sleep(JUDGE_S)
    return float(len(completion) % 2 == 0)


# ---- runs ------------------------------------------------------------------------------------------------------------


def train(
    folder: Path, config: str, overrides: Iterable[str], *, code: Path = ROOT, ranks: int = 1, core: int | None = None
) -> list[Row]:
    """The metrics of a new run in `folder`/run, which must not be there.

    Args:
        code: the checkout whose rlkd runs.
        core: the only core of the training process.

    Raises: RuntimeError with the end of its output if it fails.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "rlkd.train", "--config", str(ROOT / f"configs/{config}.yaml")]
    command += [f"run.dir={folder}", "run.name=run", f"trainer.devices={ranks}", *QUIET, *overrides]
    pinned = ["taskset", "--cpu-list", str(core)] if core is not None else []
    done = subprocess.run(
        [*pinned, *command], env=environment(code), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-3000:]}")
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@contextmanager
def server(folder: Path, config: str, overrides: Sequence[str], code: Path = ROOT) -> Iterator[list[str]]:
    """Overrides for a run whose policy server, started here, has SERVER_CORE for itself.

    Raises: RuntimeError with the end of its log if it does not answer.
    """
    os.environ.setdefault("RLKD_SERVER_KEY", secrets.token_urlsafe(32))  # the runs read it, too
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["taskset", "--cpu-list", str(SERVER_CORE), sys.executable, "-m", "rlkd.serve", "--role", "policy"]
    command += ["--config", str(ROOT / f"configs/{config}.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    log, url = folder / "server.log", f"http://127.0.0.1:{port}"
    connected = ["rollout.server.launch=false", f"rollout.server.urls=['{url}']"]
    bound = {"VLLM_CPU_OMP_THREADS_BIND": str(SERVER_CORE)}
    with open(log, "wb") as errors:
        arguments = ["--log", str(log), "--", *command, *overrides, *connected]
        keeper = supervisor.start(arguments, errors, environment(code) | bound)
    try:
        until = time.monotonic() + START_S
        while not healthy(url):
            if keeper.poll() is not None or time.monotonic() > until:
                raise RuntimeError(log.read_text(errors="replace")[-3000:])
            time.sleep(0.25)
        yield connected
    finally:
        keeper.communicate()  # closes its stdin: it ends the server
        keeper.wait()


def healthy(url: str) -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def environment(code: Path) -> dict[str, str]:
    """That of a process that runs the rlkd of the checkout `code`, in one thread."""
    mine = {"PYTHONPATH": os.pathsep.join([str(code), str(HERE)]), "PYTHONSAFEPATH": "1"}  # not that of the directory
    return os.environ | mine | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def medians(rows: Sequence[Row], skip: int, *names: str) -> list[float]:
    """The median of each metric over the iterations after the first `skip`."""
    kept = [row for row in rows if row["iteration"] > skip]
    return [statistics.median(row[name] for row in kept) for name in names]


def random_model(folder: Path, **sizes: int) -> tuple[str, ...]:
    """Overrides for a random Llama with 0.8M parameters besides its embeddings, written to `folder` with prompts."""
    write_work(Case("stream", "", **SMALL, target=1.0, **sizes), folder)
    data = f"data={{path: {folder / 'prompts.jsonl'}, id_column: id, max_prompt_tokens: 12}}"
    grpo = f"algorithm={{name: grpo, group_size: {GROUP}}}"
    return f"model.path={folder / 'model'}", data, grpo, "teacher={backend: none}", "optim.lr=1.0e-6", "eval.every=0"


def table(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A markdown table."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)


# ---- slow_reward -----------------------------------------------------------------------------------------------------


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A worktree of `commit`, removed afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "code")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
        try:
            yield folder
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def slow_reward(args: argparse.Namespace) -> str:
    """A reward of 0.2 s a completion: this code and the commit before the stream in turn, configured alike."""
    settings = (
        f"rollout={{backend: vllm, prompts: 16, max_tokens: {args.length}, max_mismatch: 1.0e-3}}",
        f"reward={{functions: [{{name: 'stream:judge'}}], workers: {args.workers}}}",
        f"run.iterations={args.iterations}",
    )
    names = "time/total", "time/rollout", "time/reward", "time/train", "completion/length"
    found: dict[str, list[list[float]]] = {"here": [], args.before: []}
    with checkout(args.before) as old:
        for i in range(args.repeats):
            for name, code in sorted({"here": ROOT, args.before: old}.items(), reverse=bool(i % 2)):
                with tempfile.TemporaryDirectory() as work:
                    folder = Path(work)
                    model = random_model(folder, max_tokens=args.length, vocabulary=args.vocabulary)
                    with server(folder, "quickstart", (*model, *settings), code) as connected:
                        mine = (*model, *settings, *connected)
                        rows = train(folder, "quickstart", mine, code=code, core=TRAINER_CORE)
                found[name].append(medians(rows, 2, *names))
                print(name, dict(zip(names, found[name][-1], strict=True)), file=sys.stderr, flush=True)
    lines = []
    for name, runs in found.items():
        values = [statistics.median(run[k] for run in runs) for k in range(len(names))]
        lines.append([name, *(f"{value:.2f}" for value in values[:-1]), f"{values[-1]:.1f}"])
    all_rewards, last = (JUDGE_S * math.ceil(count / args.workers) for count in (16 * GROUP, GROUP))
    note = f"All rewards take {all_rewards:.2f} s with {args.workers} workers, those of a group {last:.2f} s."
    columns = ("code", "time/total", "time/rollout", "time/reward: not hidden", "time/train", "mean length")
    return f"{table(columns, lines)}\n\n{note}"


# ---- staleness -------------------------------------------------------------------------------------------------------


def staleness(args: argparse.Namespace) -> str:
    """Sampling ahead: GRPO on the built-in task, server and trainer on a core each, with a new server for each run."""
    settings = (
        *(f"algorithm={{name: grpo, group_size: {GROUP}}}", "teacher={backend: none}"),
        *(f"rollout.prompts={args.prompts}", f"trainer.updates_per_iteration={args.updates}"),
        *(f"run.iterations={args.iterations}", f"eval.every={args.iterations}"),
        f"trainer.micro_batch_tokens={args.micro}",
    )
    names = "time/total", "time/rollout", "time/train", "time/publish"
    found: dict[int, list[list[float]]] = {0: [], 1: []}
    scores: dict[int, list[tuple[float, float, float]]] = {0: [], 1: []}
    for seed in args.seeds:
        for ahead in sorted(found, reverse=bool(seed % 2)):
            mine = (*settings, f"rollout.max_staleness={ahead}", f"run.seed={seed}")
            with (
                tempfile.TemporaryDirectory() as name,
                server(Path(name), "quickstart_vllm", mine) as connected,
            ):
                rows = train(Path(name), "quickstart_vllm", (*mine, *connected), core=TRAINER_CORE)
            found[ahead].append(medians(rows, 5, *names))
            scores[ahead].append((rows[0]["eval/greedy"], rows[-1]["eval/greedy"], rows[-1]["eval/avg@k"]))
            print(ahead, seed, dict(zip(names, found[ahead][-1], strict=True)), scores[ahead][-1], file=sys.stderr)
    values = {ahead: [statistics.median(run[k] for run in runs) for k in range(4)] for ahead, runs in found.items()}
    lines = []
    for ahead, value in values.items():
        accuracy = "; ".join(f"{100 * greedy:.0f} / {100 * sampled:.0f}" for _, greedy, sampled in scores[ahead])
        rise = statistics.fmean(after - before for before, after, _ in scores[ahead])
        ratio = f"{values[0][0] / value[0]:.2f}"
        times = (f"{seconds:.3f}" for seconds in value)
        lines.append([ahead, *times, f"{3600 / value[0]:.0f}", ratio, accuracy, f"{100 * rise:+.0f}"])
    rollout, training = values[0][1:3]
    columns = ("max_staleness", *names, "iterations/h", "ratio", "greedy / avg@k % by seed", "mean rise of greedy")
    bound = (rollout + training) / max(rollout, training)
    note = f"If nothing but sampling and training took time, the ratio could be {bound:.2f} at most."
    return f"{table(columns, lines)}\n\n{note}"


# ---- growth ----------------------------------------------------------------------------------------------------------


def growth(args: argparse.Namespace) -> str:
    """Growth of an iteration with completions and with their length, on one rank and on two that share the work."""
    sweeps = {
        "completions": [(n, {"count": n, "length": args.length}) for n in args.completions],
        "length": [(n, {"count": args.count, "length": n}) for n in args.lengths],
    }
    names = "time/total", "time/rollout", "time/train", "completion/length"
    lines: list[list[Any]] = []
    curves: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for what, points in sweeps.items():
        for ranks in (1, 2):
            before: list[float] = []
            for size, point in points:
                values = iteration(names, ranks, args.iterations, **point)
                exponents = ["–"] * 3
                if before:
                    step = math.log(size / before[-1])
                    exponents = [f"{math.log(values[k] / before[k]) / step:.2f}" for k in range(3)]
                before = [*values[:3], size]
                pairs = (f"{seconds:.2f} ({exponent})" for seconds, exponent in zip(values[:3], exponents, strict=True))
                lines.append([what, size, ranks, *pairs, f"{values[3]:.1f}"])
                curves.setdefault((what, ranks), []).append((size, values[0]))
                print(*lines[-1], file=sys.stderr, flush=True)
    if args.plot is not None:
        draw(curves, args.plot)
    columns = ("what grows", "size", "ranks", *(f"{name} s (exponent)" for name in names[:3]), "mean length")
    note = f"Lengths are {args.length} where completions grow, and completions {args.count} where lengths do."
    return f"{table(columns, lines)}\n\n{note}"


def iteration(names: Sequence[str], ranks: int, iterations: int, *, count: int, length: int) -> list[float]:
    """Medians of a run after 2 iterations to warm up."""
    with tempfile.TemporaryDirectory() as name:
        settings = (
            *random_model(Path(name), max_tokens=length, vocabulary=4096),
            f"rollout={{backend: hf, prompts: {count // GROUP}, max_tokens: {length}}}",
            *("reward={functions: [{name: 'against_trl:even'}]}", f"run.iterations={2 + iterations}"),
        )
        return medians(train(Path(name), "quickstart", settings, ranks=ranks), 2, *names)


def draw(curves: dict[tuple[str, int], list[tuple[int, float]]], path: Path) -> None:
    """Draw the seconds of an iteration over its size, one panel for each thing that grows, with lines of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.5))
    for axes, what in zip(panels, ("completions", "length"), strict=True):
        for ranks in (1, 2):
            sizes, seconds = zip(*curves[what, ranks], strict=True)
            axes.loglog(sizes, seconds, "o-", base=2, label=f"{ranks} rank{'s' if ranks > 1 else ''}")
        first, last = curves[what, 1][0], curves[what, 1][-1]
        line = [last[1] * first[0] / last[0], last[1]]
        axes.loglog([first[0], last[0]], line, "k--", base=2, alpha=0.5, label="slope 1")
        axes.set(xlabel=f"{what} of an iteration" if what == "completions" else "tokens of a completion")
        axes.set(ylabel="seconds of an iteration", title=f"growing {what}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_subparsers(required=True)

    def command(act: Callable[[argparse.Namespace], str]) -> argparse.ArgumentParser:
        own = chosen.add_parser(act.__name__, help=act.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        own.set_defaults(act=act)
        own.add_argument("--output", type=Path, help="where to write the table, too")
        return own

    slow = command(slow_reward)
    slow.add_argument("--before", default="9d77969", help="commit to compare with")
    slow.add_argument("--repeats", type=int, default=3, help="runs of each")
    slow.add_argument("--iterations", type=int, default=8)
    slow.add_argument("--workers", type=int, default=16, help="judges at a time")
    slow.add_argument("--length", type=int, default=512, help="longest completion")
    slow.add_argument("--vocabulary", type=int, default=64, help="completions end with a probability of 1 / vocabulary")
    stale = command(staleness)
    stale.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    stale.add_argument("--iterations", type=int, default=150)
    stale.add_argument("--prompts", type=int, default=32)
    stale.add_argument("--updates", type=int, default=1, help="optimizer steps of an iteration")
    stale.add_argument(
        "--micro", type=int, default=256, help="tokens of a micro-batch: fewer, and training takes longer"
    )
    grows = command(growth)
    grows.add_argument("--completions", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    grows.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    grows.add_argument("--count", type=int, default=64, help="completions where lengths grow")
    grows.add_argument("--length", type=int, default=32, help="tokens where completions grow")
    grows.add_argument("--iterations", type=int, default=3, help="those that count")
    grows.add_argument("--plot", type=Path)
    args = parser.parse_args()
    found = f"\n## {args.act.__doc__.splitlines()[0].removesuffix('.')}\n\n{args.act(args)}"
    print(found)
    if args.output is not None:
        args.output.write_text(found + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
