"""Runs the trainer in separate processes, without ten seconds of imports for each.

A server process only does the imports; each run is forked from it, has its own pid, and can really be killed. It
differs from a run in a fresh interpreter only in the interpreter's start: hash seeds are the server's, modules were
imported in the server's environment, and atexit handlers do not run. If one of these matters, start
`python -m rlkd.train` instead.
"""

import importlib
import multiprocessing
import os
import re
import signal
import socket
import sys
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["heavy_imports"])


@dataclass(frozen=True)
class Run:
    """A started run; `out` and `err` are the files with its output."""

    process: multiprocessing.process.BaseProcess
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; -9 after SIGKILL."""
        return self.process.exitcode

    def wait(self, timeout: float) -> int | None:
        """The exit code, or None if the run has not ended after `timeout` seconds."""
        self.process.join(timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self.send_signal(signal.SIGKILL)
        self.process.join()


def start(argv, folder, env=None, cwd=None, main="rlkd.train:main") -> Run:
    """`python -m rlkd.train ARGV`, its prints in `folder`/out.txt and err.txt.

    Args:
        main: another function than the trainer's, of a module in tests/.
        env: the whole environment; None: this process's, with one thread.
        cwd: None: this process's.
    """
    _serve()
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    out, err = folder / "out.txt", folder / "err.txt"
    for path in (out, err):
        path.write_text("")  # a run that is killed at once must not leave the texts of the one before it
    where = str(Path.cwd() if cwd is None else cwd)
    process = _CONTEXT.Process(target=_run, args=(main, list(argv), dict(ENV if env is None else env), where, out, err))
    process.start()
    return Run(process, out, err)


def train(argv, folder, env=None, cwd=None, timeout=300) -> str:
    """Run the trainer to its end, which must succeed, and return its output."""
    (output,) = train_ranks(1, argv, folder, env, cwd, timeout)
    return output


def train_ranks(ranks, argv, folder, env=None, cwd=None, timeout=300, main="rlkd.train:main") -> list[str]:
    """`ranks` processes that meet as torchrun's do, all of which must succeed; what each printed."""
    runs = start_ranks(ranks, argv, folder, env, cwd, main)
    try:
        for run in runs:
            assert run.wait(timeout) == 0, (run.returncode, run.err.read_text()[-3000:])
    finally:
        for run in runs:
            run.kill()
    return [run.out.read_text() for run in runs]


def start_ranks(ranks, argv, folder, env=None, cwd=None, main="rlkd.train:main") -> list[Run]:
    """Ranks without torchrun's agent: whoever starts them looks after them. One rank is a plain run."""
    env = ENV if env is None else env
    if ranks == 1:
        return [start(argv, folder, env, cwd, main)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [start(argv, Path(folder, f"rank{rank}"), env | shared | own[rank], cwd, main) for rank in range(ranks)]


def run_code(code, folder, *arguments, ranks=2, env=None) -> list[str]:
    """What `code` prints in each of `ranks` processes, in which sys.argv is ["-c", its rank, *arguments]."""
    return train_ranks(ranks, [code, *map(str, arguments)], folder, env, main="runs:execute")


def execute(argv) -> int:
    """Run argv[0] as Python code; see `run_code`."""
    code, *arguments = argv
    sys.argv = ["-c", os.environ.get("RANK", "0"), *arguments]
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
    return 0


def _serve() -> None:
    """Start the server, if there is none, in the root of this checkout, so that the runs use its rlkd."""
    before, here = dict(os.environ), os.getcwd()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    os.chdir(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ |= before


def _run(main, argv, env, cwd, out, err) -> None:
    """In the forked process."""
    here = sys.modules["rlkd.train"].__file__  # KeyError: the server has not imported what it should
    assert Path(here).is_relative_to(ROOT), here
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ |= env
    os.chdir(cwd)
    sys.path[:0] = [cwd, *env.get("PYTHONPATH", "").split(":")]  # as `python -m` does
    module, function = main.split(":")
    sys.exit(getattr(importlib.import_module(module), function)(argv))


# 4 prompts × 4 samples; a budget of three rows a micro-batch, so that two ranks need unequal numbers of them.
SMALL = (
    "rollout.prompts=4",
    "algorithm.group_size=4",
    "data.limit=64",
    "data.max_prompt_tokens=24",
    "trainer.micro_batch_tokens=80",
    "eval.every=0",
    "checkpoint.every=5",
)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def arguments(ranks, folder, *overrides):
    where = (f"run.dir={folder.parent}", f"run.name={folder.name}", f"trainer.devices={ranks}")
    return ["--config", "configs/quickstart.yaml", *where, *SMALL, *overrides]


def train_small(ranks, folder, *overrides, env=ENV):
    return train_ranks(ranks, arguments(ranks, folder, *overrides), folder.parent, env)


RECIPE = """
run: {name: recipe, resume: auto, iterations: 2}
model: {path: builtin:student}
data: {path: builtin:reverse, max_prompt_tokens: 32, completion_column: answer, max_completion_tokens: 16, limit: 32}
rollout: {prompts: 8, max_tokens: 16, max_mismatch: 1.0e-3}
optim: {lr: 3.0e-4}
trainer: {accelerator: cpu}
eval: {every: 0}
algorithm: {name: sft}
log: {progress: false, rollouts_every: 0}
stages:
  imitate: {}
  taught:
    algorithm: {name: taid, over: 10}
    teacher: {backend: local, path: builtin:teacher}
  rewarded:
    algorithm: {name: grpo, group_size: 4}
    run: {iterations: 3}
"""


def config_files(config: Path) -> list[str]:
    """The config files of the command in the config's header; only the config itself if it needs no others."""
    header = "".join(line for line in config.read_text().splitlines(keepends=True) if line.startswith("#"))
    named = re.findall(r"--config configs/(\S+)", header)
    return [str(ROOT / "configs" / name) for name in (named if config.name in named else [config.name])]
