"""Whole runs on one GPU, through the command line, with servers on the same GPU."""

import signal
import time

import psutil
import pytest
import torch
from gpu_runs import QUICK, checked, command, finish, start, train, used_gib, write_data
from processes import wait_until

from rlkd.servers.placement import weight_sync

pytestmark = pytest.mark.gpu


def readme(qwen, folder, sleep):
    """README's command, with the model as student and teacher, everything on one GPU, and short."""
    data = write_data(folder)
    shares = (0.3, 0.2) if sleep == 0 else (0.5, 0.2)
    return (
        *(f"model.path={qwen.path}", f"teacher.path={qwen.path}", f"data.path={data}", "data.chat_template=false"),
        *(f"run.dir={folder}", "run.name=run", "run.iterations=3", "data.max_prompt_tokens=32"),
        *("rollout.prompts=16", "rollout.max_tokens=256", "reward.workers=1", "checkpoint.export=false"),
        *("rollout.server.devices=[[]]", f"rollout.server.memory={shares[0]}", f"rollout.server.sleep={sleep}"),
        *("teacher.server.devices=[[]]", f"teacher.server.memory={shares[1]}"),
        'teacher.server.extra_args=["--enforce-eager"]',
        *((QUICK,) if sleep else ()),
    )


@pytest.mark.parametrize("sleep", [0, 1, 2])
def test_g11_the_readme_command_on_one_gpu(sleep, qwen, tmp_path, figure):
    """Awake, and with a policy server that sleeps while the student trains, at both levels."""
    arguments = readme(qwen, tmp_path, sleep)
    assert weight_sync(checked(["kdrl"], arguments), gpus=1) == "ipc"
    qwen.saved()
    before, began = used_gib(), time.perf_counter()
    rows = train(tmp_path, "--config", "configs/kdrl.yaml", *arguments)
    seconds, last = time.perf_counter() - began, rows[-1]
    figure(
        f"{seconds:.0f} s, the last iteration {last['time/total']:.1f} (rollout {last['time/rollout']:.1f}, train "
        f"{last['time/train']:.1f}, publish {last['time/publish']:.2f}); mismatch {last['mismatch/mean']:.4f}, peak "
        f"{last['memory/peak_gb']:.1f} GiB"
    )
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    wait_until(lambda: used_gib() < before + 0.3, 30)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("trainer.precision=fp32",), id="hf_fp32"),
        pytest.param(("trainer.precision=bf16", "rollout.max_mismatch=0.05"), id="hf_bf16"),
        pytest.param(
            (
                *("rollout.backend=vllm", "rollout.server.launch=true", "rollout.server.memory=0.3", QUICK),
                *("rollout.server.weight_sync=file", "rollout.max_mismatch=0.05"),
            ),
            id="vllm_file",
        ),
    ],
)
def test_g11_the_quickstart_learns(overrides, tmp_path, figure):
    where = (f"run.dir={tmp_path}", "run.name=run", "trainer.accelerator=gpu", "run.iterations=100", "eval.every=100")
    checked(["quickstart"], [*where, *overrides])
    torch.cuda.init()
    rows = train(tmp_path, "--config", "configs/quickstart.yaml", *where, *overrides)
    before, after = rows[0]["eval/greedy"], rows[-1]["eval/greedy"]
    each = sum(row.get("time/total", 0.0) for row in rows[1:]) / 100
    figure(f"accuracy {before:.2f} → {after:.2f} in 100 iterations of {each:.2f} s")
    assert after > before + 0.4


@pytest.mark.parametrize("moment", ["rollout", "training", "twice"])
def test_g12_a_signal_leaves_the_gpu_empty(moment, qwen, tmp_path, figure):
    arguments = (
        *(f"model.path={qwen.path}", f"data.path={write_data(tmp_path)}", "data.chat_template=false"),
        *(f"run.dir={tmp_path}", "run.name=run", "data.max_prompt_tokens=32", "rollout.prompts=8", "reward.workers=1"),
        *("rollout.max_tokens=512", "rollout.server.devices=[[]]", "rollout.server.memory=0.3", QUICK),
    )
    checked(["grpo"], arguments)
    qwen.saved()
    before, log, served = used_gib(), tmp_path / "output.txt", tmp_path / "run" / "server" / "policy.log"
    run = start(command("--config", "configs/grpo.yaml", *arguments), log)

    def asked(path: str) -> int:
        assert run.poll() is None, log.read_text()[-3000:]
        return served.read_text(errors="replace").count(f"POST {path}") if served.exists() else 0

    try:
        wait_until(lambda: asked("/resume") >= 2, 90)  # the first iteration was published; the second one samples
        if moment == "training":
            wait_until(lambda: asked("/inference/v1/generate") >= 16, 60)
        started = psutil.Process(run.pid).children(recursive=True)  # supervisor, server, reward worker
        run.send_signal(signal.SIGTERM)
        began = time.perf_counter()
        if moment == "twice":
            time.sleep(0.3)
            run.send_signal(signal.SIGTERM)
        ends = (-signal.SIGTERM, 128 + signal.SIGTERM) if moment == "twice" else (0,)
        output = finish(run, log, 60, ends)
    finally:
        run.kill()
        run.wait()
    seconds = time.perf_counter() - began
    emptied = wait_until(lambda: not any(map(_runs, started)) and used_gib() < before + 0.3, 60)
    figure(f"{moment}: ended after {seconds:.1f} s, the GPU was empty {emptied:.1f} s later")
    assert moment == "twice" or "signal: saved iteration 2" in output


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
