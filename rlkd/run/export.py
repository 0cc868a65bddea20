"""Exports the student in Hugging Face format, for transformers and vLLM, and its adapter in PEFT's format."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
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
from rlkd.models.weights import read_on_rank_zero
from rlkd.run.model_card import CARD, model_card
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
    heldout: int = 0,
    known: Mapping[str, float] | None = None,
    name: str = LAST,
) -> None:
    """Write the student to `<run>/NAME`, with adapters merged, and its adapter, if it has one, beside it.

    The adapter's folder is `<run>/adapter`, or `<run>/best-adapter` for the best student. A collective; rank 0 writes.
    The student is written last, so if it exists the adapter does too.

    Args:
        iteration: the number of iterations that the student was trained for.
        heldout: the number of prompts that the run's evaluations measured, for the model card.
        known: what else `run_folder.export_record` should return.
    """
    source, folder = config.model, Path(config.run_dir)
    adapter = folder / ("adapter" if name == LAST else f"{name}-adapter")
    if source.lora is not None:
        settings, base = source.lora, resolve(source.path)

        def write_adapter(tensors: Iterable[tuple[str, Tensor]]) -> None:
            with writing(f"the adapter, to {folder},"), atomic.folder(adapter) as partial:
                lora.write(dict(tensors), settings, base, partial)
                _write_for_text(copy.deepcopy(student.hf.config), tokenizer, source, partial)
                card = model_card(config, iteration, heldout, adapter=True)
                (partial / CARD).write_text(card, encoding="utf-8")

        read_on_rank_zero(student.adapter_weights(), write_adapter)
    dtype = export_dtype(config)
    weights = student.checkpoint_weights(dtype, vectors=True)

    def write(tensors: Iterable[tuple[str, Tensor]]) -> None:
        with writing(f"the student, to {folder},"), atomic.folder(folder / name) as partial:
            write_checkpoint(weights.infos, tensors, partial)
            _write_small_files(student.hf, tokenizer, source, partial, dtype)
            record = {"iteration": iteration, **(known or {})}
            (partial / EXPORT_RECORD).write_text(json.dumps(record), encoding="utf-8")
            (partial / CARD).write_text(model_card(config, iteration, heldout), encoding="utf-8")

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


def rehearse(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the export without its weights to a temporary folder.

    This shows before the run whether transformers can save it. Raises: ValueError and OSError from transformers.
    """
    model = config.model
    known = load_config(model.path, model.trust_remote_code)
    export_dtype(config)
    with tempfile.TemporaryDirectory() as folder:
        known.save_pretrained(folder)
        _write_for_text(known, tokenizer, model, Path(folder))


def _write_small_files(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: ModelConfig, folder: Path, dtype: torch.dtype
) -> None:
    """Write the model config, with the `dtype` of the weights, the model's own code if any, and `_write_for_text`."""
    config = copy.deepcopy(hf.config)
    config.architectures, config.dtype = [type(hf).__name__], str(dtype).removeprefix("torch.")
    if hf.is_remote_code():
        custom_object_save(hf, folder, config=config)  # type: ignore[arg-type]
    config.save_pretrained(folder)
    _write_for_text(config, tokenizer, source, folder)


def _write_for_text(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, source: ModelConfig, folder: Path
) -> None:
    """Write the tokenizer with its chat template, and copy the generation config of the student's start, `source`.

    It is copied because some chat models have one that is greedy and sets a temperature, which transformers reads but
    refuses to write. If the source has none, it is what transformers derives from the model config.
    """
    tokenizer.save_pretrained(folder)
    generation = cached_file(resolve(source.path), GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    if generation is not None:
        shutil.copyfile(generation, folder / GENERATION_CONFIG_NAME)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
