"""Exports the student in Hugging Face format, for transformers and vLLM, and its adapter in PEFT's format."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from rlkd.builtin import resolve
from rlkd.config.schema import Config, ModelConfig
from rlkd.models import lora
from rlkd.models.student import Student
from rlkd.models.vocabulary import load_config
from rlkd.models.weights import TensorInfo, read_on_rank_zero
from rlkd.storage import atomic
from rlkd.storage.disk_errors import writing
from rlkd.storage.run_folder import EXPORT_RECORD
from rlkd.weight_sync.tensor_file import write_checkpoint

LAST, BEST = "hf", "best"
"""The folders of a run with the student of its last iteration, and that of its best evaluation."""


def export_student(
    student: Student,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    iteration: int,
    known: Mapping[str, float],
    name: str = LAST,
) -> None:
    """Write the student to `<run>/NAME`, with adapters merged, and its adapter, if it has one, beside it.

    The adapter's folder is `<run>/adapter`, or `<run>/best-adapter` for the best student. A collective; rank 0 writes.
    The student is written last, so if it exists the adapter does too.

    Args:
        iteration: the number of iterations that it was trained for.
        known: what else to record about it (`run_folder.export_record`).
    """
    source, folder = config.model, Path(config.run_dir)
    adapter = folder / ("adapter" if name == LAST else f"{name}-adapter")
    if source.lora is not None:
        settings, base = source.lora, resolve(source.path)

        def write_adapter(tensors: Iterable[tuple[str, Tensor]]) -> None:
            with writing(f"the adapter, to {folder},"):
                lora.write(dict(tensors), settings, base, adapter)

        read_on_rank_zero(student.adapter_weights(), write_adapter)
    dtype = export_dtype(config)
    weights = student.checkpoint_weights(dtype, vectors=True)

    def write(tensors: Iterable[tuple[str, Tensor]]) -> None:
        with writing(f"the student, to {folder},"):
            record = {"iteration": iteration, **known}
            export(weights.infos, tensors, student.hf, tokenizer, source, folder / name, record, dtype)

    read_on_rank_zero(weights, write)


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
    infos: Sequence[TensorInfo],
    tensors: Iterable[tuple[str, Tensor]],
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelConfig,
    folder: Path,
    record: Mapping[str, float],
    dtype: torch.dtype,
) -> None:
    """Write model, tokenizer and generation config to `folder`, atomically.

    Args:
        infos, tensors: as checkpoint files have them (`Student.checkpoint_weights`).
        hf: the model, of which only the settings are read.
        source: the model that the student started from, whose generation config is copied.
        folder: replaced if it exists.
        record: the number of iterations that the weights were trained for, and what else `run_folder.export_record`
            should return.
        dtype: of the weights, which the model config names.
    """
    partial = atomic.partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_checkpoint(infos, tensors, partial)
    config = copy.deepcopy(hf.config)
    config.architectures, config.dtype = [type(hf).__name__], str(dtype).removeprefix("torch.")
    if hf.is_remote_code():
        custom_object_save(hf, partial, config=config)  # type: ignore[arg-type]
    GenerationConfig.from_model_config(config).save_pretrained(partial)
    _write_small_files(config, tokenizer, source, partial)
    (partial / EXPORT_RECORD).write_text(json.dumps(record), encoding="utf-8")
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
