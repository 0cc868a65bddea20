"""The algorithms, one file each; registry.py makes them known to configs.

A class is imported when it is first asked for: the files `*_options.py` and `registry.py` are read without torch.
"""

from typing import TYPE_CHECKING, Any

from rlkd.algorithms.registry import CLASSES, import_class

if TYPE_CHECKING:
    from rlkd.algorithms.grpo import GRPO
    from rlkd.algorithms.kdrl import KDRL
    from rlkd.algorithms.opd import OPD
    from rlkd.algorithms.opsd import OPSD
    from rlkd.algorithms.redi import REDI
    from rlkd.algorithms.sdpo import SDPO
    from rlkd.algorithms.sft import SFT
    from rlkd.algorithms.taid import TAID
    from rlkd.algorithms.thinktuning import ThinkTuning
    from rlkd.training.module import ALGORITHMS

__all__ = ["ALGORITHMS", "GRPO", "KDRL", "OPD", "OPSD", "REDI", "SDPO", "SFT", "TAID", "ThinkTuning"]


def __getattr__(name: str) -> Any:
    if name == "ALGORITHMS":
        from rlkd.training.module import ALGORITHMS

        for algorithm in CLASSES:
            import_class(algorithm)
        return ALGORITHMS
    if name in CLASSES:
        return import_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
