"""Mutated JSONL: a line is read like plain JSON, or gives a one-line error that names file and line."""

import json
import math

import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st

from rlkd.config.schema import DataConfig
from rlkd.data.chat import load_tokenizer
from rlkd.data.faults import DataError
from rlkd.data.jsonl import parse
from rlkd.data.sources import load_source

pytestmark = [pytest.mark.long, pytest.mark.timeout(3 * 3600)]

ROWS = [
    {"prompt": "reverse: abc", "answer": "cba", "id": "a", "level": 3},
    {"prompt": [{"role": "user", "content": "reverse: é"}], "answer": 12, "id": 7, "tree": {"a": [1, None, True]}},
    {"id": "b", "answer": '\\"\n\t\u2028\U0001f600', "prompt": "x" * 40, "weights": [0.5, -1e-3, 1e300]},
]
ODD = [
    *('"', "\\", "\\u", "\\ud800", "\\ude00", "\\ud83d\\ude00", "\\u0000", "{", "}", "[", "]", ",", ":", "NaN", "null"),
    *("Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9" * 5000, "[" * 3000, "true", "'", "\x00", "\t", "\x1c"),
    *(
        "\ufeff",
        "\u2028",
        "é",
        "\U0001f600",
        "//",
        "/* */",
        "0x1",
        "01",
        "+1",
        "1.",
        ".5",
        " ",
        '"prompt": "q", ',
        "{}",
    ),
]
HERE = "put a piece here"
values = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["", " ", "x" * 200])),
    st.lists(
        st.one_of(st.none(), st.text(max_size=3), st.fixed_dictionaries({"role": st.text(max_size=4)})), max_size=3
    ),
    st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=4)}), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 6), st.one_of(st.sampled_from(ODD), st.text(max_size=2)), st.booleans()),
    max_size=3,
)


@st.composite
def lines(draw) -> bytes:
    """A row with columns replaced or removed, written as JSON, then with pieces inserted or cut out."""
    row = dict(draw(st.sampled_from(ROWS)))
    for column in draw(st.lists(st.sampled_from([*row, "other"]), max_size=2)):
        deed = draw(st.sampled_from(["value", "piece", "remove"]))
        if deed == "value":
            row[column] = draw(values)
        elif deed == "piece":
            row[column] = HERE
        else:
            row.pop(column, None)
    text = json.dumps(row, ensure_ascii=draw(st.booleans())).replace(f'"{HERE}"', draw(st.sampled_from(ODD)))
    for where, gone, piece, put in draw(edits):
        at = int(where * len(text))
        text = text[:at] + (piece if put else "") + text[at + gone :]
    raw = text.replace("\n", " ").encode("utf-8", errors="surrogatepass")
    for where, byte in draw(st.lists(st.tuples(st.floats(0, 1), st.integers(128, 255)), max_size=1)):
        at = int(where * len(raw))
        raw = raw[:at] + (bytes([byte]) if draw(st.integers(0, 9)) == 0 else b"") + raw[at:]
    return raw


def is_finite(value) -> bool:
    if isinstance(value, dict | list):
        return all(map(is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


@cases(200, 5000)
@given(line=lines())
def test_a_line_is_read_like_plain_json(line):
    try:
        read = parse(line)
    except ValueError as error:
        assert type(error) is ValueError and str(error) == " ".join(str(error).splitlines()) and len(str(error)) < 400
        return
    assert read == json.loads(line.decode()) and is_finite(read)
    json.dumps(read, ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:student")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "data.jsonl"


@cases(200, 5000)
@given(
    written=st.lists(lines(), min_size=1, max_size=3),
    end=st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    start=st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
    id_column=st.sampled_from([None, "id"]),
    too_long=st.sampled_from(["skip", "error"]),
)
def test_a_file_is_its_rows_or_one_line(path, tokenizer, written, end, start, id_column, too_long):
    path.write_bytes(start + end.join(written))
    data = DataConfig(path=str(path), id_column=id_column, max_prompt_tokens=48, too_long=too_long)
    try:
        prompts = load_source(data, tokenizer)
    except DataError as error:
        for line in error.lines:
            assert line == " ".join(line.splitlines()) and line.startswith(f"{path}:") and len(line) < 700
        return
    rows = [json.loads(line) for line in written if line.strip()]
    assert len(prompts) + prompts.skipped == len(rows)
    by_id = {str(row["id"]) if id_column else str(i): row for i, row in enumerate(rows)}
    assert {prompt.id for prompt in prompts} <= by_id.keys()
    for prompt in prompts:
        row = by_id[prompt.id]
        assert prompt.answer == str(row["answer"])
        said = row["prompt"] if isinstance(row["prompt"], str) else [m["content"] for m in row["prompt"]]
        assert [m["content"] for m in prompt.messages] == ([said] if isinstance(said, str) else said)
        used = {"prompt", "answer", id_column}
        assert prompt.meta == {name: value for name, value in row.items() if name not in used}
