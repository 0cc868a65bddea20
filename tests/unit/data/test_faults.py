"""All faults of a data set are reported together, one line each, up to a limit."""

import json
import re

import pytest
from lines import assert_lines, one_line

from rlkd.config.schema import DataConfig
from rlkd.config_file import load
from rlkd.data.chat import load_tokenizer
from rlkd.data.faults import SHOWN, DataError
from rlkd.data.sources import load_source, read_rows
from rlkd.planning.preflight import check

TOK = load_tokenizer("builtin:student")
GOOD = {"prompt": "abc", "answer": "cba"}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def faults(path, **changes):
    with pytest.raises(DataError) as caught:
        load_source(DataConfig(path=str(path), **changes), TOK)
    return [line.removeprefix(f"{path}:") for line in caught.value.lines]


def test_every_kind_of_fault_of_one_file_in_the_order_of_its_lines(tmp_path):
    rows = [
        {**GOOD, "id": "a"},
        '{"prompt": "abc", "ans',
        {**GOOD, "id": "a"},
        {"prompt": "abc", "id": "b"},
        {"prompt": [], "answer": None, "id": "c"},
        {**GOOD, "prompt": "a" * 99, "id": "d"},
        {**GOOD, "prompt": [{"role": "tool", "content": "x"}], "id": "e"},
        {**GOOD, "id": "f", "extra": float("nan")},
        {**GOOD, "id": "g"},
    ]
    lines = faults(write(tmp_path / "data.jsonl", rows), id_column="id", max_prompt_tokens=50)
    assert_lines(
        lines,
        ("2: column 19: ", "unterminated string"),
        ("3: ", "'a'"),
        ("4: ", "'answer'", "data.answer_column", "prompt, id"),
        ("5: ", "'prompt'", "data.prompt_column", "empty"),
        ("5: ", "'answer'", "data.answer_column", "null"),
        ("6: ", "'d'", 101, "data.max_prompt_tokens", 50),
        ("7: ", "chat template", "the roles are system, user and assistant, not tool"),
        ("8: ", "NaN"),
    )


def test_beyond_a_bound_they_are_counted(tmp_path):
    path = write(tmp_path / "data.jsonl", [GOOD] + [{"prompt": "abc", "answer": None}] * (SHOWN + 7))
    lines = faults(path)
    assert [line.split(":")[0] for line in lines[:-1]] == [str(n) for n in range(2, SHOWN + 2)]
    assert re.search(one_line(7), lines[-1])
    exactly = write(tmp_path / "exactly.jsonl", [GOOD] + [{"prompt": "abc", "answer": None}] * SHOWN)
    assert len(faults(exactly)) == SHOWN


def test_a_column_that_no_row_has_is_the_configurations_fault_and_said_once(tmp_path):
    path = write(tmp_path / "data.jsonl", [GOOD] * 30 + ["{"])
    found = faults(path, answer_column="gold")
    assert_lines(found, ("1: ", "'gold'", "data.answer_column", "prompt, answer"), ("31: ",))
    assert found[1:] == faults(path)
    path = write(tmp_path / "some.jsonl", [{"prompt": "abc"}, GOOD, {"prompt": "abc"}])
    assert [line.split(":")[0] for line in faults(path)] == ["1", "3"]


def test_what_the_chat_template_says_to_every_row_is_said_once(tmp_path):
    asked = {"prompt": [{"role": "user", "content": "a"}], "answer": "a"}
    path = write(tmp_path / "data.jsonl", [asked, "{", asked])
    lines = faults(path, system="be brief")
    assert [line.split(":")[0] for line in lines] == ["1", "2"] and "data.system is for text prompts" in lines[0]
    path = write(tmp_path / "mixed.jsonl", [asked, GOOD, asked])
    assert [line.split(":")[0] for line in faults(path, system="be brief")] == ["1", "3"]


def test_reading_without_a_tokenizer_gives_the_right_rows_and_then_the_faults(tmp_path):
    path, seen = write(tmp_path / "data.jsonl", [GOOD, "{", GOOD, "["]), []
    with pytest.raises(DataError) as caught:
        for row in read_rows(DataConfig(path=path)):
            seen.append(row.id)
    assert seen == ["0", "2"] and len(caught.value.lines) == 2


def test_preflight_prints_a_line_a_fault_for_training_and_held_out_data(tmp_path):
    train = write(tmp_path / "train.jsonl", [GOOD] * 20 + ["{", {"prompt": "abc", "answer": None}])
    held = write(tmp_path / "held.jsonl", [GOOD, {"prompt": "", "answer": "a"}, "nothing"])
    keys = ["run.name=of_a_test", f"data.path={train}", f"eval.path={held}", "data.limit=64"]
    lines = check(load(["configs/quickstart.yaml"], keys).config)
    assert [line.split(": ")[:2] for line in lines] == [
        ["data.path", f"{train}:21"],
        ["data.path", f"{train}:22"],
        ["eval.path", f"{held}:2"],
        ["eval.path", f"{held}:3"],
    ]
    few = check(load(["configs/quickstart.yaml"], [*keys, f"data.path={held}", "eval.every=0"]).config)
    assert len(few) == 2, "the number of prompts is checked only for valid data"
