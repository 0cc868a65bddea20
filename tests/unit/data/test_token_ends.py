"""Where each token ends in the text of a completion."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_of_a_kind import byte_level, sentencepiece_like

from rlkd.data.chat import decode, token_ends

BYTES, PIECES = byte_level(), sentencepiece_like("first")


def parts(tokenizer, token_ids):
    """The text of each token."""
    text = decode(tokenizer, token_ids)
    ends = token_ends(tokenizer, token_ids, text, {})
    assert ends == sorted(ends) and ends[-1] == len(text)
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@given(st.lists(st.integers(0, len(BYTES) - 1), min_size=1, max_size=30))
def test_the_parts_of_any_tokens_are_their_text(token_ids):
    assert "".join(parts(BYTES, token_ids)) == decode(BYTES, token_ids)


@given(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=30))
def test_so_they_are_where_the_first_token_loses_its_space(token_ids):
    assert "".join(parts(PIECES, token_ids)) == decode(PIECES, token_ids)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them():
    """é has two bytes and 🙂 four, each a token of its own here."""
    token_ids = BYTES("a é🙂b<|im_end|>", add_special_tokens=False)["input_ids"]
    assert parts(BYTES, token_ids) == ["a", " ", "", "é", "", "", "", "🙂", "b", "<|im_end|>"]


def test_a_character_that_is_never_completed_does_not_shift_what_follows():
    """A sampler may stop or go on in the middle of a character."""
    half = BYTES("é", add_special_tokens=False)["input_ids"][:1]
    rest = BYTES("xyz", add_special_tokens=False)["input_ids"]
    assert parts(BYTES, half + rest)[-2:] == ["y", "z"]


def test_spaces_are_with_their_words():
    token_ids = PIECES("an b c", add_special_tokens=False)["input_ids"]
    assert parts(PIECES, token_ids) == ["a", "n", " b", " c"]


@pytest.mark.timeout(30)
def test_tokens_without_text_are_given_up():
    """Then the last one has the rest, and no more than a few tokens are decoded at once, which takes linear time."""
    text, count = "something else", 30_000
    assert token_ends(BYTES, [0] * count, text, {}) == [*[0] * (count - 1), len(text)]


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES])
def test_one_token(tokenizer):
    (token,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert parts(tokenizer, [token]) == ["a"]
