"""The algorithms: each has a file of its own and a file of options.

The names exported here, such as `rlkd.algorithms.GRPO`, are LightningModules: `GRPO(config)` can be passed to a plain
Trainer and wraps the plain object `rlkd.algorithms.grpo.GRPO`. They are created on first access, so that the files of
this folder can be imported without Lightning, and `*_options.py` and `registry.py` without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["GRPO", "KDRL", "OPD", "OPSD", "REDI", "SDPO", "SFT", "TAID", "ThinkTuning"]

if TYPE_CHECKING:
    from rlkd.training.module import PolicyModule


def __getattr__(name: str) -> type[PolicyModule]:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlkd.algorithms.registry import algorithm_class
    from rlkd.training.module import module_class

    globals()[name] = module = module_class(algorithm_class(name.lower()))  # the same class next time
    return module
