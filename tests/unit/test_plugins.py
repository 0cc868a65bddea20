"""Rewards and data sources from outside the package, named by module:Name or by an installed package."""

import os
import sys
from pathlib import Path

import pytest
from lines import one_line
from packages import install

from rlkd.config.schema import DataConfig
from rlkd.data.sources import identity, read_rows
from rlkd.plugins import REWARD, installed
from rlkd.rewards.registry import resolve

SOURCE = """
class Words:
    def __init__(self, split):
        self.words = {"train": ["ab", "cde"], "test": ["f"]}[split]

    def __iter__(self):
        return ({"prompt": word, "answer": word[::-1], "level": len(word)} for word in self.words)

def three_then(split):
    yield from ({"prompt": word} for word in "abc")
    yield "d"
    raise RuntimeError("the disk is\\nfull")
"""


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder of installed packages, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def rows(path: str, **changes) -> list[tuple[str, str | None]]:
    data = DataConfig(path=path, **({"answer_column": "answer"} | changes))
    return [(row.prompt, row.answer) for row in read_rows(data)]


def test_an_installed_reward_is_found_by_its_name_when_it_is_asked_for(site):
    install(
        site, "plg-half", {"rlkd.rewards": {"half": "plg_half.parts : half [extra]"}}, "def half(c, **_): return 0.5"
    )
    assert installed(REWARD) == ["half"] and "plg_half" not in sys.modules
    assert resolve("half")("", answer=None, prompt="", meta={}) == 0.5
    with pytest.raises(ValueError, match=one_line("'hallf'", "did you mean half?", "math", "module:function")):
        resolve("hallf")


@pytest.mark.parametrize(
    ("value", "source", "parts"),
    [
        (
            "{module}:half",
            "import nothing_like_it",
            ("importing", "ModuleNotFoundError: No module named 'nothing_like"),
        ),
        ("{module}:half", "x = 1 / 0", ("ZeroDivisionError", "__init__.py:1")),
        ("{module}:half", "def hallf(c): return 1", ("no function half", "did you mean hallf?")),
        ("{module}", "def half(c): return 1", ("expected module:function",)),
        ("{module}_gone:half", "", ("No module named",)),
    ],
)
def test_a_broken_package_is_one_line_that_names_it(site, request, value, source, parts):
    name = f"plg-broken-{request.node.callspec.indices['value']}"
    value = value.format(module=name.replace("-", "_"))
    install(site, name, {"rlkd.rewards": {"half": value}}, source, version="1.2")
    with pytest.raises(ValueError, match=one_line("'half'", f"package {name} 1.2", *parts)):
        resolve("half")


def test_two_packages_with_the_same_name_are_one_line_and_built_in_names_stay(site):
    for name in ("plg-one", "plg-two"):
        install(site, name, {"rlkd.rewards": {"half": "x:y", "exact_match": "x:y"}}, "")
    with pytest.raises(ValueError, match=one_line("plg-one 1.0", "plg-two 1.0", "module:function")):
        resolve("half")
    assert resolve("exact_match").__module__ == "rlkd.rewards.exact_match"


def test_a_data_source_of_ones_own_is_read_with_the_split(site):
    (site / "plg_words.py").write_text(SOURCE)
    install(site, "plg-words-package", {"rlkd.data_sources": {"words": "plg_words:Words"}}, "")
    for path in ("plg_words:Words", "words"):
        assert rows(path) == [("ab", "ba"), ("cde", "edc")]
        assert rows(path, split="test") == [("f", "f")]
        assert rows(path, limit=1) == [("ab", "ba")]
    (row,) = read_rows(DataConfig(path="words", split="test"))
    assert row.meta == {"level": 1} and row.id == "0"
    same, other = (identity(DataConfig(path="words", split=split)) for split in ("train", "test"))
    (site / "words.jsonl").write_text(
        '{"prompt": "ab", "answer": "ba", "level": 2}\n{"prompt": "cde", "answer": "edc", "level": 3}'
    )
    assert same == identity(DataConfig(path="words.jsonl")) != other


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("plg_nowhere:Words", ("plg_nowhere:Words: importing plg_nowhere raised", "PYTHONPATH")),
        ("plg_wrong:Word", ("no class or function Word (did you mean Words?)",)),
        ("plg_wrong:Words", ("split 'dev'", "after 0 rows", "KeyError: 'dev'", "plg_wrong.py:4")),
        ("plg_wrong:", ("expected module:Class", "my_data")),
    ],
)
def test_what_is_wrong_with_a_data_source_is_one_line(site, path, parts):
    (site / "plg_wrong.py").write_text(SOURCE)
    with pytest.raises(ValueError, match=one_line(*parts)):
        rows(path, split="dev")


def test_rows_before_an_error_and_rows_that_are_no_dicts_are_reported(site):
    (site / "plg_late.py").write_text(SOURCE)
    with pytest.raises(ValueError) as caught:
        rows("plg_late:three_then", answer_column=None)
    assert caught.value.lines == [
        "plg_late:three_then[train] row 3: expected a dict of columns, got str 'd'",
        "plg_late:three_then: with split 'train', after 4 rows it raised RuntimeError: the disk is full at "
        f"{os.path.join(site, 'plg_late.py')}:12",
    ]
