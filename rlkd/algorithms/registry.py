"""The registered algorithms. Importing this file imports no algorithm and therefore no torch.

To add a built-in algorithm, add its name and its section class (in `<name>_options.py`) to OPTIONS. The algorithm's
own class is in `<name>.py`.
"""

from __future__ import annotations

import importlib
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
from rlkd.plugins import ALGORITHM, is_outside

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
"""algorithm.name → class of the `algorithm` section, for every built-in algorithm."""

ALGORITHMS: dict[str, type[Algorithm]] = {}
"""algorithm.name → class, for every algorithm that has been defined so far. `Algorithm` fills it."""


def algorithm_class(name: str) -> type[Algorithm]:
    """The class of the algorithm called `name`; imports its file if it is built in. Imports torch."""
    if name in OPTIONS:
        importlib.import_module(f"rlkd.algorithms.{name}")
    return ALGORITHMS[name]


def build_algorithm(config: Config) -> Algorithm:
    """The algorithm that a configuration names. Imports torch."""
    return algorithm_class(config.algorithm.name)(config)


def known_options() -> dict[str, type[AlgorithmConfig]]:
    """algorithm.name → section class, for built-in algorithms and those already defined by other code."""
    return {**OPTIONS, **{name: algorithm.Options for name, algorithm in ALGORITHMS.items()}}


def learn_options(name: str) -> type[AlgorithmConfig] | None:
    """The section class of an algorithm from outside the package; None if `name` does not stand for one. Imports torch.

    Raises: ValueError with a one-line message if the algorithm cannot be imported.
    """
    if name in OPTIONS or not is_outside(name, ALGORITHM):
        return None
    from rlkd.algorithms import outside

    outside.learn(name)
    return known_options()[name]
