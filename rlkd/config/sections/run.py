"""The sections `run`, `eval`, `log` and `checkpoint`: name, evaluation, logging and outputs of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.config.sections.base import Section


class RunConfig(Section):
    """Name, seed and length of the run."""

    name: str = Field(
        "run", pattern=r"^[\w.+-]+$", description="name of the run; its directory is <run.dir>/<run.name>"
    )
    dir: str = Field("runs", description="directory that holds all runs")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of all random numbers")
    iterations: int = Field(
        100, ge=1, description="rollout batches to train on; a finished run can be resumed with more"
    )
    stop_after: int | None = Field(
        None, ge=1, description="end the run after this many evaluations without a higher checkpoint.best; null: never"
    )
    resume: str = Field(
        "never",
        description="never: reject a directory that contains a run; auto: resume from its last checkpoint; or a path",
    )
    accept_changes: list[str] = Field(
        [], description="keys that may differ from the checkpoint when resuming, e.g. [optim.lr]"
    )


class EvalConfig(Section):
    """Evaluation on held-out prompts."""

    every: int = Field(
        25, ge=0, description="iterations between evaluations, also before the first and after the last; 0: never"
    )
    path: str | None = Field(
        None, description="held-out data, read like data.path; null: none (builtin tasks have their own)"
    )
    split: str = Field("test", description="split of the Hugging Face dataset at eval.path")
    fraction: float | None = Field(
        None, gt=0, lt=1, description="hold out about this share of data.path, which is not trained on; null: nothing"
    )
    fraction_seed: int = Field(0, ge=0, description="seed that chooses the held-out share; run.seed does not")
    prompts: int = Field(128, ge=1, description="number of held-out prompts")
    samples: int = Field(4, ge=1, description="k of avg@k and pass@k")
    temperature: float = Field(1.0, gt=0, description="temperature of avg@k and pass@k")


class LogConfig(Section):
    """Where metrics are logged; metrics.jsonl is always written."""

    wandb: Literal["online", "offline", "off"] = Field("off", description="Weights & Biases")
    project: str = Field("rlkd", description="project in Weights & Biases")
    samples_every: int = Field(
        0, ge=0, description="iterations between tables of samples in Weights & Biases; 0: as often as evaluations"
    )
    tensorboard: bool = Field(False, description="log to TensorBoard, too: tensorboard --logdir <run.dir>")
    rollouts_every: int = Field(1, ge=0, description="iterations between dumps of all rollouts as JSONL; 0: never")
    progress: bool = Field(True, description="show a progress bar (on a terminal) or one line per iteration")
    profile: bool = Field(False, description="trace the second iteration, for ui.perfetto.dev; --profile sets this")


class CheckpointConfig(Section):
    """Checkpoints and the exported student."""

    every: int = Field(50, ge=0, description="iterations between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="number of newest checkpoints to keep on disk")
    best: Literal["eval/greedy", "eval/avg@k", "eval/pass@k"] | None = Field(
        None, description="also write the student with the highest value of this metric to <run>/best; null: none"
    )
    export: bool = Field(True, description="write the student in Hugging Face format to <run>/hf at the end")
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the exported weights; auto: as in the config at model.path"
    )
