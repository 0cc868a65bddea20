"""What vLLM calls in each of its processes at start (entry point `vllm.general_plugins`)."""

from __future__ import annotations

ENGINE = "rlkd_file"
"""The name for `--weight-transfer-config '{"backend": …}'`."""


def register() -> None:
    """Tell vLLM where the file engine is. It is imported only where it is asked for; calling this twice is harmless."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if ENGINE not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(ENGINE, "rlkd.weight_sync.file_engine", "FileWeightTransferEngine")
