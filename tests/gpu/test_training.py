"""Updates of the student on one GPU: the numbers of a CPU, resuming, and how often the host waits for the device."""

from __future__ import annotations

from dataclasses import replace

import lightning
import pytest
import torch
import torch.distributed as dist
from builders import Captured, OneBatch, bare_trainer, config, real_batch, scored
from gpu_runs import checked, train
from torch.profiler import ProfilerActivity, profile

from rlkd.pipeline.collate import collate
from rlkd.training.micro_batches import micro_batches
from rlkd.training.module import PolicyModule
from rlkd.types import Batch, Prompt

pytestmark = pytest.mark.gpu

UPDATES = (
    *("rollout.prompts=12", "data.limit=64", "trainer.updates_per_iteration=3", "trainer.micro_batch_tokens=160"),
    "model.gradient_checkpointing=true",
)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 5e-4), ("bf16", 2e-3)], ids=["fp32", "bf16"])
def test_g8_three_updates_give_the_parameters_of_a_cpu(precision, bound, figure, monkeypatch):
    """With checkpointing and several micro-batches each, sharded by FSDP2 over one rank."""
    monkeypatch.delenv("MASTER_PORT", raising=False)  # of an earlier group, which another process may have by now
    settings = config(*UPDATES, "trainer.precision=fp32")
    batch = real_batch(settings)
    assert len(micro_batches(batch.rows(torch.arange(16)), settings.trainer.micro_batch_tokens, None)) >= 3
    exact = Captured(settings, batch).parameters
    dist.destroy_process_group()  # that of the CPU
    monkeypatch.delenv("MASTER_PORT", raising=False)
    there = config(*UPDATES, f"trainer.precision={precision}", "trainer.accelerator=gpu")
    torch.cuda.init()
    found = Captured(there, batch)
    assert next(found.student.parameters()).device.type == "cuda"
    a, b = (torch.cat([one[name].cpu().flatten() for name in exact]) for one in (exact, found.parameters))
    gap = float((a - b).norm() / a.norm())
    figure(f"{precision}: ‖Δθ‖ / ‖θ‖ = {gap:.1e} after 3 updates; grad_norm {found.row['grad_norm']:.4f}")
    assert gap < bound


def test_g8_a_run_resumes(tmp_path, figure):
    """Three iterations and one more are four, up to the rounding of a GPU's sums, which is not the same each time."""

    def run(name, iterations):
        where = (f"run.dir={tmp_path / name}", "run.name=run", f"run.iterations={iterations}", "run.resume=auto")
        more = ("trainer.accelerator=gpu", "trainer.precision=fp32", "eval.every=0", "data.limit=64")
        checked(["quickstart"], [*where, *more])
        return [*("--config", "configs/quickstart.yaml"), *where, *more]

    lines = run("straight", 4), run("parted", 3), run("parted", 4)
    torch.cuda.init()
    folders = (tmp_path / "straight", tmp_path / "parted", tmp_path / "parted")
    straight, _, parted = (train(folder, *line) for folder, line in zip(folders, lines, strict=True))
    assert [row["iteration"] for row in parted] == [1, 2, 3, 4]
    pairs = [(name, straight[3][name], parted[3][name]) for name in ("reward/mean", "grad_norm", "loss")]
    figure("iteration 4, straight and resumed: " + ", ".join(f"{name} {a:.5f} {b:.5f}" for name, a, b in pairs))
    for name, a, b in pairs:
        assert abs(a - b) < 0.05 * max(abs(a), 0.01), name


class Second(lightning.Callback):
    """Profiles the second batch."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def on_train_batch_start(self, trainer, module, batch, number) -> None:
        if number == 1:
            torch.cuda.synchronize()
            self.profile.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, number) -> None:
        if number == 1:
            torch.cuda.synchronize()
            self.profile.stop()


def long_batch(settings, tokens: int, rows: int) -> Batch:
    """Made-up rollouts of `tokens` tokens, in groups of four with different rewards."""
    made = []
    for i in range(rows):
        one = scored(i, tokens, float(i % 2))
        prompt = Prompt(id=f"p{i // 4}", messages=(), token_ids=(5, 6, 7, 8))
        made.append(replace(one, rollout=replace(one.rollout, prompt=prompt)))
    algorithm = PolicyModule(settings).algorithm
    return collate([algorithm.advantages(made[start : start + 4]) for start in range(0, rows, 4)], 0)


def test_g9_how_often_the_host_waits_in_an_update(qwen, figure):
    """An update of 8 micro-batches of 8,192 tokens by a model of Qwen2.5-0.5B's shape."""
    settings = config(
        *("teacher=null", "algorithm={name: grpo}", f"model.path={qwen.path}", "data.chat_template=false"),
        *("model.gradient_checkpointing=true", "trainer.accelerator=gpu", "trainer.precision=bf16"),
        *("trainer.micro_batch_tokens=8192", "rollout.prompts=16", "rollout.max_tokens=1020", "run.iterations=2"),
    )
    batch = long_batch(settings, 1020, 64)
    count = len(micro_batches(batch, settings.trainer.micro_batch_tokens, None))
    assert count == 8
    second = Second()
    qwen.saved()
    bare_trainer(settings, second).fit(PolicyModule(settings), OneBatch(batch, 2))
    events = second.profile.events()
    waits = sum(event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for event in events)
    copies = sum("DtoH" in event.name for event in events)
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    assert kernels, "the profiler saw nothing of the GPU"
    busy = end = 0.0
    for start, stop in kernels:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - kernels[0][0]
    figure(
        f"{waits / count:.1f} waits and {copies / count:.1f} copies to the host a micro-batch, the GPU busy "
        f"{100 * busy / whole:.0f} % of {whole / 1e6:.2f} s, {8 * 8192 / whole * 1e6:.0f} tokens/s"
    )
    assert waits / count < 8, "the CPU's test of host syncs allows 2"
    assert busy / whole > 0.5
