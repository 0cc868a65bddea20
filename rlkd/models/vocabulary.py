"""How many token ids a run uses.

Models often have more embedding rows than their tokenizer has tokens, because round numbers are faster (Qwen2.5 has
151,936 rows for 151,665 tokens). No text contains the ids of the extra rows, and their logits are whatever training
left there. So they take no part in anything: they are never sampled, never scored, and are in no softmax, of the
student or of a teacher.
"""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedTokenizerBase

from rlkd.builtin import resolve
from rlkd.config.schema import ModelConfig
from rlkd.data.chat import load_tokenizer


def vocabulary_size(model: ModelConfig) -> int:
    """The ids below this number are the tokens of a run with the student `model`; both its models use no others.

    That is every id which the tokenizer knows and for which the student has an embedding.
    """
    tokenizer = load_tokenizer(model.path, model.trust_remote_code)
    return min(tokenizer_size(tokenizer), embedding_rows(model.path, model.trust_remote_code))


def padding(model: ModelConfig, path: str) -> range:
    """The ids of the embedding rows of the model at `path`, the student's or a teacher's, that stand for no token."""
    return range(vocabulary_size(model), embedding_rows(path, model.trust_remote_code))


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id that the tokenizer knows. (`len` counts tokens, and ids may have gaps.)"""
    return 1 + max(tokenizer.get_vocab().values())


def embedding_rows(path: str, trust_remote_code: bool) -> int:
    """How many rows the embeddings of the model at `path` have, by its config.json."""
    settings = AutoConfig.from_pretrained(resolve(path), trust_remote_code=trust_remote_code)
    return int(settings.get_text_config().vocab_size)
