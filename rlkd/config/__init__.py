"""The configuration: its classes, and YAML files and overrides on their way to them. Nothing here imports torch."""

from rlkd.config.schema import AlgorithmConfig, Config

__all__ = ["AlgorithmConfig", "Config"]
