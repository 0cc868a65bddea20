"""The algorithms that a configuration may name. Importing this imports no algorithm, hence no torch.

A built-in algorithm is two lines here: the class of its section, in `<name>_options.py`, and where its own class is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from rlkd.algorithms.grpo_options import GRPOConfig
from rlkd.algorithms.kdrl_options import KDRLConfig
from rlkd.algorithms.opd_options import OPDConfig
from rlkd.algorithms.opsd_options import OPSDConfig
from rlkd.algorithms.redi_options import REDIConfig
from rlkd.algorithms.sdpo_options import SDPOConfig
from rlkd.algorithms.sft_options import SFTConfig
from rlkd.algorithms.taid_options import TAIDConfig
from rlkd.algorithms.thinktuning_options import ThinkTuningConfig
from rlkd.config.schema import AlgorithmConfig

OPTIONS: Mapping[str, type[AlgorithmConfig]] = {
    "grpo": GRPOConfig,
    "kdrl": KDRLConfig,
    "opd": OPDConfig,
    "opsd": OPSDConfig,
    "sft": SFTConfig,
    "redi": REDIConfig,
    "sdpo": SDPOConfig,
    "taid": TAIDConfig,
    "thinktuning": ThinkTuningConfig,
}
"""algorithm.name → the class of the section `algorithm`, of every built-in algorithm."""

CLASSES: Mapping[str, str] = {
    "GRPO": "rlkd.algorithms.grpo",
    "KDRL": "rlkd.algorithms.kdrl",
    "OPD": "rlkd.algorithms.opd",
    "OPSD": "rlkd.algorithms.opsd",
    "REDI": "rlkd.algorithms.redi",
    "SDPO": "rlkd.algorithms.sdpo",
    "SFT": "rlkd.algorithms.sft",
    "TAID": "rlkd.algorithms.taid",
    "ThinkTuning": "rlkd.algorithms.thinktuning",
}
"""Class → module, of every built-in algorithm."""


def import_class(name: str) -> Any:
    """The built-in algorithm's class called `name`, e.g. GRPO. Imports torch."""
    return getattr(importlib.import_module(CLASSES[name]), name)


def known_options() -> dict[str, type[AlgorithmConfig]]:
    """algorithm.name → the class of its section: the built-in algorithms, and those that other code has defined."""
    if "rlkd.training.module" not in sys.modules:
        return dict(OPTIONS)  # without the base class nothing can have been defined
    from rlkd.training.module import ALGORITHMS

    return {**OPTIONS, **{name: algorithm.Options for name, algorithm in ALGORITHMS.items()}}


def learn_options(name: str) -> type[AlgorithmConfig]:
    """The class of the section of an algorithm outside the package, `name` being module:Class. Imports torch.

    Raises: ValueError, one line, where there is no such algorithm.
    """
    from rlkd.algorithms import outside

    outside.learn(name)
    return known_options()[name]
