"""The student in Hugging Face form, for transformers and vLLM, and its adapter in PEFT's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from rlkd import distributed, lora, whole
from rlkd.config import Config, ModelConfig
from rlkd.resume import EXPORT_RECORD
from rlkd.student import Student
from rlkd.tiny import resolve
from rlkd.writing import writing


def export_student(student: Student, config: Config, tokenizer: PreTrainedTokenizerBase, iteration: int) -> None:
    """Write the student to `<run>/hf`, adapters merged, and its adapter, if it has one, to `<run>/adapter`.

    A collective; rank 0 writes. `<run>/hf` comes last: who finds it finds the rest.
    """
    source, folder = config.model, Path(config.run_dir)
    weights = student.full_weights()
    adapter = None if source.lora is None else student.adapter_weights()

    def act() -> None:
        with writing(f"the student, to {folder},"):
            if adapter is not None and source.lora is not None:
                lora.write(adapter, source.lora, resolve(source.path), folder / "adapter")
            export(weights, student.hf.config, tokenizer, source, folder / "hf", iteration)

    distributed.on_rank_zero(act)


def export(
    weights: Mapping[str, Tensor],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelConfig,
    folder: Path,
    iteration: int,
) -> None:
    """Write model, tokenizer and generation config to `folder`, whole or not at all.

    Args:
        weights: full, unsharded, Hugging Face names (`Student.full_weights`).
        config: of the model.
        source: what the student came from, for its generation config.
        folder: replaced when it exists.
        iteration: how many the weights have seen; `resume.exported` tells it.
    """
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    model.load_state_dict(dict(weights), strict=True)
    model.generation_config = GenerationConfig.from_pretrained(resolve(source.path))
    beside = whole.partial(folder)
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    (beside / EXPORT_RECORD).write_text(json.dumps({"iteration": iteration}), encoding="utf-8")
    whole.remove(folder)
    beside.rename(folder)
