"""Figures of an evaluation and the comparison of two, from records that are worked out by hand."""

import json
import re
from pathlib import Path

import pytest

from rlkd.evaluate import main
from rlkd.run.comparison import compared, comparison_table
from rlkd.run.evaluated import SUMMARY, figures, per_prompt, powers, table, write_records
from rlkd.run.statistics import exact_interval, sign_test


def completion(right, vote=None, tokens=10, reason="stop"):
    reward = None if right is None else float(right)
    answer = {"completion": f"so {vote}", "vote": vote, "error": "failed" if right is None else None}
    return answer | {"reward": reward, "correct": right, "tokens": tokens, "finish_reason": reason}


def record(name, greedy, samples, answer="4"):
    return {
        "id": name,
        "prompt": [{"role": "user", "content": f"question {name}"}],
        "answer": answer,
        "greedy": completion(greedy),
        "samples": samples,
    }


def of(*rights, votes="4567"):
    return [completion(right, "4" if right else vote) for right, vote in zip(rights, votes, strict=False)]


RECORDS = [
    record("a", True, of(True, True, False, False, votes="xxyy")),
    record("b", False, of(True, False, False, False, votes="xyyz")),
    record("c", None, [completion(None), *of(True, False, False)]),
]


def test_figures_of_each_prompt_by_hand():
    found = per_prompt(RECORDS, [1, 2, 4])
    assert found["greedy"] == [1.0, 0.0, None]
    assert found["avg@4"] == [0.5, 0.25, pytest.approx(1 / 3)], "over the samples whose reward is known"
    assert found["pass@1"] == [0.5, 0.25, None] and found["pass@4"] == [1.0, 1.0, None]
    assert found["pass@2"] == [pytest.approx(1 - 1 / 6), pytest.approx(1 / 2), None]
    assert found["majority@4"] == [0.5, 0.0, None], "4 4 y y is a tie; 4 y y z is lost"
    assert "majority@1" not in found and found["tokens"] == [10.0, 10.0, 10.0]
    with pytest.raises(ValueError, match="pass@k: expected 1 ≤ k ≤ 4 samples, got k = 5"):
        per_prompt(RECORDS, [5])


def test_there_is_no_majority_where_no_reward_tells_an_answer():
    silent = [record("a", True, [completion(True), completion(False)])]
    assert not [name for name in per_prompt(silent, [1, 2]) if name.startswith("majority")]


def test_the_summary_has_means_over_what_is_known_and_intervals():
    long = record("d", True, [completion(True, "4", 30, "length")] * 4)
    found = figures([*RECORDS, long], [1, 4], seed=0, max_tokens=30)
    assert found["greedy"] == {"mean": pytest.approx(2 / 3), "prompts": 3} | dict(
        zip(("low", "high"), exact_interval(2, 3), strict=True)
    )
    assert found["avg@4"]["mean"] == pytest.approx((0.5 + 0.25 + 1 / 3 + 1) / 4) and found["avg@4"]["prompts"] == 4
    assert found["avg@4"]["low"] < found["avg@4"]["mean"] < found["avg@4"]["high"]
    assert (found["tokens"]["mean"], found["truncated"], found["errors"]) == (15.0, 4 / 16, 2)
    text = table({"benchmarks": {"own": found | {"prompts": 4}}})
    assert "own        3        greedy" in text and "66.7%   9.4% to 99.2%" in text and "failed rewards" in text


def test_the_curve_has_powers_of_two_and_all_samples():
    assert [powers(n) for n in (1, 2, 6, 16)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16]]


@pytest.fixture
def evaluations(tmp_path, monkeypatch):
    """A function from a name and records to the folder of an evaluation, relative to the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name, records, **changes):
        settings = {"temperature": 1.0, "samples": 4, "max_tokens": 30, "seed": 0, "rewards": ["math"], "backend": "hf"}
        summary = {"model": f"models/{name}", "benchmarks": {"own": {}}} | settings | changes
        write_records(records, tmp_path / name / "own.jsonl")
        (tmp_path / name / SUMMARY).write_text(json.dumps(summary))
        return tmp_path / name

    return write


BEFORE = [record(str(i), i < 4, of(*[j < i % 5 for j in range(4)])) for i in range(12)]
AFTER = [record(str(i), 2 <= i < 9, of(*[j < (i + 1) % 5 for j in range(4)])) for i in range(12)]
"""Greedy: prompts 0 and 1 become wrong, 4 to 8 right, 2 and 3 stay right, 9 to 11 wrong. Of the samples, prompt i has
i mod 5 right before, and one more (or none after four) afterwards."""


def test_a_comparison_by_hand(evaluations):
    found = compared(evaluations("a", BEFORE), evaluations("b", AFTER[::-1]))["benchmarks"]["own"]
    assert found["greedy"] == {"wrong to wrong": 3, "wrong to right": 5, "right to wrong": 2, "right to right": 2}
    assert found["p"] == sign_test(2, 5)
    moves = {"none to some": 3, "some to some": 5, "some to all": 2, "all to none": 2}
    assert {name: count for name, count in found["samples"].items() if count} == moves
    greedy, mean = found["differences"]["greedy"], found["differences"]["avg@4"]
    assert (greedy["a"], greedy["b"], greedy["difference"]) == (4 / 12, 7 / 12, pytest.approx(3 / 12))
    assert mean["difference"] == pytest.approx((10 * 0.25 - 2 * 1.0) / 12)
    assert mean["low"] < mean["difference"] < mean["high"] and greedy["low"] < 0 < greedy["high"]
    assert {change["id"]: change["to"] for change in found["changed"]} == dict.fromkeys("01", "wrong") | dict.fromkeys(
        "45678", "right"
    )


def test_pairs_are_surer_than_two_samples(evaluations):
    """Prompts that are hard for one are hard for the other, so the difference is known better than either mean."""
    before = [record(str(i), True, of(*[j < i % 4 for j in range(4)])) for i in range(40)]
    after = [record(str(i), True, of(*[j < i % 4 + 1 for j in range(4)])) for i in range(40)]
    found = compared(evaluations("a", before), evaluations("b", after))["benchmarks"]["own"]["differences"]["avg@4"]
    assert found["difference"] == pytest.approx(0.25) and 0.1 < found["low"] < 0.25 < found["high"] < 0.4
    same = compared(evaluations("a", before), evaluations("c", before))["benchmarks"]["own"]
    assert same["p"] == 1.0 and same["changed"] == []
    assert same["differences"]["avg@4"]["low"] < 0 < same["differences"]["avg@4"]["high"], "one may differ"


def test_what_is_not_the_same_is_told(evaluations):
    a = evaluations("a", BEFORE)
    found = compared(a, evaluations("b", AFTER[:9], temperature=0.5))
    assert re.match("temperature differs: 1.0 in .*/a, 0.5 in .*/b$", found["notes"][0])
    assert found["notes"][1] == "own: 3 prompts are only in one of the two, and are left out"
    assert found["benchmarks"]["own"]["prompts"] == 9
    text = comparison_table(found)
    assert "note: own: 3 prompts" in text and "greedy: a ↓ b →  wrong  right" in text
    assert "pass@2" in text and "pass@4" in text
    assert "wrong → right  4: 'so None' → 'so None' ('4')" in text


def test_the_command_prints_one_object_and_a_table(evaluations, capsys):
    evaluations("runs/x/evaluation", BEFORE)
    evaluations("b", AFTER)
    assert main(["--compare", "runs/x", "b"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["a"], found["b"]) == ("models/runs/x/evaluation", "models/b")
    assert found["benchmarks"]["own"]["greedy"]["wrong to right"] == 5 and "b − a" in said.err


def test_what_cannot_be_compared_is_one_line(evaluations, capsys):
    evaluations("a", BEFORE)
    evaluations("others", [record(str(i), True, of(True, False), answer="5") for i in range(3)])
    evaluations("strangers", [record(f"x{i}", True, of(True, False)) for i in range(3)])
    evaluations("elsewhere", BEFORE)
    summary = json.loads(Path("elsewhere", SUMMARY).read_text())
    (evaluations("elsewhere", BEFORE) / SUMMARY).write_text(json.dumps(summary | {"benchmarks": {}}))
    for words, line in {
        ("a", "nothing"): "--compare: nothing has no evaluation (summary.json); first run: rlkd evaluate nothing",
        ("a", "others"): "--compare: own: expected the same prompt and answer under the id '0', got two; ",
        ("a", "strangers"): "--compare: own: expected prompts that both have, got none; ",
        ("a", "elsewhere"): "--compare: expected a benchmark that both have, got own in a and  in elsewhere; ",
        ("a", "a", "eval.samples=2"): "command line: --compare: expected no other arguments, got 'eval.samples=2'; ",
    }.items():
        assert main(["--compare", *words]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(line), said
