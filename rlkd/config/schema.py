"""The configuration tree: strict, frozen, and every key with its type, default and one-line description.

The sections are in `sections/`. Each algorithm's section derives from `AlgorithmConfig` and is in
`algorithms/<name>_options.py`. `load.py` reads files, merges them and reports errors. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializeAsAny, field_validator

from rlkd.config.cross_checks import LARGEST_SERVED_RANK, contradictions
from rlkd.config.sections.algorithm import AlgorithmConfig
from rlkd.config.sections.base import Section
from rlkd.config.sections.data import DataConfig, MessageKeys
from rlkd.config.sections.model import LoraConfig, ModelConfig
from rlkd.config.sections.reward import RewardConfig, RewardFunction
from rlkd.config.sections.run import CheckpointConfig, EvalConfig, LogConfig, RunConfig
from rlkd.config.sections.servers import WILDCARDS, RolloutConfig, RolloutServerConfig, ServerConfig
from rlkd.config.sections.teacher import (
    LocalTeacherConfig,
    NamedLocalTeacherConfig,
    NamedServedTeacherConfig,
    NoTeacherConfig,
    RoutedTeacherConfig,
    SelfTeacherConfig,
    ServedTeacherConfig,
    Teacher,
    TeacherConfig,
)
from rlkd.config.sections.training import OptimConfig, TrainerConfig

__all__ = [
    "LARGEST_SERVED_RANK",
    "WILDCARDS",
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LocalTeacher",
    "LocalTeacherConfig",
    "LogConfig",
    "LoraConfig",
    "MessageKeys",
    "ModelConfig",
    "NamedLocalTeacher",
    "NamedLocalTeacherConfig",
    "NamedServedTeacher",
    "NamedServedTeacherConfig",
    "NoTeacher",
    "NoTeacherConfig",
    "OptimConfig",
    "RewardConfig",
    "RewardFunction",
    "RolloutConfig",
    "RolloutServerConfig",
    "RoutedTeacher",
    "RoutedTeacherConfig",
    "RunConfig",
    "Section",
    "SelfTeacher",
    "SelfTeacherConfig",
    "ServedTeacher",
    "ServedTeacherConfig",
    "ServerConfig",
    "Teacher",
    "TeacherConfig",
    "TrainerConfig",
]


# Old names, kept for compatibility. Classes in `rlkd.teachers` have the same names, so new code should use *Config.
NoTeacher = NoTeacherConfig
LocalTeacher = LocalTeacherConfig
ServedTeacher = ServedTeacherConfig
SelfTeacher = SelfTeacherConfig
RoutedTeacher = RoutedTeacherConfig
NamedLocalTeacher = NamedLocalTeacherConfig
NamedServedTeacher = NamedServedTeacherConfig


class Config(Section):
    """The configuration of a run."""

    run: RunConfig = Field(RunConfig(), description="name, seed and length of the run")
    model: ModelConfig
    teacher: Teacher = Field(NoTeacherConfig(), description="the teacher")
    data: DataConfig
    rollout: RolloutConfig = Field(RolloutConfig(), description="sampling")
    reward: RewardConfig = Field(RewardConfig(), description="reward functions")
    algorithm: SerializeAsAny[AlgorithmConfig]
    optim: OptimConfig = Field(OptimConfig(), description="optimizer")
    trainer: TrainerConfig = Field(TrainerConfig(), description="devices")
    eval: EvalConfig = Field(EvalConfig(), description="held-out prompts")
    log: LogConfig = Field(LogConfig(), description="logging")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="checkpoints and export")

    @property
    def run_dir(self) -> str:
        """<run.dir>/<run.name>."""
        return f"{self.run.dir}/{self.run.name}"

    @property
    def holds_out(self) -> bool:
        """Whether there are prompts to evaluate on; the built-in task has some of its own."""
        return bool(self.eval.path or self.eval.fraction) or self.data.path.startswith("builtin:")

    @property
    def publishes_adapter(self) -> bool:
        """Whether only the LoRA adapter is sent to the sampler, which already has the base model."""
        return self.model.lora is not None and self.rollout.backend == "vllm"

    @property
    def publishes_in_flight(self) -> bool:
        """Whether weights are published to servers that go on sampling meanwhile."""
        return self.rollout.backend == "vllm" and self.rollout.max_staleness > 0 and self.rollout.in_flight

    @property
    def teachers(self) -> list[tuple[str, LocalTeacherConfig | ServedTeacherConfig]]:
        """(key, settings) of every teacher with its own model (not self-distillation)."""
        if isinstance(self.teacher, RoutedTeacherConfig):
            return [(f"teacher.teachers[{i}]", teacher) for i, teacher in enumerate(self.teacher.teachers)]
        return [("teacher", self.teacher)] if isinstance(self.teacher, LocalTeacherConfig | ServedTeacherConfig) else []

    @property
    def servers(self) -> list[ServerConfig]:
        """The settings of all vLLM servers that the run uses, launched by it or already running."""
        policy = [self.rollout.server] if self.rollout.backend == "vllm" else []
        return policy + [t.server for _, t in self.teachers if isinstance(t, ServedTeacherConfig)]

    @property
    def world_size(self) -> int:
        """Trainer processes on all nodes."""
        return self.trainer.devices * self.trainer.num_nodes

    @field_validator("teacher", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        return {"backend": "none"} if value is None else value

    def problems(self) -> list[tuple[str, str]]:
        """Contradictions between keys: (first key, a one-line message naming both keys and the fix).

        `load` reports all of them. A Config built in Python is not checked automatically.
        """
        return contradictions(self)
