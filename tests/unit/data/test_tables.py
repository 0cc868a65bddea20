"""CSV and Parquet files are read as the same rows in JSONL are."""

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from lines import assert_lines

from rlkd.config.schema import DataConfig
from rlkd.data.chat import load_tokenizer
from rlkd.data.faults import DataError
from rlkd.data.sources import load_source, read_rows

TOK = load_tokenizer("builtin:student")
ROWS = [
    {"prompt": "reverse: abc", "answer": 7, "level": 1},
    {"prompt": 'a, "b"\nc', "answer": -12, "level": 2},
    {"prompt": "d", "answer": 10**17, "level": None},
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path, **changes):
    return list(read_rows(DataConfig(path=str(path), **changes)))


def faults(path, **changes):
    with pytest.raises(DataError) as caught:
        read(path, **changes)
    return [line.replace(str(path), "FILE") for line in caught.value.lines]


def test_a_parquet_file_is_the_same_data_as_its_rows_in_jsonl(tmp_path):
    """But for the nulls that a table has for fields which only other rows have."""

    def asked(row, extra):
        return row | {"prompt": [{"role": "user", "content": row["prompt"], "extra": extra}]}

    for rows, cleared in (
        (ROWS, ROWS),
        ([asked(row, {"a": "x", "b": None}) for row in ROWS], [asked(row, {"a": "x"}) for row in ROWS]),
    ):
        one = load_source(DataConfig(path=str(parquet(tmp_path / "data.parquet", rows))), TOK)
        two = load_source(DataConfig(path=str(jsonl(tmp_path / "data.jsonl", cleared))), TOK)
        assert list(one) == list(two) and one.identity == two.identity
        assert [prompt.answer for prompt in one] == ["7", "-12", str(10**17)]


def test_a_csv_file_is_the_same_data_as_its_texts_in_jsonl(tmp_path):
    texts = [{name: str(value) for name, value in row.items()} for row in ROWS]
    with open(tmp_path / "data.csv", "w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "answer", "level"])
        table.writeheader()
        table.writerows(texts)
    one, two = read(tmp_path / "data.csv"), read(jsonl(tmp_path / "data.jsonl", texts))
    assert [row.canonical() for row in one] == [row.canonical() for row in two]
    assert [row.where.rpartition(":")[2] for row in one] == ["2", "3", "5"], "the second prompt has two lines"


def test_what_looks_like_a_number_in_a_csv_file_stays_as_it_is_written(tmp_path):
    (tmp_path / "data.csv").write_text("prompt,answer,extra\na,007,1.50\nb,1e3,\n")
    first, second = read(tmp_path / "data.csv")
    assert (first.answer, first.meta, second.answer, second.meta) == ("007", {"extra": "1.50"}, "1e3", {"extra": ""})


def test_a_value_may_be_longer_than_python_s_limit(tmp_path):
    (tmp_path / "data.csv").write_text(f"prompt,answer\n{'a' * 200_000},b\n")
    assert len(read(tmp_path / "data.csv")[0].prompt) == 200_000


def test_every_fault_of_a_csv_file_has_its_line(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("prompt,answer\na,b,c\n\nd\n \t,e\nf,g\n")
    assert_lines(
        faults(path),
        ("FILE:2: ", 2, 3, "double quotes"),
        ("FILE:4: ", 2, 1),
        ("FILE:5: ", "'prompt'", "empty"),
    )
    assert_lines(faults(path, answer_column="gold", limit=1), ("FILE:2: ", 3))


@pytest.mark.parametrize(
    ("content", "start", "parts"),
    [
        (b"prompt,prompt\na,b\n", "FILE:1: ", ("'prompt'", "two columns")),
        (b'prompt,answer\n"a"b,c\n', "FILE:2: ", ("no CSV",)),
        (b"prompt,answer\na,\xff\xfe\n", "FILE: ", ("UTF-8",)),
        (b"", "FILE: ", ("empty",)),
        (b"prompt,answer\n", "FILE: ", ("empty",)),
    ],
)
def test_a_file_that_is_no_csv_is_one_line(tmp_path, content, start, parts):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    assert_lines(faults(path), (start, *parts))


def test_every_fault_of_a_parquet_file_has_its_row(tmp_path):
    rows = [{"prompt": "a", "answer": "b", "time": None}, {"prompt": "c", "answer": None, "time": b"x"}]
    found = faults(parquet(tmp_path / "data.parquet", rows))
    assert_lines(found, ("FILE row 1: ", "'answer'", "null"), ("FILE row 1: ", "'time'", "not JSON"))
    (tmp_path / "no.parquet").write_text("PAR")
    assert_lines(faults(tmp_path / "no.parquet"), ("FILE: cannot be read", "Parquet"))
    assert_lines(faults(tmp_path / "none.parquet"), ("FILE: cannot be read", "No such file"))
    assert_lines(faults(tmp_path / "none.csv"), ("FILE: cannot be read", "No such file"))


def test_a_folder_called_as_a_file_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data.parquet").mkdir()
    parquet(tmp_path / "data.parquet" / "part-0.parquet", ROWS)
    assert [row.answer for row in read(tmp_path / "data.parquet")] == ["7", "-12", str(10**17)]
