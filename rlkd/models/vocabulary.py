"""How many token ids a run uses.

Models often have more embedding rows than their tokenizer has tokens, because round sizes are faster (Qwen2.5 has
151,936 rows for 151,665 tokens). No text contains the ids of the extra rows, and their logits are arbitrary. So they
are never sampled, never scored, and excluded from every softmax of the student and of a teacher.
"""

from __future__ import annotations

import copy
import functools
import logging
import os

from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from rlkd.builtin import resolve
from rlkd.config.schema import ModelConfig
from rlkd.data.chat import load_tokenizer
from rlkd.models.found import find

Stamp = tuple[tuple[str, int, int], ...]


def vocabulary_size(model: ModelConfig) -> int:
    """The vocabulary size of a run with the student `model`: student and teacher use only ids below it.

    These are the ids that the tokenizer knows and for which the student has an embedding.
    """
    folder = resolve(model.path)
    return _vocabulary_size(os.path.abspath(folder), folder, model.trust_remote_code, _stamp(folder))


@functools.lru_cache(maxsize=64)
def _vocabulary_size(_: str, folder: str, trust_remote_code: bool, stamp: Stamp) -> int:
    tokenizer = load_tokenizer(folder, trust_remote_code)
    return min(tokenizer_size(tokenizer), embedding_rows(folder, trust_remote_code))


def load_config(path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """A copy of the configuration of the model at `path` (folder, hub id, builtin:…), which is read once.

    Raises: ValueError, one line, if there is none; OSError and ValueError from transformers, and anything that the
        model's own code raises.
    """
    folder = resolve(path)
    return copy.deepcopy(_config(os.path.abspath(folder), folder, trust_remote_code, _stamp(folder)))


@functools.lru_cache(maxsize=64)
def _config(_: str, folder: str, trust_remote_code: bool, stamp: Stamp) -> PreTrainedConfig:
    find(folder)
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)  # not two lines for each time that it asks a hub that does not answer
    try:
        settings: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    finally:
        hub_logging.set_verbosity(before)
    return settings


def _stamp(folder: str) -> Stamp:
    """(name, time, size) of the small files in a folder, so that a folder that has changed is read again."""
    if not os.path.isdir(folder):
        return ()
    with os.scandir(folder) as files:
        small = [file for file in files if file.name.endswith((".json", ".txt", ".model", ".py", ".jinja"))]
        return tuple(sorted((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in small))


def padding(model: ModelConfig, path: str) -> range:
    """The ids of the embedding rows of the model at `path` (student or teacher) that belong to no token."""
    return range(vocabulary_size(model), embedding_rows(path, model.trust_remote_code))


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id that the tokenizer knows. (`len` counts tokens, and ids may have gaps.)"""
    return 1 + max(tokenizer.get_vocab().values())


def embedding_rows(path: str, trust_remote_code: bool) -> int:
    """The number of embedding rows of the model at `path`, from its config.json."""
    settings = load_config(path, trust_remote_code)
    return int(settings.get_text_config().vocab_size)
