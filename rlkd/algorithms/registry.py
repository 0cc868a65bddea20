"""The algorithms that a configuration may name. Importing this imports no algorithm, hence no torch.

A built-in algorithm is one line here: its name and the class of its section, in `<name>_options.py`. Its own class is
in `<name>.py`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlkd.algorithms.grpo_options import GRPOConfig
from rlkd.algorithms.kdrl_options import KDRLConfig
from rlkd.algorithms.opd_options import OPDConfig
from rlkd.algorithms.opsd_options import OPSDConfig
from rlkd.algorithms.redi_options import REDIConfig
from rlkd.algorithms.sdpo_options import SDPOConfig
from rlkd.algorithms.sft_options import SFTConfig
from rlkd.algorithms.taid_options import TAIDConfig
from rlkd.algorithms.thinktuning_options import ThinkTuningConfig
from rlkd.config.schema import AlgorithmConfig, Config

if TYPE_CHECKING:
    from rlkd.algorithms.base import Algorithm

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


def algorithm_class(name: str) -> type[Algorithm]:
    """The class of `algorithm.name`: a built-in one is in the file of its name. Imports torch."""
    if name in OPTIONS:
        importlib.import_module(f"rlkd.algorithms.{name}")
    from rlkd.algorithms.base import ALGORITHMS

    return ALGORITHMS[name]


def build_algorithm(config: Config) -> Algorithm:
    """The algorithm that a configuration names. Imports torch."""
    return algorithm_class(config.algorithm.name)(config)


def known_options() -> dict[str, type[AlgorithmConfig]]:
    """algorithm.name → the class of its section: the built-in algorithms, and those that other code has defined."""
    if "rlkd.algorithms.base" not in sys.modules:
        return dict(OPTIONS)  # without the base class nothing can have been defined
    from rlkd.algorithms.base import ALGORITHMS

    return {**OPTIONS, **{name: algorithm.Options for name, algorithm in ALGORITHMS.items()}}


def learn_options(name: str) -> type[AlgorithmConfig]:
    """The class of the section of an algorithm outside the package, `name` being module:Class. Imports torch.

    Raises: ValueError, one line, where there is no such algorithm.
    """
    from rlkd.algorithms import outside

    outside.learn(name)
    return known_options()[name]
