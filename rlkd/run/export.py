"""Exports the student in Hugging Face format, for transformers and vLLM, and its adapter in PEFT's format."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from rlkd import distributed
from rlkd.builtin import resolve
from rlkd.config.schema import Config, ModelConfig
from rlkd.models import lora
from rlkd.models.student import Student
from rlkd.models.vocabulary import load_config
from rlkd.storage import atomic
from rlkd.storage.disk_errors import writing
from rlkd.storage.run_folder import EXPORT_RECORD


def export_student(student: Student, config: Config, tokenizer: PreTrainedTokenizerBase, iteration: int) -> None:
    """Write the student to `<run>/hf`, with adapters merged, and its adapter, if it has one, to `<run>/adapter`.

    A collective; rank 0 writes. `<run>/hf` is written last, so if it exists the adapter does too.
    """
    source, folder = config.model, Path(config.run_dir)
    weights = student.full_weights()
    adapter = None if source.lora is None else student.adapter_weights()

    def act() -> None:
        with writing(f"the student, to {folder},"):
            if adapter is not None and source.lora is not None:
                lora.write(adapter, source.lora, resolve(source.path), folder / "adapter")
            dtype = export_dtype(config)
            export(weights, student.hf.config, tokenizer, source, folder / "hf", iteration, dtype)

    distributed.on_rank_zero(act)


def export_dtype(config: Config) -> torch.dtype:
    """The dtype of the exported weights: `checkpoint.export_dtype`, or for `auto` the dtype in model.path's config.

    If that config has none, it is the trainer's fp32.
    """
    if config.checkpoint.export_dtype != "auto":
        named: torch.dtype = getattr(torch, config.checkpoint.export_dtype)
        return named
    source = load_config(config.model.path, config.model.trust_remote_code)
    dtype = source.dtype or source.get_text_config().dtype or torch.float32
    assert isinstance(dtype, torch.dtype)  # transformers has converted the name
    return dtype


def export(
    weights: Mapping[str, Tensor],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelConfig,
    folder: Path,
    iteration: int,
    dtype: torch.dtype,
) -> None:
    """Write model, tokenizer and generation config to `folder`, atomically.

    Args:
        weights: full, unsharded, with names in memory (`Student.full_weights`). The files have checkpoint names.
        config: the model's config.
        source: the model that the student started from, whose generation config is copied.
        folder: replaced if it exists.
        iteration: the number of iterations that the weights were trained for; `run_folder.exported` reads it.
        dtype: the dtype of the files, except for weights that transformers always keeps in fp32.
    """
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=source.trust_remote_code)
    _keep_in_fp32(model, dtype)
    model.load_state_dict(dict(weights), strict=True)
    partial = atomic.partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    _write_small_files(model.config, tokenizer, source, partial)
    (partial / EXPORT_RECORD).write_text(json.dumps({"iteration": iteration}), encoding="utf-8")
    atomic.share(partial)
    atomic.remove(folder)
    partial.rename(folder)


def rehearse(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the export without its weights to a temporary folder.

    This shows before the run whether transformers can save it. Raises: ValueError and OSError from transformers.
    """
    model = config.model
    known = load_config(model.path, model.trust_remote_code)
    export_dtype(config)
    with tempfile.TemporaryDirectory() as folder:
        _write_small_files(known, tokenizer, model, Path(folder))


def _write_small_files(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, source: ModelConfig, folder: Path
) -> None:
    """Write model config and tokenizer, and copy the source's generation config.

    It is copied because some chat models have one that is greedy and sets a temperature, which transformers reads but
    refuses to write. If the source has none, the one that transformers derives from the model config stays.
    """
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = cached_file(resolve(source.path), GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    if generation is not None:
        shutil.copyfile(generation, folder / GENERATION_CONFIG_NAME)


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the weights that transformers always loads in fp32 to fp32."""
    patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(re.search(pattern, name) for pattern in patterns):
            tensor.data = tensor.data.float()
