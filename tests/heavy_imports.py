"""Imports everything that a run of the trainer imports. The server of runs.py imports this module and then waits.

Importing it starts no thread and no process, so that a fork of the server is like a process that did all imports
itself.
"""

import pandas  # noqa: F401
import trl.kernels
import trl.trainer.utils
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM  # noqa: F401

import rlkd.algorithms
import rlkd.config.stages
import rlkd.pipeline.loader
import rlkd.planning.preflight
import rlkd.reporting.report_page
import rlkd.run.checkpoint
import rlkd.run.evaluation
import rlkd.run.export
import rlkd.run.fit
import rlkd.run.measure
import rlkd.run.metrics_log
import rlkd.run.publish
import rlkd.train  # noqa: F401

trl.kernels.ChunkedLogProbFunction  # noqa: B018  (trl imports its parts when they are asked for)
trl.trainer.utils.add_fused_lm_head  # noqa: B018
