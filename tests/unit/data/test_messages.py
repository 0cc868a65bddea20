"""Columns and messages in other formats, and what reaches the chat template."""

import json

import datasets
import pytest
from lines import assert_lines, one_line

from rlkd.algorithms.feedback import question_ids
from rlkd.algorithms.feedback_options import FeedbackConfig
from rlkd.algorithms.privileged_prompt import privileged_prompt
from rlkd.config.schema import DataConfig
from rlkd.config_file import ConfigError, load
from rlkd.data.chat import decode, load_tokenizer
from rlkd.data.faults import DataError
from rlkd.data.sources import load_source
from rlkd.planning.preflight import check
from rlkd.types import written

TEMPLATE = (
    "{% if tools %}<system>{% for t in tools %}{{ t.function.name }}={{ t.function.parameters | tojson }} {% endfor %}"
    "{% endif %}{% if brief %}<system>{{ brief }}{% endif %}"
    "{% for m in messages %}<{{ 'user' if m.role == 'tool' else m.role }}>"
    "{% if m.reasoning_content is defined %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}call {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tool(name, **parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ASKED = {"role": "user", "content": "two?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [call("add", x=1)], "reasoning_content": "hm"}
TOLD = {"role": "tool", "content": "3", "name": "add"}
READ = '<system>add={"x": 1} <user>two?<assistant>(hm)call add {"x": 1}<eos><user>3<assistant>'


@pytest.fixture
def tok():
    """The built-in tokenizer with a template that reads tools and calls, and the characters of JSON."""
    tokenizer = load_tokenizer("builtin:student")
    tokenizer.add_tokens(list('{}"_='))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(tok, path, **changes):
    return load_source(DataConfig(path=str(path), **changes), tok)


def read(tok, prompt):
    return decode(tok, prompt.token_ids)


def refusal(tok, path, **changes):
    with pytest.raises(DataError) as caught:
        source(tok, path, **changes)
    (line,) = caught.value.lines
    return line.removeprefix(f"{path}:")


# ---- columns -----------------------------------------------------------------------------------------------------


def test_a_column_within_others(tok, tmp_path):
    row = {"in": {"text": "abc"}, "meta": {"gold": {"value": 7}, "hint.de": {"of": "so"}}, "id": "x"}
    path = write(tmp_path / "data.jsonl", row)
    columns = {"answer_column": "meta.gold.value", "privileged_column": "meta.hint.de.of"}
    (prompt,) = source(tok, path, prompt_column="in.text", **columns)
    assert (prompt.answer, prompt.privileged, prompt.messages[0]["content"]) == ("7", "so", "abc")
    assert prompt.meta == row, "the column around it stays for the rewards"


def test_a_column_whose_own_name_has_dots_comes_first(tok, tmp_path):
    path = write(tmp_path / "data.jsonl", {"prompt": "a", "meta.gold": "mine", "meta": {"gold": "other"}})
    (prompt,) = source(tok, path, answer_column="meta.gold")
    assert prompt.answer == "mine" and prompt.meta == {"meta": {"gold": "other"}}


@pytest.mark.parametrize(
    ("meta", "parts"),
    [
        ({"gold": {"text": "a", "n": 1}}, ("'meta.gold'", "text, n")),
        ({"silver": 1}, ("'meta'", "silver")),
        ({"gold": "a"}, ("'meta.gold'", "str 'a'")),
        (None, ("'meta'", "null")),
    ],
)
def test_a_row_without_it_says_what_there_is(tok, tmp_path, meta, parts):
    path = write(tmp_path / "data.jsonl", {"prompt": "a", "meta": meta})
    line = refusal(tok, path, answer_column="meta.gold.value")
    assert_lines([line], ("1: ", "'meta.gold.value'", "data.answer_column", *parts))


# ---- messages of another shape -----------------------------------------------------------------------------------

SHAREGPT = {"role": "from", "content": "value", "roles": {"human": "user", "gpt": "assistant"}}


def test_sharegpt_is_the_same_conversation(tok, tmp_path):
    said = [("system", "be brief"), ("human", "a"), ("gpt", "b"), ("human", "c")]
    path = write(tmp_path / "data.jsonl", {"talk": [{"from": who, "value": text, "weight": 1} for who, text in said]})
    keys = load(["configs/quickstart.yaml"], [f"data.messages={json.dumps(SHAREGPT)}"]).config.data.messages
    plain = {"prompt_column": "talk", "answer_column": None}
    talk = source(tok, path, messages=keys, **plain)
    assert read(tok, talk[0]) == "<system>be brief<user>a<assistant>b<eos><user>c<assistant>"
    assert [m["role"] for m in talk[0].messages] == ["system", "user", "assistant", "user"]
    assert_lines(talk.notes, ("1 of 1", "'weight'"))
    shown = "from: 'system', value: 'be brief', weight: '1'"
    parts = ("'talk'", "data.prompt_column", "message 1", "'role'", "'content'", shown, "data.messages")
    assert_lines([refusal(tok, path, **plain)], ("1: ", *parts, "{role: from, content: value}"))
    keys = keys.model_copy(update={"roles": {"gpt": "assistant"}})
    line = refusal(tok, path, messages=keys, **plain)
    assert_lines(
        [line], ("1: ", "message 2", "got 'human'", "system, developer, user, assistant, tool", "data.messages")
    )


def test_a_role_of_its_own_is_named_in_the_mapping(tok, tmp_path):
    path = write(tmp_path / "data.jsonl", {"prompt": [{"role": "critic", "content": "a"}], "answer": "a"})
    assert "got 'critic'" in refusal(tok, path)
    keys = DataConfig(path="x").messages.model_copy(update={"roles": {"critic": "critic"}})
    assert source(tok, path, messages=keys)[0].messages[0]["role"] == "critic"


# ---- whole messages, tools and variables -------------------------------------------------------------------------


def test_calls_thoughts_and_tools_reach_the_template(tok, tmp_path):
    row = {"prompt": [ASKED, CALLED, TOLD], "answer": "3", "tools": [tool("add", x=1)]}
    path = write(tmp_path / "data.jsonl", row, row | {"tools": json.dumps(row["tools"])}, row | {"tools": None})
    prompts = source(tok, path, tools_column="tools")
    assert [read(tok, prompt) for prompt in prompts] == [READ, READ, READ.removeprefix('<system>add={"x": 1} ')]
    assert_lines(prompts.notes, ("3 of 3", "'name'"))
    assert "tools" not in prompts[0].meta and prompts[0].messages == (ASKED, CALLED, TOLD)


def test_nulls_that_a_table_fills_in_are_taken_out(tok, tmp_path):
    """In Arrow every message has the fields of all other messages, and every tool the parameters of all other tools."""
    rows = [
        {"prompt": [ASKED, CALLED, TOLD], "answer": "3", "tools": [tool("add", x=1)]},
        {"prompt": [ASKED], "answer": "3", "tools": [tool("sub", y=2)]},
        {"prompt": [ASKED], "answer": "3", "tools": []},
    ]
    table = datasets.Dataset.from_list(rows)
    assert table[1]["prompt"][0]["tool_calls"] is None, "otherwise this tests nothing"
    table.save_to_disk(tmp_path / "data")
    prompts = source(tok, tmp_path / "data", tools_column="tools")
    assert [read(tok, p) for p in prompts] == [
        READ,
        '<system>sub={"y": 2} <user>two?<assistant>',
        "<user>two?<assistant>",
    ]
    assert prompts[1].messages == (ASKED,)


def test_nulls_that_jsonl_has_within_a_call_are_the_datas(tok, tmp_path):
    called = CALLED | {"tool_calls": [call("add", x=None)], "name": None}
    path = write(tmp_path / "data.jsonl", {"prompt": [ASKED, called, TOLD], "answer": "3"})
    assert 'call add {"x": null}' in read(tok, source(tok, path)[0])


def test_null_is_no_content_without_a_call(tok, tmp_path):
    path = write(tmp_path / "data.jsonl", {"prompt": [{"role": "user", "content": None}], "answer": "3"})
    assert_lines([refusal(tok, path)], ("1: ", "message 1", "'role'", "'content'", "role: 'user', content: 'None'"))


def test_a_template_that_asks_whether_there_is_content_is_told(tok, tmp_path):
    tok.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ 'none' if m['content'] is none else m.content }}")
    path = write(tmp_path / "data.jsonl", {"prompt": [ASKED, CALLED, TOLD], "answer": "3"})
    assert "(hm)nonecall add" in read(tok, source(tok, path)[0])


def test_tools_that_are_none(tok, tmp_path):
    row = {"prompt": "a", "answer": "a"}
    for value, shown in ((7, "int '7'"), ("[", "text '['")):
        line = refusal(tok, write(tmp_path / "x.jsonl", row | {"tools": value}), tools_column="tools")
        assert_lines([line], ("1: ", "'tools'", "data.tools_column", shown, "list"))
    tok.chat_template = "{{ messages[0].content }}"
    path = write(tmp_path / "data.jsonl", row | {"tools": [tool("add")]})
    assert_lines(source(tok, path, tools_column="tools").notes, ("1 of 1", "tools"))


def test_variables_of_the_template_come_from_the_config(tok, tmp_path):
    path = write(tmp_path / "data.jsonl", {"prompt": "a", "answer": "a"})
    (prompt,) = source(tok, path, template_variables={"brief": "short"})
    assert read(tok, prompt) == "<system>short<user>a<assistant>"
    keys = [
        "run.name=of_a_test",
        f"data.path={path}",
        "eval.every=0",
        "rollout.prompts=1",
        "data.template_variables={brief: short}",
    ]
    found = check(load(["configs/quickstart.yaml"], keys).config)
    assert_lines(found, ("data.template_variables: ", "brief", "builtin:student"))
    found = check(load(["configs/quickstart.yaml"], [*keys, "data.chat_template=false"]).config)
    assert_lines(found, ("data.template_variables: ", "data.chat_template"))
    with pytest.raises(ConfigError, match=one_line("data.template_variables: ", "tools")):
        load(["configs/quickstart.yaml"], ["data.template_variables={tools: []}"])


def test_teachers_read_whole_messages_tools_and_variables_too(tok, tmp_path):
    row = {"prompt": [ASKED, CALLED, TOLD], "answer": "3", "tools": [tool("add", x=1)]}
    data = DataConfig(
        path=write(tmp_path / "data.jsonl", row), tools_column="tools", template_variables={"brief": "short"}
    )
    (prompt,) = load_source(data, tok)
    shown = decode(tok, privileged_prompt(tok, prompt, "{prompt} {context}", [" hint"], data))
    assert shown == READ.replace("<user>two?", "<system>short<user>two?  hint")
    options = FeedbackConfig(system=None, behaviours=[], user="{question} answer: {response}")
    asked = question_ids(options, tok, written(prompt, [*tok.encode("cb"), 1], "data", "stop"))
    assert decode(tok, asked) == "<system>short<user>two?\n\n3 answer: cb<assistant>"


# ---- a last message by the assistant -----------------------------------------------------------------------------


def test_a_last_message_by_the_assistant_is_refused_or_continued(tok, tmp_path):
    begun = [ASKED, {"role": "assistant", "content": "so: "}]
    path = write(tmp_path / "data.jsonl", {"prompt": begun, "answer": "3"}, {"prompt": "a", "answer": "b"})
    parts = ("'prompt'", "data.prompt_column", "last message", "assistant", "data.continue_final_message: true")
    assert_lines([refusal(tok, path)], ("1: ", *parts))
    data = DataConfig(path=path, continue_final_message=True)
    first, second = load_source(data, tok)
    assert read(tok, first) == "<user>two?<assistant>so: " and read(tok, second) == "<user>a<assistant>"
    shown = privileged_prompt(tok, first, "{prompt} {context}", ["hint"], data)
    assert decode(tok, shown) == "<user>two? hint<assistant>so: "


def test_a_completion_goes_on_with_the_last_message(tok, tmp_path):
    begun = [ASKED, {"role": "assistant", "content": "so: "}]
    path = write(tmp_path / "data.jsonl", {"prompt": begun, "answer": "3"})
    (prompt,) = source(tok, path, continue_final_message=True, completion_column="answer")
    assert decode(tok, [*prompt.token_ids, *prompt.completion]) == "<user>two?<assistant>so: 3<eos>"
