"""Sources, chat templates, vocabularies, and the order of prompts."""

import collections
import json
import re
from pathlib import Path

import datasets
import pytest
from builders import encode_prompt
from lines import assert_lines, one_line
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlkd.config.schema import DataConfig
from rlkd.data.chat import first_difference, load_tokenizer
from rlkd.data.faults import DataError
from rlkd.data.prompts import PromptStream
from rlkd.data.sources import load_source, read_rows
from rlkd.types import Prompt

LETTERS = [chr(c) for c in range(32, 127)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(
    template: str | None = TEMPLATE, extra: list[str] | None = None, ends: str = ""
) -> PreTrainedTokenizerFast:
    """One token per ASCII letter; writes <s> before a text, and `ends` after it."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {ends}".strip(), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    if extra:
        tokenizer.add_tokens(extra)
    return tokenizer


def problems(data):
    """The error of reading without a tokenizer, one line or none."""
    try:
        list(read_rows(data))
    except ValueError as error:
        return [str(error)]
    return []


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def config(path: Path | str, **changes) -> DataConfig:
    return DataConfig(path=str(path), **changes)


def write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------- chat


def test_template_ids_have_one_bos_and_end_with_the_generation_prompt(tokenizer):
    messages, ids = encode_prompt(tokenizer, "hi", "be brief")
    assert messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"})
    assert tokenizer.decode(ids).replace(" ", "") == "<s>[system]bebrief[user]hi[assistant]"
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert encode_prompt(tokenizer, messages) == (messages, ids)


@pytest.mark.parametrize("text", ["hi", "<s>hi"])
@pytest.mark.parametrize("ends", ["", "</s>"])
def test_plain_text_has_one_bos_and_no_end_of_sequence(text, ends):
    """`<s>hi`, as in data that is already rendered (data.special_tokens: tokens)."""
    tokenizer = make_tokenizer(template=None, ends=ends)
    messages, ids = encode_prompt(tokenizer, text, chat_template=False, spelled_tokens=True)
    assert ids == (1, *tokenizer.convert_tokens_to_ids(["h", "i"]))
    assert messages == ({"role": "user", "content": text},)


def test_no_bos_where_the_tokenizer_writes_none():
    tokenizer = make_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert encode_prompt(tokenizer, "hi", chat_template=False)[1] == tuple(tokenizer.convert_tokens_to_ids(["h", "i"]))


def test_a_missing_chat_template_names_the_key():
    with pytest.raises(ValueError, match="no chat template.*data.chat_template: false"):
        encode_prompt(make_tokenizer(template=None), "hi")


def test_what_cannot_be_combined(tokenizer):
    message = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="needs data.chat_template: true"):
        encode_prompt(tokenizer, message, chat_template=False)
    with pytest.raises(ValueError, match="needs data.chat_template: true"):
        encode_prompt(tokenizer, "hi", "be brief", chat_template=False)
    with pytest.raises(ValueError, match="data.system is for text prompts"):
        encode_prompt(tokenizer, message, "be brief")
    picky = make_tokenizer(template="{{ raise_exception('no system role here') }}")
    with pytest.raises(ValueError, match="no system role here"):
        encode_prompt(picky, "hi", "be brief")


def test_vocabularies_differ_by_the_first_id_that_does():
    a, b = make_tokenizer(), make_tokenizer(template=None)
    assert first_difference(a, b) is None
    longer = make_tokenizer(extra=["<think>"])
    assert re.search(one_line(98, "'<think>'"), first_difference(a, longer))
    other = first_difference(longer, make_tokenizer(extra=["<reason>"]))
    assert re.search(one_line(98, re.compile("'<think>'.*'<reason>'")), other)


def test_load_tokenizer_from_a_folder_and_from_nowhere(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert first_difference(loaded, tokenizer) is None
    assert encode_prompt(loaded, "hi") == encode_prompt(tokenizer, "hi")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer in .*empty") as caught:
        load_tokenizer(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- sources


def test_jsonl_columns_become_fields_and_the_rest_is_meta(tokenizer, tmp_path):
    path = write(
        tmp_path / "data.jsonl",
        {"question": "1+1", "gold": 2, "solution": "count", "name": "a", "level": 3},
        "",
        {"question": [{"role": "user", "content": "2+2"}], "gold": "4", "solution": "", "name": "b", "level": None},
    )
    data = config(path, prompt_column="question", answer_column="gold", privileged_column="solution", id_column="name")
    first, second = load_source(data, tokenizer)
    assert (first.id, first.answer, first.privileged, first.meta) == ("a", "2", "count", {"level": 3})
    assert (second.id, second.messages) == ("b", ({"role": "user", "content": "2+2"},))
    assert second.token_ids == encode_prompt(tokenizer, "2+2")[1]


def test_defaults_limit_and_another_path(tokenizer, tmp_path):
    path = write(tmp_path / "data.jsonl", *({"prompt": f"p{i}", "answer": "x"} for i in range(5)))
    other = write(tmp_path / "other.jsonl", {"prompt": "o", "answer": "x"})
    assert [p.id for p in load_source(config(path, limit=3), tokenizer)] == ["0", "1", "2"]
    assert len(load_source(config(path), tokenizer, path=str(other))) == 1


GOOD = {"prompt": "p", "answer": "a", "id": "same"}


@pytest.mark.parametrize(
    ("rows", "changes", "parts"),
    [
        (
            [GOOD, '{"prompt": '],
            {},
            ("data.jsonl:2: column 12: ", "expected one JSON object per line", "expecting value"),
        ),
        ([GOOD, "[1]"], {}, ("data.jsonl:2: column 1: ", "a JSON list", "object")),
        ([{"question": "p", "answer": "a"}], {}, (":1: ", "'prompt'", "data.prompt_column", "question")),
        ([{"prompt": "p", "gold": "a"}], {}, ("'answer'", "data.answer_column", "prompt, gold")),
        ([GOOD], {"privileged_column": "solution"}, ("'solution'", "data.privileged_column")),
        ([GOOD, {**GOOD, "answer": None}], {}, ("data.jsonl:2: ", "'answer'", "null")),
        ([{**GOOD, "answer": 0.5}], {}, ("float '0.5'", '"0.5"')),
        ([{**GOOD, "answer": True}], {}, ("bool 'True'",)),
        ([{**GOOD, "prompt": 7}], {}, ("'prompt'", "int '7'", "messages")),
        ([{**GOOD, "prompt": "  "}], {}, ("'prompt'", "empty")),
        ([{**GOOD, "prompt": []}], {}, ("'prompt'", "empty")),
        ([{**GOOD, "prompt": [{"role": "user"}]}], {}, ("'role'", "'content'")),
        ([{**GOOD, "prompt": [{"role": "user", "content": " "}]}], {}, ("got only empty ones",)),
        (
            [{"a\nb" * 99: 1}],
            {"answer_column": None},
            ("'prompt'", "data.prompt_column", re.compile(" a ba b.{180,220}…$")),
        ),
        ([GOOD, GOOD], {"id_column": "id"}, ("data.jsonl:2: ", "'same'", "data.jsonl:1")),
        ([], {}, ("data set", "empty")),
    ],
)
def test_each_fault_is_one_line_with_its_place(tokenizer, tmp_path, rows, changes, parts):
    data = config(write(tmp_path / "data.jsonl", *rows), **changes)
    with pytest.raises(ValueError, match=one_line(*parts)) as caught:
        load_source(data, tokenizer)
    assert problems(data) == [str(caught.value)], "preflight must say the same without a tokenizer"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"prompt": "p" "answer": "a"}', ("column 16: ", "expecting ',' delimiter", '\'"answer": "a"}\'')),
        ('{"prompt": "p"} {"prompt": "q"}', ("column 17: ", "second value", '\'{"prompt": "q"}\'')),
        ("{", ("column 2: ", "expecting property name enclosed in double quotes")),
        ("not json", ("column 1: ", "expecting value", "'not json'")),
        ("null", ("column 1: ", "null", "object")),
        ("17", ("column 1: ", 17, "object")),
        ('{"prompt": "a\x00b"}', ("column 14: ", "invalid control character", r"\x00b")),
        ("\x00\x00", ("column 1: ", "expecting value")),
        ('{"prompt": NaN}', ("NaN", "null")),
        ('{"prompt": "p", "level": -Infinity}', ("-Infinity",)),
        ('{"prompt": "p", "level": 1e999}', ("1e999", "64-bit")),
        ('{"prompt": ' + "7" * 5000 + "}", ("integer", 5000)),
        ('{"prompt": "p", "prompt": "q"}', ("'prompt'", "twice")),
        ('{"prompt": "p\\ud83d", "answer": ""}', ("column 14: ", r"\ud83d", "surrogate")),
        ('{"prompt": "\\ude00\\ud83d"}', ("column 13: ", r"\ude00", "surrogate")),
        ('{"\\ud83d\\ud83d\\ude00": 1}', ("column 3: ", r"\ud83d", "surrogate")),
        ("[" * 100_000, ("more than 100",)),
        ('{"prompt": "p", "tree": ' + "[" * 100 + "]" * 100 + "}", ("more than 100",)),
        ("\ufeff{}", ("column 1: ", "byte order mark")),
    ],
)
def test_a_broken_line_says_where_what_and_what_to_do(tmp_path, line, parts):
    path = write(tmp_path / "data.jsonl", GOOD, line)
    (problem,) = problems(config(path))
    assert problem.startswith(f"{path}:2: ") and re.search(one_line(*parts), problem)
    assert len(problem) < len(str(path)) + 200


def test_what_looks_odd_but_is_right_is_read_as_it_stands(tmp_path):
    """A byte order mark at the start, CRLF, blank lines, a pair of escapes, an escaped backslash, a deep tree."""
    prompts = ["p", "\U0001f600", "\\ud83d", "\x00"]
    deep = "[" * 98 + "]" * 98
    lines = [json.dumps({"prompt": p, "answer": "a"})[:-1] + f', "tree": {deep}}}\r\n' for p in prompts]
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n \t\n".join(lines).encode())
    rows = list(read_rows(config(tmp_path / "data.jsonl")))
    assert [row.prompt for row in rows] == prompts
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "4", "7", "10"]
    assert all(row.meta == {"tree": json.loads(deep)} for row in rows)


def test_a_line_of_ten_megabytes(tokenizer, tmp_path):
    text = "x" * 10_000_000
    path = write(tmp_path / "data.jsonl", {"prompt": "p", "answer": "a", "note": text})
    (row,) = read_rows(config(path))
    assert row.meta["note"] == text
    write(path, {"prompt": "p", "answer": "a", "id": text}, {"prompt": "p", "answer": "a", "id": text})
    (problem,) = problems(config(path, id_column="id"))
    assert ":2: id " in problem and ":1" in problem and len(problem) < 500
    write(path, '{"prompt": "' + text)
    (problem,) = problems(config(path))
    assert re.search(one_line(":1: column 12: ", "unterminated string", "'\"xxx"), problem) and len(problem) < 500


def test_a_prompt_without_tokens_is_told_with_its_row(tmp_path):
    tokenizer = make_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("é", "")
    path = write(tmp_path / "data.jsonl", {"prompt": "é", "answer": "a"})
    with pytest.raises(ValueError, match=one_line("data.jsonl:1: ", "'0'", "no tokens")):
        load_source(config(path, chat_template=False), tokenizer)


def test_a_line_that_is_not_utf8(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    assert re.search(
        one_line("data.jsonl:1: byte 13: ", "UTF-8", r"b'\xff"), problems(config(tmp_path / "data.jsonl"))[0]
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.jsonl", "No such file"),
        ("folder.jsonl", "Is a directory"),
        ("a" * 300 + ".jsonl", "File name too long"),
        ("a" * 300, "File name too long"),
        ("", "empty path"),
        ("broken_folder", "JSON parse error: Invalid value"),
        ("table.csv", "empty"),
        ("table.tsv", ".jsonl, .csv, .parquet"),
        ("empty_folder", "data set"),
        ("builtin:sort", "builtin:reverse"),
    ],
)
def test_paths_that_are_no_data(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_text("prompt,answer\n")
    Path("table.tsv").write_text("prompt\tanswer\n")
    Path("empty_folder").mkdir()
    Path("folder.jsonl").mkdir()
    Path("broken_folder").mkdir()
    write(Path("broken_folder/train.jsonl"), GOOD, '{"prompt":')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (problem,) = problems(config(path))
    assert message in problem and path in problem and "\n" not in problem


def test_long_prompts_are_an_error_or_are_counted(tokenizer, tmp_path):
    path = write(tmp_path / "data.jsonl", {"prompt": "p", "answer": "a"}, {"prompt": "p" * 50, "answer": "a"})
    length = len(encode_prompt(tokenizer, "p" * 50)[1])
    with pytest.raises(ValueError, match=one_line("data.jsonl:2: ", "'1'", length, length - 1)):
        load_source(config(path, max_prompt_tokens=length - 1), tokenizer)
    assert len(load_source(config(path, max_prompt_tokens=length), tokenizer)) == 2
    kept = load_source(config(path, max_prompt_tokens=length - 1, too_long="skip"), tokenizer)
    assert ([p.id for p in kept], kept.skipped) == (["0"], 1)
    with pytest.raises(ValueError, match=one_line(2, "longer")):
        load_source(config(path, max_prompt_tokens=1, too_long="skip"), tokenizer)


def test_long_completions_are_an_error_or_are_counted(tokenizer, tmp_path):
    rows = [{"prompt": "p", "answer": "a", "good": "x" * n, "bad": "y" * m} for n, m in ((3, 3), (9, 3), (3, 9))]
    path = write(tmp_path / "data.jsonl", *rows)
    columns = {"completion_column": "good", "rejected_column": "bad", "max_completion_tokens": 4}  # an end is one more
    with pytest.raises(DataError) as caught:
        load_source(config(path, **columns), tokenizer)
    bound = (10, "data.max_completion_tokens", 4, "data.too_long: skip")
    places = (f"{path}:2: ", "completion", "'1'", *bound), (f"{path}:3: ", "rejected", "'2'", *bound)
    assert_lines(caught.value.lines, *places)
    kept = load_source(config(path, too_long="skip", **columns), tokenizer)
    assert ([p.id for p in kept], kept.skipped) == (["0"], 2)


def test_a_missing_chat_template_is_told_with_the_row(tmp_path):
    path = write(tmp_path / "data.jsonl", GOOD)
    with pytest.raises(ValueError, match="data.jsonl:1: .*data.chat_template: false"):
        load_source(config(path), make_tokenizer(template=None))


@pytest.mark.parametrize("kind", ["saved", "saved splits", "folder of files"])
def test_hugging_face_data_sets(tokenizer, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"prompt": ["p0", "p1"], "answer": ["a0", "a1"], "level": [1, 2]}
    table = datasets.Dataset.from_dict(rows)
    folder = tmp_path / "data"
    if kind == "saved":
        table.save_to_disk(folder)
    elif kind == "saved splits":
        datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(folder)
    else:
        folder.mkdir()
        write(folder / "train.jsonl", *table)
    first, second = load_source(config(folder), tokenizer)
    assert (first.id, first.answer, first.meta) == ("0", "a0", {"level": 1})
    assert second.token_ids == encode_prompt(tokenizer, "p1")[1]
    (problem,) = problems(config(folder, prompt_column="question"))
    assert re.search(one_line("row 0: ", "'question'", "prompt, answer, level"), problem)
    if kind != "saved":
        (problem,) = problems(config(folder, split="nosuch"))
        assert "nosuch" in problem and "train" in problem and "\n" not in problem


def test_a_column_that_rewards_could_not_be_sent(tmp_path):
    import datetime

    table = datasets.Dataset.from_dict({"prompt": ["p"], "answer": ["a"], "day": [datetime.datetime(2020, 1, 1)]})
    table.save_to_disk(tmp_path / "data")
    assert re.search(one_line("'day'", "JSON"), problems(config(tmp_path / "data"))[0])


def test_the_builtin_task_has_its_own_columns_and_splits():
    tokenizer = make_tokenizer(template=None)
    data = config("builtin:reverse", chat_template=False, answer_column="nosuch")
    train = load_source(data, tokenizer)
    heldout = load_source(data.model_copy(update={"split": "heldout"}), tokenizer)
    assert {p.id for p in train}.isdisjoint(p.id for p in heldout)
    for prompt in heldout:
        word = prompt.messages[0]["content"].removeprefix("reverse: ")
        assert prompt.answer == prompt.privileged == word[::-1]
    assert "nosuch" in problems(config("builtin:reverse", split="nosuch"))[0]


# ---------------------------------------------------------------- order


def prompts(n: int) -> list[Prompt]:
    return [Prompt(id=str(i), messages=(), token_ids=(1,)) for i in range(n)]


def ids(taken: list[Prompt]) -> list[str]:
    return [p.id for p in taken]


def test_an_epoch_has_each_prompt_once_and_the_rest_waits():
    stream = PromptStream(prompts(10), seed=3)
    epochs = [[i for k in range(3) for i in ids(stream.take(3 * e + k, 3))] for e in range(40)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 40, "each epoch has an order of its own"
    seen = collections.Counter(i for epoch in epochs for i in epoch)
    assert len(seen) == 10 and min(seen.values()) >= 30, "the prompts left out change with the epoch"


def test_the_order_is_a_function_of_the_seed_and_the_iteration():
    straight = [ids(PromptStream(prompts(10), seed=3).take(i, 4)) for i in range(8)]
    backwards = PromptStream(prompts(10), seed=3)
    assert [ids(backwards.take(i, 4)) for i in reversed(range(8))] == straight[::-1]
    assert [ids(PromptStream(prompts(10), seed=4).take(i, 4)) for i in range(8)] != straight
    # Pinned: the order must not change with a new version of numpy.
    assert straight[0] == ["6", "1", "8", "5"]


def test_ranks_take_contiguous_shares_of_the_same_iteration():
    stream = PromptStream(prompts(11), seed=0)
    for iteration in range(5):
        whole = ids(stream.take(iteration, 6))
        assert [i for rank in range(3) for i in ids(stream.take(iteration, 6, rank, 3))] == whole


def test_blocks_of_an_iteration_are_the_next_prompts_and_all_different():
    stream = PromptStream(prompts(14), seed=0)
    for iteration in range(6):
        owned = [ids(stream.take(iteration, 4, block=b, blocks=3)) for b in range(3)]
        assert len({i for block in owned for i in block}) == 12
        for b in range(3):
            shares = [ids(stream.take(iteration, 4, rank, 2, block=b, blocks=3)) for rank in range(2)]
            assert shares[0] + shares[1] == owned[b]
    whole = PromptStream(prompts(24), seed=0)  # two iterations an epoch
    in_blocks = [ids(whole.take(i, 4, block=b, blocks=3)) for i in range(4) for b in range(3)]
    assert in_blocks == [ids(whole.take(i, 4)) for i in range(12)]


def test_impossible_counts_name_the_key():
    stream = PromptStream(prompts(5), seed=0)
    with pytest.raises(ValueError, match=one_line("rollout.prompts", 6, 5)):
        stream.take(0, 6)
    with pytest.raises(ValueError, match=one_line("rollout.prompts", 5, 2, "ranks")):
        stream.take(0, 5, rank=0, world=2)
    with pytest.raises(ValueError, match=one_line("rollout.prompts", 2, "algorithm.resample_rounds", 3, 5)):
        stream.take(0, 2, blocks=3)
