"""The algorithms: one file each, beside its options.

The names that this package hands out, such as `rlkd.algorithms.GRPO`, are LightningModules: `GRPO(config)` goes into a
plain Trainer, and trains by the plain object `rlkd.algorithms.grpo.GRPO`. They are made when they are first asked for,
so that the files of this folder can be imported without Lightning, and `*_options.py` and `registry.py` without torch.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["GRPO", "KDRL", "OPD", "OPSD", "REDI", "SDPO", "SFT", "TAID", "ThinkTuning"]

if TYPE_CHECKING:
    from rlkd.training.module import PolicyModule

    GRPO: type[PolicyModule]
    KDRL: type[PolicyModule]
    OPD: type[PolicyModule]
    OPSD: type[PolicyModule]
    REDI: type[PolicyModule]
    SDPO: type[PolicyModule]
    SFT: type[PolicyModule]
    TAID: type[PolicyModule]
    ThinkTuning: type[PolicyModule]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlkd.algorithms.registry import algorithm_class
    from rlkd.training.module import module_class

    return module_class(algorithm_class(name.lower()))
