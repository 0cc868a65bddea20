"""The algorithms, one file each. An import line here makes an algorithm known to configs."""

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
