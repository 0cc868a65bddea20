"""Algorithms from outside the package: `algorithm.name: module:Class`, or a name that an installed package declares."""

from __future__ import annotations

from typing import Any

from rlkd.algorithms.base import Algorithm
from rlkd.algorithms.registry import ALGORITHMS
from rlkd.config.own_options import own_options
from rlkd.config.schema import AlgorithmConfig
from rlkd.plugins import ALGORITHM, find


def learn(name: str) -> None:
    """Import the class `name` and register it in ALGORITHMS under `name`, in place of one that it replaces.

    Its `algorithm` section is its Options class, with `name` as the algorithm's name, so that `config.yaml` and
    checkpoints record where the class comes from.

    Raises: ValueError with a one-line message.
    """
    find(name, ALGORITHM, lambda found: _register(name, found))


def _register(name: str, found: Any) -> None:
    """Register a subclass of `found` whose Options have that name, unless it is there. Raises: ValueError, one line."""
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ValueError(
            f"{' of '.join(reversed(name.split(':')))}: expected a subclass of rlkd.algorithms.base.Algorithm; derive "
            "it from that, or from an algorithm such as rlkd.algorithms.grpo.GRPO"
        )
    known = ALGORITHMS.get(name)
    if known is not None and (known is found or found in known.__bases__):
        return
    type(  # a subclass with a name of its own registers itself
        found.__name__,
        (found,),
        {
            "Options": own_options(found, AlgorithmConfig, "name", name),
            "__doc__": found.__doc__,
            "__module__": found.__module__,
        },
    )
