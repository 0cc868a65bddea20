"""Runs the stages of a configuration: builds the loader, the module and the trainer, and trains."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import Logger
from transformers.utils import logging as transformers_logging

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.config.stages import Stage, finished, with_values
from rlkd.console import leads, phase
from rlkd.pipeline.loader import RolloutLoader
from rlkd.run.best import Best
from rlkd.run.by_token import ByToken
from rlkd.run.checkpoint import Checkpoint, Signals
from rlkd.run.evaluation import Evaluate
from rlkd.run.metrics_log import RunLog
from rlkd.run.progress import Progress
from rlkd.run.publish import Publish
from rlkd.run.report import Report, write_reports
from rlkd.run.resume import changes, resume_path
from rlkd.run.safe_loading import SafeModelParallelStrategy
from rlkd.run.trace import Trace
from rlkd.run.wandb_logger import Samples, finish, loggers
from rlkd.servers.placement import weight_sync
from rlkd.storage import atomic
from rlkd.storage.disk_errors import writing
from rlkd.storage.run_folder import save_stage_names
from rlkd.training.module import PolicyModule


def longest_wait(config: Config) -> timedelta:
    """The timeout of collectives, which is longer than any rank waits for its servers.

    Otherwise a collective would time out while another rank is still waiting for a server as configured.
    """
    seconds = 1800.0
    for server in config.servers:
        seconds += server.request_timeout_s + server.retry_s + server.start_timeout_s * len(server.devices)
    return timedelta(seconds=seconds)


def callbacks(config: Config, loader: RolloutLoader) -> list[lightning.Callback]:
    """The callbacks that turn a plain `lightning.Trainer` into a run, in the order in which they must be called."""
    signals, evaluation = Signals(), Evaluate(config, loader)
    best = Best(config, loader, len(evaluation.prompts))
    return [
        signals,
        ByToken(config),
        Publish(loader),
        evaluation,
        RunLog(config, loader),
        Report(config),
        *([Trace(config, loader)] if config.log.profile else []),
        *([Progress(config)] if config.log.progress else []),
        *([] if config.log.wandb == "off" else [Samples(config)]),
        best,
        Checkpoint(config, loader, signals, best, len(evaluation.prompts)),
    ]


def build_trainer(config: Config, hooks: list[lightning.Callback], loggers: Sequence[Logger] = ()) -> lightning.Trainer:
    """The Trainer of a run, without Lightning's own checkpoints, model summary and distributed sampler.

    Args:
        hooks: its callbacks.
        loggers: where metrics go beside metrics.jsonl.
    """
    strategy = SafeModelParallelStrategy(
        data_parallel_size=config.world_size, tensor_parallel_size=1, timeout=longest_wait(config)
    )
    return lightning.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=strategy,
        precision="32-true",
        max_epochs=-1,
        logger=list(loggers),
        callbacks=hooks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def use_expandable_segments(config: Config) -> None:
    """Let torch join pieces of free GPU memory, since the shapes of micro-batches differ.

    It does not where the user has settings of their own, nor with `weight_sync: ipc`, which cannot share such memory.
    """
    asked = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    shared = config.rollout.backend == "vllm" and weight_sync(config) == "ipc"
    if distributed.local_device(config.trainer.accelerator).type == "cuda" and not asked and not shared:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def run(config: Config, text: str, recipe: str | None = None) -> None:
    """Train with `config`.

    Args:
        text: the merged YAML, which is saved as `<run>/config.yaml`.
        recipe: the name of the whole run, if this is one of its stages.
    """
    checkpoint = resume_path(config)
    if leads():
        with writing(f"run.dir: {config.run_dir}/config.yaml"):
            Path(config.run_dir).mkdir(parents=True, exist_ok=True)
            atomic.write(Path(config.run_dir, "config.yaml"), text.encode())
    use_expandable_segments(config)
    module = PolicyModule(config)
    with phase("reading the data", config.log.progress):
        loader = RolloutLoader(config, module.algorithm)
    try:
        trainer = build_trainer(config, callbacks(config, loader), loggers(config, recipe, checkpoint))
        trainer.fit(module, loader, ckpt_path=None if checkpoint is None else str(checkpoint))
    finally:
        loader.close()
        finish(config)
    if distributed.rank() == 0:
        report = write_reports(config)
        print(summary(config, report))


def summary(config: Config, report: Path) -> str:
    """The last lines on the console: accuracy before and after, and the paths of report and student."""
    with open(Path(config.run_dir, "metrics.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    lines = []
    for name in ("eval/greedy", "eval/avg@k", "eval/pass@k"):
        values = [row[name] for row in rows if row.get(name) is not None]
        if len(values) > 1:
            label = name.replace("@k", f"@{config.eval.samples}")
            lines.append(f"{label:<12} {values[0]:6.1%} before  {values[-1]:6.1%} after")
    lines.append(f"report:      {report}")
    for label, folder in (("student:", "hf"), ("best:", "best"), ("adapter:", "adapter")):
        if Path(config.run_dir, folder).exists():
            lines.append(f"{label:<12} {Path(config.run_dir, folder)}")
    return "\n".join(lines)


def run_stages(stages: Sequence[Stage]) -> int:
    """Run the stages in order, skipping those that have finished. A signal ends the current stage and skips the rest.

    Returns: the exit code; 2 if a stage cannot be resumed because its configuration has changed.
    """
    names = [stage.name for stage in stages if stage.name is not None]
    if names and leads():
        folder = stages[0].loaded.config.run.dir
        with writing(f"run.dir: {folder}/stages.json"):
            save_stage_names(folder, names)
    for stage in stages:
        loaded = stage.loaded
        if stage.name is not None and finished(loaded.config):
            if leads():
                print(f"stage {stage.name} has already finished: {loaded.config.run_dir}", flush=True)
            continue
        if stage.name is not None and leads():
            print(f"stage {stage.name}", flush=True)
        if stage.starts_from is not None:
            loaded = with_values(loaded, {"model.path": stage.starts_from})
        changed = changes(loaded.config)
        if changed:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # once per node, since the data of nodes may differ
                print("\n".join(changed), file=sys.stderr)
            return 2
        run(loaded.config, loaded.text, None if stage.name is None else Path(loaded.config.run.dir).name)
        # Rank 0 decides, since it writes the report last, and another rank may look for the report before that.
        if stage.name is not None and not distributed.broadcast(finished(loaded.config)):
            return 0  # after a signal; run.resume=auto continues with this stage
    return 0


def quiet() -> None:
    """Hide hints and loading bars of the libraries, but not their warnings."""
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="Found .* in eval mode")  # on purpose: no dropout (student.py)
