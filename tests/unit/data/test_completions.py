"""Completions from the data are the template's own text, from the end of the prompt to where the student would stop."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_of_a_kind import byte_level, sentencepiece_like

from rlkd.algorithms.feedback import answered
from rlkd.algorithms.feedback_options import FeedbackConfig
from rlkd.builtin import resolve
from rlkd.config.schema import DataConfig
from rlkd.config_file import load
from rlkd.data.chat import decode, encode_after, encode_completion, load_tokenizer, read_prompt
from rlkd.data.faults import DataError
from rlkd.data.sources import load_source
from rlkd.planning.preflight import check
from rlkd.types import Completion, Prompt, Rollout, VersionSpan

BYTES, TOK = byte_level(), load_tokenizer("builtin:student")
END = BYTES.eos_token_id
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def tokens(tokenizer, text, prompt="hi", ends=None, **how):
    ends = (tokenizer.eos_token_id,) if ends is None else ends
    ids = encode_completion(tokenizer, read_prompt(tokenizer, prompt, **how), text, ends)
    return tokenizer.convert_ids_to_tokens(list(ids))


@pytest.mark.parametrize("tokenizer", [BYTES, TOK, sentencepiece_like("always"), sentencepiece_like("first")])
@pytest.mark.parametrize("text", ["abc", "a b", "x"])
def test_prompt_and_completion_are_the_templates_own_ids(tokenizer, text):
    prompt = read_prompt(tokenizer, "hi")
    ids = (*prompt.token_ids, *encode_completion(tokenizer, prompt, text, (tokenizer.eos_token_id,)))
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]
    whole = tokenizer.encode(tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False)
    cut = len(whole) - whole[::-1].index(tokenizer.eos_token_id)  # text after the end of the turn is dropped
    assert list(ids) == whole[:cut]


def test_no_blank_is_put_before_it():
    assert tokens(sentencepiece_like("first"), "abc") == ["a", "b", "c", "</s>"]
    assert tokens(sentencepiece_like("first"), "abc", "q:", chat_template=False) == ["a", "b", "c", "</s>"]
    assert tokens(sentencepiece_like("first"), " abc", "q:", chat_template=False) == ["▁a", "b", "c", "</s>"]


def test_the_prompts_own_ids_stay_where_letters_would_join_over_the_border():
    """`:a` and a double line break are one token each; the completion has the tokens that a student would sample."""
    assert tokens(BYTES, "a", "q:", chat_template=False) == ["a", "<|im_end|>"]
    assert tokens(BYTES, "\na") == ["Ċ", "a", "<|im_end|>"]


def test_a_turn_ends_with_the_token_that_the_template_and_the_model_agree_on():
    ends = (TOK.eos_token_id, TOK.convert_tokens_to_ids("<system>"))
    tokenizer = load_tokenizer("builtin:student")
    tokenizer.chat_template = TOK.chat_template.replace("{{ '<eos>' }}", "{{ '<system>\\n' }}")
    assert tokens(tokenizer, "cba", ends=ends) == ["c", "b", "a", "<system>"]
    # The model never ends with the token that closes a turn in this template, so its own end token replaces it.
    assert tokens(tokenizer, "cba", ends=ends[:1]) == ["c", "b", "a", "<eos>"]
    tokenizer.chat_template = TOK.chat_template.replace("{{ '<eos>' }}", "")
    assert tokens(tokenizer, "cba", ends=ends[::-1]) == ["c", "b", "a", "<eos>"]


@pytest.mark.parametrize("text", ["a", "a<|im_end|>"])
def test_an_end_that_the_text_has_already_is_not_doubled(text):
    assert tokens(BYTES, text) == ["a", "<|im_end|>"]
    assert tokens(BYTES, text, chat_template=False) == ["a", "<|im_end|>"]


def test_an_end_within_the_text_ends_nothing_and_other_special_tokens_are_the_students_to_write():
    ids = tokens(BYTES, "a<|im_end|>b")
    assert ids.count("<|im_end|>") == 1 and ids[-1] == "<|im_end|>" and ids[:3] == ["a", "<|", "im"]
    assert tokens(BYTES, "a<|im_start|><think>") == ["a", "<|im_start|>", "<think>", "<|im_end|>"]


def test_a_template_that_opens_a_turn_with_a_thought_of_its_own():
    """The prompt ends within the thought, which the template leaves out of earlier turns."""
    assert tokens(byte_level(THINKS), "hm</think>so") == ["h", "m", "</think>", "s", "o", "<|im_end|>"]


def test_a_thought_that_the_template_leaves_out_of_a_turn_is_learnt():
    """Like DeepSeek-R1's template, whose generation prompt need not open the thought."""
    template = THINKS.replace("<think>\n", "").replace("<think>", "")
    assert tokens(byte_level(template), "hm</think>so") == ["h", "m", "</think>", "s", "o", "<|im_end|>"]


@given(st.text(alphabet="ab :\n", max_size=8))
def test_a_completion_says_its_text(text):
    for how in ({}, {"chat_template": False}):
        prompt = read_prompt(BYTES, "q:\n", **how)
        ids = encode_completion(BYTES, prompt, text, (END,))
        assert ids[-1] == END and ids.count(END) == 1 and decode(BYTES, ids[:-1]) == text


def test_a_tokenizer_without_an_end_of_sequence(tmp_path):
    tokenizer = load_tokenizer("builtin:student")
    tokenizer.eos_token = None
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "abc", "answer": "cba"}) + "\n")
    data = DataConfig(path=str(path), completion_column="answer")
    (prompt,) = load_source(data, tokenizer, ends=(1,))
    assert prompt.completion[-1] == 1, "the model's own end"
    with pytest.raises(DataError, match="data.jsonl:1: nothing ends a completion: the tokenizer has no EOS token"):
        load_source(data, tokenizer)


def test_a_completion_of_the_builtin_task_is_what_it_was():
    data = DataConfig(path="builtin:reverse", completion_column="answer", limit=3)
    for prompt in load_source(data, TOK, ends=(1,)):
        assert prompt.completion == (*TOK.encode(prompt.answer), 1)


def test_preflight_takes_the_models_ends(tmp_path):
    """A tokenizer without an end-of-sequence token is fine if the model's generation config has one."""
    folder = tmp_path / "model"
    shutil.copytree(resolve("builtin:student"), folder)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    del described["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    keys = ["algorithm={name: sft}", "teacher=null", "data.completion_column=answer", f"model.path={folder}"]
    keys += ["run.name=of_a_test", "eval.every=0", "data.limit=64", "data.max_completion_tokens=16"]
    assert check(load(["configs/quickstart.yaml"], keys).config) == []
    lines = check(load(["configs/quickstart.yaml"], [*keys, "data.max_completion_tokens=9"]).config)
    assert "the completion of 'train-0' has 11 tokens, more than data.max_completion_tokens = 9" in lines[0]


# ---- texts that follow others ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_texts_that_follow_one_another_are_encoded_as_one_and_cut(scheme):
    tokenizer = sentencepiece_like(scheme)
    parts = [
        tokenizer.convert_ids_to_tokens(ids) for ids in encode_after(tokenizer, "abc", ["\n", "so", " it", "", "x"])
    ]
    assert parts == [["\n"], ["s", "o"], ["▁i", "t"], [], ["x"]]


@given(st.text(alphabet="ab :\n", max_size=4), st.lists(st.text(alphabet="ab :\n", max_size=3), min_size=1, max_size=4))
def test_cuts_lose_nothing_and_what_stands_before_keeps_its_ids(before, texts):
    parts = encode_after(BYTES, before, texts)
    assert len(parts) == len(texts)
    assert decode(BYTES, [i for part in parts for i in part]) == "".join(texts)


def test_feedback_follows_the_response_without_blanks():
    tokenizer = sentencepiece_like("first")
    said = (*tokenizer.encode("abc"), 2)
    rollout = Rollout(
        prompt=Prompt(id="p", messages=(), token_ids=(1,)),
        token_ids=said,
        logprobs=(-1.0,) * len(said),
        weight_versions=(VersionSpan(start=0, end=len(said), version=0),),
        finish_reason="stop",
    )
    text = "wait!so it is"
    answer = Completion(
        token_ids=(*tokenizer.encode(text), 2),
        logprobs=(0.0,) * (len(tokenizer.encode(text)) + 1),
        finish_reason="stop",
    )
    options = FeedbackConfig(pattern="(?P<reason>.*)!(?P<phrase>.*)", glue="\n")
    made = answered(options, tokenizer, rollout, answer, 99)
    assert tokenizer.convert_ids_to_tokens(list(made.token_ids)) == (
        ["▁a", "b", "c", "\n", "w", "a", "i", "t", "\n", "s", "o", "▁i", "t", "▁i", "s", "</s>"]
    )
    assert [s.author for s in made.segments] == ["student", "glue", "teacher", "glue", "teacher", "teacher"]
