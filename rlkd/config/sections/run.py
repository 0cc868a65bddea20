"""The sections `run`, `eval`, `log` and `checkpoint`: what a run is called, and what it leaves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.config.sections.base import Section


class RunConfig(Section):
    """Identity and length of the run."""

    name: str = Field(
        "run", pattern=r"^[\w.+-]+$", description="name of the run; its directory is <run.dir>/<run.name>"
    )
    dir: str = Field("runs", description="directory that holds all runs")
    seed: int = Field(0, ge=0, lt=2**31, description="every random choice is a function of this seed")
    iterations: int = Field(
        100, ge=1, description="rollout batches to train on; a finished run may be resumed with more"
    )
    resume: str = Field(
        "never",
        description="never: refuse a directory that holds a run; auto: go on from its last checkpoint; or a path",
    )
    accept_changes: list[str] = Field(
        [], description="keys that a resumed run may have otherwise than its checkpoint, e.g. [optim.lr]"
    )


class EvalConfig(Section):
    """Held-out prompts."""

    every: int = Field(
        25, ge=0, description="iterations between evaluations, before the first and after the last too; 0: never"
    )
    path: str | None = Field(
        None, description="held-out data, read like data.path; null: none (a builtin task has its own)"
    )
    split: str = Field("test", description="split of a Hugging Face data set at eval.path")
    prompts: int = Field(128, ge=1, description="held-out prompts")
    samples: int = Field(4, ge=1, description="k of avg@k and pass@k")
    temperature: float = Field(1.0, gt=0, description="temperature of avg@k and pass@k")


class LogConfig(Section):
    """Where figures go; metrics.jsonl is always written."""

    wandb: Literal["online", "offline", "off"] = Field("off", description="Weights & Biases")
    project: str = Field("rlkd", description="project in Weights & Biases")
    rollouts_every: int = Field(1, ge=0, description="iterations between dumps of all rollouts as JSONL; 0: never")
    progress: bool = Field(True, description="progress bar (on a terminal) or one line an iteration")


class CheckpointConfig(Section):
    """Checkpoints and the exported student."""

    every: int = Field(50, ge=0, description="iterations between checkpoints; 0: only the last")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay on disk")
    export: bool = Field(True, description="write the student in Hugging Face form to <run>/hf at the end")
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the exported weights; auto: the one that the config at model.path names"
    )
