"""The algorithms, one file each. An import line here makes an algorithm known to configs."""

from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.kdrl import KDRL
from rlkd.algorithms.opd import OPD
from rlkd.algorithms.thinktuning import ThinkTuning
from rlkd.module import ALGORITHMS

__all__ = ["ALGORITHMS", "GRPO", "KDRL", "OPD", "ThinkTuning"]
