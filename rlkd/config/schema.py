"""The whole configuration tree: strict, frozen, every key with its type, default and one line of help.

The sections are in `sections/`. Each algorithm's own section derives from `AlgorithmConfig` and is in
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
    "TrainerConfig",
]


# Former names. The classes in `rlkd.teachers` have the same ones, so new code should use those that end in Config.
NoTeacher = NoTeacherConfig
LocalTeacher = LocalTeacherConfig
ServedTeacher = ServedTeacherConfig
SelfTeacher = SelfTeacherConfig
RoutedTeacher = RoutedTeacherConfig
NamedLocalTeacher = NamedLocalTeacherConfig
NamedServedTeacher = NamedServedTeacherConfig


class Config(Section):
    """A run."""

    run: RunConfig = Field(RunConfig(), description="identity and length")
    model: ModelConfig
    teacher: Teacher = Field(NoTeacherConfig(), description="who is imitated")
    data: DataConfig
    rollout: RolloutConfig = Field(RolloutConfig(), description="what is sampled")
    reward: RewardConfig = Field(RewardConfig(), description="what it is worth")
    algorithm: SerializeAsAny[AlgorithmConfig]
    optim: OptimConfig = Field(OptimConfig(), description="optimizer")
    trainer: TrainerConfig = Field(TrainerConfig(), description="devices")
    eval: EvalConfig = Field(EvalConfig(), description="held-out prompts")
    log: LogConfig = Field(LogConfig(), description="where figures go")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="what is kept")

    @property
    def run_dir(self) -> str:
        return f"{self.run.dir}/{self.run.name}"

    @property
    def publishes_adapter(self) -> bool:
        """Whether the sampler gets the student's adapter alone, since it holds the base already."""
        return self.model.lora is not None and self.rollout.backend == "vllm"

    @property
    def teachers(self) -> list[tuple[str, LocalTeacherConfig | ServedTeacherConfig]]:
        """(key, settings) of every teacher that is a model of its own."""
        if isinstance(self.teacher, RoutedTeacherConfig):
            return [(f"teacher.teachers[{i}]", teacher) for i, teacher in enumerate(self.teacher.teachers)]
        return [("teacher", self.teacher)] if isinstance(self.teacher, LocalTeacherConfig | ServedTeacherConfig) else []

    @property
    def servers(self) -> list[ServerConfig]:
        """The settings of all servers that the run uses, its own and others'."""
        policy = [self.rollout.server] if self.rollout.backend == "vllm" else []
        return policy + [t.server for _, t in self.teachers if isinstance(t, ServedTeacherConfig)]

    @property
    def world_size(self) -> int:
        return self.trainer.devices * self.trainer.num_nodes

    @field_validator("teacher", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        return {"backend": "none"} if value is None else value

    def problems(self) -> list[tuple[str, str]]:
        """Contradictions between keys, each (first key, one line that names both keys and the fix).

        `load` reports them all at once. A Config that Python code has built is not checked for them by itself.
        """
        return contradictions(self)
