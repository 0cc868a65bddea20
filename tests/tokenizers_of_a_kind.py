"""Small tokenizers of the kinds that models use: byte-level, SentencePiece-like, and one in Python."""

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


def byte_level(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Like Qwen's: merges across text borders if the letters allow it; <think> is one token, but not special."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ċ", "Ċ"), ("<", "|"), ("|", ">"), ("i", "m"), ("Ġ", "a"), (":", "a")]
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_like(scheme: str, template: str = INST) -> PreTrainedTokenizerFast:
    """Like Llama 2's and Mistral's: adds a space before the start of the text (`first`) or of every part (`always`)."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        *string.ascii_letters,
        *string.digits,
        *":.,!?<>|[]/_-\n",
        "▁",
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", letter) for letter in string.ascii_lowercase]
    vocabulary |= {a + b: len(pieces) + i for i, (a, b) in enumerate(merges)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[INST]", "[/INST]"],
    )
    tokenizer.chat_template = template
    return tokenizer
