"""The function that vLLM calls in each of its processes at start (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "RLKD_VOCABULARY"
"""The environment variable that tells a vLLM server how many token ids the run uses (vocabulary.py)."""

ENGINE = "rlkd_file"
"""The name for `--weight-transfer-config '{"backend": …}'`."""


def register() -> None:
    """Register the file engine with vLLM and exclude padded tokens. Calling this twice is harmless.

    The engine is imported only when it is used.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if ENGINE not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(ENGINE, "rlkd.weight_sync.file_engine", "FileWeightTransferEngine")
    if VARIABLE in os.environ:
        _leave_out_padding(int(os.environ[VARIABLE]))


def _leave_out_padding(vocabulary: int) -> None:
    """Set every logit from column `vocabulary` onwards to −inf.

    All models of vLLM compute their logits in this one class, for sampling and for the log-probs of prompts alike, so
    padded rows are neither sampled nor part of any softmax. A sampling parameter such as `allowed_token_ids` would
    cover only sampling, and `logit_bias` is bounded. vLLM has no setting for it (0.32); the probe at the start of a
    run (servers/padding_probe.py) detects a server that does not do it.
    """
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    original = LogitsProcessor.forward
    if original.__module__ == __name__:
        return

    def forward(
        self: Any, lm_head: Any, hidden_states: Any, embedding_bias: Any = None, skip_gather: bool = False
    ) -> Any:
        logits = original(self, lm_head, hidden_states, embedding_bias, skip_gather)
        if logits is None:  # they are gathered on another rank of the tensor-parallel group
            return None
        first = lm_head.shard_indices.org_vocab_start_index if skip_gather else 0  # the id of column 0
        logits[..., max(0, vocabulary - first) :] = -float("inf")
        return logits

    LogitsProcessor.forward = forward  # type: ignore[method-assign]
