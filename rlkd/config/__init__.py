"""The configuration: its classes, and loading them from YAML files and overrides. Nothing here imports torch."""

from rlkd.config.schema import AlgorithmConfig, Config, TeacherConfig

__all__ = ["AlgorithmConfig", "Config", "TeacherConfig"]
