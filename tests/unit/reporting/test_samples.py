"""Which rollouts the report shows, and what of them."""

import itertools
import json

from report_runs import rollout, write_lines

from rlkd.reporting.samples import EACH, HEAD, ITERATIONS, TAIL, TEXT, newest_rollouts, samples


def dump(folder, iterations, count=64, ranks=1):
    for at in iterations:
        for rank in range(ranks):
            rows = [rollout(at, n, ["a", "b"], reward=n / count) for n in range(count)]
            write_lines(folder / f"{at:06d}-rank{rank}.jsonl", rows)


def test_a_run_is_shown_from_its_first_iteration_to_its_last(tmp_path):
    dump(tmp_path, range(1, 201))
    shown = samples(tmp_path)
    at = sorted({sample["iteration"] for sample in shown})
    assert len(at) == ITERATIONS and at[0] == 1 and at[-1] == 200 and len(shown) == ITERATIONS * EACH
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert max(gaps) - min(gaps) <= 1, "evenly spaced"


def test_a_million_is_after_999_999(tmp_path):
    dump(tmp_path, [999_999, 1_000_000])
    assert samples(tmp_path)[-1]["iteration"] == 1_000_000
    assert {line["iteration"] for line in newest_rollouts(tmp_path)} == {1_000_000}


def test_an_iteration_shows_its_worst_its_best_and_a_failure(tmp_path):
    rows = [rollout(1, n, ["a"], reward=0.5) for n in range(20)]
    rows[3]["reward"], rows[13]["reward"] = -2.0, 7.0
    rows[17] |= {"reward": None, "error": "ZeroDivisionError: division by zero"}
    write_lines(tmp_path / "000001-rank0.jsonl", rows)
    shown = samples(tmp_path)
    assert len(shown) == EACH and {-2.0, 7.0, None} <= {sample["reward"] for sample in shown}
    assert [sample["error"] for sample in shown if "error" in sample] == ["ZeroDivisionError: division by zero"]


def test_few_rollouts_are_all_shown_and_none_are_none(tmp_path):
    assert samples(tmp_path / "absent") == [] and newest_rollouts(tmp_path / "absent") == []
    (tmp_path / "000001-rank0.jsonl").write_text("")
    assert samples(tmp_path) == []
    dump(tmp_path, [2], count=3)
    assert [sample["id"] for sample in samples(tmp_path)] == ["train-0", "train-1", "train-2"]


def test_files_of_all_ranks_are_looked_at(tmp_path):
    for rank in range(2):
        for at in range(1, 5):
            write_lines(tmp_path / f"{at:06d}-rank{rank}.jsonl", [rollout(at, rank, ["a"])])
    assert {sample["id"] for sample in samples(tmp_path)} == {"train-0", "train-1"}


def test_tokens_have_their_texts_and_numbers(tmp_path):
    line = rollout(4, 1, ["a", "", "é", " <b>"], segments=[["teacher", 1, 3]], logprobs=[-0.123456, None, -2, -3])
    write_lines(tmp_path / "000004-rank0.jsonl", [line])
    (sample,) = samples(tmp_path)
    assert sample["tokens"] == ["a", "", "é", " <b>"] and sample["ids"] == [0, 1, 2, 3]
    assert sample["logp"] == [-0.1235, None, -2.0, -3.0] and sample["teacher"] == [-0.05, -0.25, -0.25, -0.45]
    assert sample["authors"] == ["student", "teacher", "teacher", "student"] and sample["cut"] == 0
    assert "gap" not in sample and "entropy" not in sample, "only what was recorded"


def test_a_long_text_keeps_its_start_and_its_end(tmp_path):
    tokens = [f"{t}," for t in range(5000)]
    line = rollout(1, 0, tokens, prompt="p" * 10 * TEXT)
    write_lines(tmp_path / "000001-rank0.jsonl", [line])
    (sample,) = samples(tmp_path)
    assert sample["tokens"] == tokens[:HEAD] + tokens[-TAIL:] and sample["cut"] == 5000 - HEAD - TAIL
    assert sample["length"] == 5000 and len(sample["logp"]) == len(sample["teacher"]) == HEAD + TAIL
    assert len(sample["prompt"]) < TEXT + 10


def test_a_file_of_an_older_version_shows_its_text(tmp_path):
    line = rollout(1, 0, ["a", "b"])
    del line["token_ends"]
    write_lines(tmp_path / "000001-rank0.jsonl", [line])
    (sample,) = samples(tmp_path)
    assert sample["text"] == "ab" and "tokens" not in sample


def test_a_large_file_is_not_read_as_a_whole(tmp_path):
    """Evenly spaced lines are found by their place in the file."""
    rows = [rollout(1, n, ["a"] * 50, reward=0.0) for n in range(3000)]
    write_lines(tmp_path / "000001-rank0.jsonl", rows)
    numbers = [int(sample["id"].removeprefix("train-")) for sample in samples(tmp_path)]
    assert numbers[0] == 0 and numbers[-1] > 2900 and len(set(numbers)) == EACH
    assert len(json.dumps(newest_rollouts(tmp_path, 12))) < len(json.dumps(rows)) / 100
