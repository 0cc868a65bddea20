"""GSM8K and MATH-500 as they are published, by name."""

import json

import pytest
from lines import assert_lines

from rlkd.config.schema import DataConfig
from rlkd.data.faults import DataError
from rlkd.data.sources import read_rows

GSM8K = [
    {
        "question": "She sells the eggs daily for $2 each. How much in dollars does she make every day?",
        "answer": "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18",
    },
    {"question": "How much profit did he make?", "answer": "So he made 200,000-130,000=$<<>>70,000\n#### 70,000"},
]
MATH = {
    "problem": "Convert the point $(0,3)$ in rectangular coordinates to polar coordinates.",
    "solution": "We have that $r = 3.$",
    "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
    "subject": "Precalculus",
    "level": 2,
    "unique_id": "test/precalculus/807.json",
}


def rows(tmp_path, name, lines, **changes):
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return list(read_rows(DataConfig(path=f"{name}:{file}", **changes)))


def test_gsm8k_has_its_number_as_the_answer_and_its_solution_as_a_column(tmp_path):
    first, second = rows(tmp_path, "gsm8k", GSM8K, privileged_column="answer", id_column="x", prompt_column="y")
    assert (first.prompt, first.answer, second.answer) == (GSM8K[0]["question"], "18", "70000")
    assert first.privileged == GSM8K[0]["answer"] and (first.id, second.id) == ("0", "1")
    (held_out, _) = rows(tmp_path, "gsm8k", GSM8K)
    assert held_out.meta == {"answer": GSM8K[0]["answer"]}, "rewards may read the solution"


def test_math_500_has_its_level_and_subject_for_rewards(tmp_path):
    (row,) = rows(tmp_path, "math-500", [MATH], tools_column="none")
    assert (row.id, row.prompt, row.answer) == (MATH["unique_id"], MATH["problem"], MATH["answer"])
    assert (row.meta["level"], row.meta["subject"], row.meta["solution"]) == (2, "Precalculus", MATH["solution"])


def test_a_file_of_another_form_is_one_line(tmp_path):
    with pytest.raises(DataError) as caught:
        rows(tmp_path, "gsm8k", [*GSM8K, {"question": "How many?", "answer": "42"}])
    assert_lines(caught.value.lines, (tmp_path, "test.jsonl:3: ", "'#### '", "GSM8K", "'42'"))
    with pytest.raises(DataError) as caught:
        rows(tmp_path, "math-500", GSM8K)
    assert caught.value.lines and "'problem'" in caught.value.lines[0]
