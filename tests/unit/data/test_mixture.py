"""Training data from several files: each has its share of every iteration."""

import collections
import json

import pytest
from builders import config
from lines import assert_lines, one_line

from rlkd.config_file import ConfigError, load
from rlkd.data.chat import load_tokenizer
from rlkd.data.faults import DataError
from rlkd.data.mixture import identity, load_training_data
from rlkd.data.prompts import MixedStream, PromptStream
from rlkd.planning.preflight import check
from rlkd.types import Prompt

TOK = load_tokenizer("builtin:student")


def prompts(name, count):
    return [Prompt(id=f"{name}{i}", messages=(), token_ids=(1,)) for i in range(count)]


def mixed(sizes=(30, 20, 10), shares=(0.5, 0.3, 0.2), seed=1):
    return MixedStream([prompts("abc"[i], n) for i, n in enumerate(sizes)], shares, "abc", seed)


def ids(found):
    return [prompt.id for prompt in found]


def file(path, count, prefix="x"):
    rows = [{"prompt": f"reverse: {prefix}{chr(97 + i // 26)}{chr(97 + i % 26)}", "answer": "b"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_source_has_its_share_of_every_iteration():
    for iteration in range(20):
        drawn = ids(mixed().take(iteration, 10))
        assert collections.Counter(name[0] for name in drawn) == {"a": 5, "b": 3, "c": 2} and len(set(drawn)) == 10
    assert mixed(shares=(0.4, 0.35, 0.25)).counts(10) == [4, 4, 2]
    assert [sum(mixed(shares=(1 / 3, 1 / 3, 1 / 3)).counts(n)) for n in range(9)] == list(range(9))


def test_each_source_has_epochs_of_its_own():
    drawn = [name for iteration in range(5) for name in ids(mixed().take(iteration, 10))]
    assert sorted(name for name in drawn if name[0] == "c") == sorted(ids(prompts("c", 10)))
    alone = PromptStream(prompts("b", 20), 1)
    for iteration in range(12):
        assert {n for n in ids(mixed().take(iteration, 10)) if n[0] == "b"} == set(ids(alone.take(iteration, 3)))


def test_the_order_is_a_function_of_the_seed_and_is_cut_into_ranks_and_blocks():
    straight = [ids(mixed().take(i, 10)) for i in range(8)]
    stream = mixed()
    assert [ids(stream.take(i, 10)) for i in reversed(range(8))] == straight[::-1]
    assert [ids(mixed(seed=2).take(i, 10)) for i in range(8)] != straight
    for i in range(8):
        assert [n for rank in range(5) for n in ids(stream.take(i, 10, rank, 5))] == straight[i]
    blocks = [name for block in range(2) for name in ids(stream.take(3, 10, block=block, blocks=2))]
    assert len(set(blocks)) == 20
    assert any(row[0][0] != "a" for row in straight), "the first rank does not have the first source only"


def test_files_are_mixed_with_ids_of_their_own(tmp_path):
    one, two = file(tmp_path / "one.jsonl", 6), file(tmp_path / "two.jsonl", 5, "y")
    settings = config(f"data.path={one}", f"data.mix={{{two}: 0.25}}", "rollout.prompts=4")
    data = load_training_data(settings.data, TOK)
    assert len({prompt.id for prompt in data.prompts}) == 11 and data.prompts[6].id == f"{two}:0"
    drawn = data.stream(0).take(0, 4)
    assert sum(prompt.id.startswith(str(two)) for prompt in drawn) == 1
    assert data.identity == identity(settings.data) and data.identity.rows == 11
    alone = config(f"data.path={one}").data
    assert identity(alone) == load_training_data(alone, TOK).identity != data.identity
    file(two, 5, "z")
    assert identity(settings.data) != data.identity
    assert [line for line in check(settings) if line.startswith("data.")] == []


def test_mistakes_are_one_line_each(tmp_path):
    one, two = file(tmp_path / "one.jsonl", 30), file(tmp_path / "two.jsonl", 2)

    def problems(share, *more):
        settings = config(f"data.path={one}", f"data.mix={{{two}: {share}}}", "rollout.prompts=8", *more)
        return [line for line in check(settings) if line.startswith("data.")]

    assert_lines(problems(0.01), ("data.path: data.mix: ", str(two), "rollout.prompts", 8))
    assert_lines(problems(0.5), ("data.path: data.mix: ", str(two), 4, 2))
    for shares in ("1.0", "0.6, c.jsonl: 0.5", "0"):
        with pytest.raises(ConfigError, match=one_line("data.mix")):
            load(["configs/quickstart.yaml"], [f"data.mix={{b.jsonl: {shares}}}"])
    two.write_text("{")
    with pytest.raises(DataError) as caught:
        load_training_data(config(f"data.path={tmp_path}/none.jsonl", f"data.mix={{{two}: 0.5}}").data, TOK)
    assert_lines(caught.value.lines, (f"{tmp_path}/none.jsonl: cannot be read",), (f"{two}:1: ",))
