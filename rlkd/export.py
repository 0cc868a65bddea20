"""The student in Hugging Face form, for transformers and vLLM."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from rlkd.tiny import resolve


def export(
    weights: Mapping[str, Tensor],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    folder: Path,
) -> None:
    """Write model, tokenizer and generation config to `folder`, whole or not at all.

    Args:
        weights: full, unsharded, Hugging Face names (`Student.full_weights`).
        config: of the model.
        source: the path that the student came from, for its generation config.
        folder: replaced when it exists.
    """
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dict(weights), strict=True)
    model.generation_config = GenerationConfig.from_pretrained(resolve(source))
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
