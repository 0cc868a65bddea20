"""Mutated shipped configs: each gives stages with the written values, or error lines."""

import copy
import functools
import time
from pathlib import Path

import pytest
import yaml
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from runs import config_files
from trees import at, walk

from rlkd.algorithms.registry import ALGORITHMS
from rlkd.config.help import Schema
from rlkd.config_file import ConfigError, load, load_stages
from rlkd.train import main

pytestmark = [pytest.mark.long, pytest.mark.timeout(3 * 3600)]

CONFIGS = sorted(Path(__file__).parents[3].joinpath("configs").glob("*.yaml"))
GIVEN = {"model.path": "builtin:student", "data.path": "builtin:reverse", "teacher.path": "builtin:teacher"}
LONGEST_S = 20.0
"""Limit in seconds. One load takes 0.1 s; a busy machine may take ten times as long."""

KEYS = sorted({".".join(key) for key in Schema({name: m.Options for name, m in ALGORITHMS.items()}).all_keys()})

WORDS = [
    *("null", "~", "true", "on", "off", "no", "???", "0", "-1", "1", "1e-6", "1e999", "-.inf", ".nan", "1_0", "1__0"),
    *("0x10", "010", "9" * 30, "9" * 5000, "1.5", "{}", "[]", "[1, 2]", "[[0], [1]]", "{kind: step}", "{a: {b: 1}}"),
    *("{kind: linear, start: 1, end: 0, over: 5}", "${run.name}", "${model}", "${oc.env:HOME}", "${oc.env:NO_SUCH}"),
    *("${oc.decode:${run.seed}}", "${", "$", "\\${x}", "${.}", "${oc.create:{a: 1}}", "${run}", "'", '"', "'x'", "é"),
    *(
        "\ud800",
        "\x00",
        "\x85",
        "\u2028",
        "\U0001f600",
        "x" * 5000,
        "[" * 3000,
        "../..",
        "a/b",
        "grpo",
        "kdrl",
        "served",
        "hf",
    ),
    *("builtin:student", "http://h:1", "&a x", "*a", "!!int 3", "!!python/object:os.system x", "<<: *a", "- x", "# x"),
]
PIECES = [
    *("{", "}", "[", "]", ":", ": ", "\n", "\n  ", "\n\n", "- ", "? ", "| ", "> ", "'", '"', "${", "&a ", "*a", "!x "),
    *(
        "#",
        ",",
        "\t",
        "\r",
        "\x00",
        "\x07",
        "\ufeff",
        "---\n",
        "...\n",
        "%YAML 9\n",
        "<<: ",
        "a: b\n",
        "  ",
        "[" * 3000,
    ),
    *("&a [*a]", "stages: {a: {}, b: {}}\n", "run: {}\n", "algorithm: grpo\n"),
]
ODD = [
    *(None, True, False, 0, -1, 1, 10**30, 0.5, 1e-300, float("inf"), float("nan"), "", " ", "x", "off", "1", "1e-3"),
    *([], {}, [[]], [1, "a"], {"a": 1}, {"kind": "step"}, {"kind": "linear", "start": 1, "end": 0, "over": 5}, "???"),
    *("${run.name}", "${oc.env:NO_SUCH}", "${", "é\u2028", "\x00", [None], {"name": "grpo"}, {"": ""}, {"a.b": 1}),
]


@functools.cache
def command(config: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the files before it, the keys that must be given) in the command of a config's header."""
    before = config_files(config)[:-1]
    try:
        load_stages([*before, str(config)], [])
    except ConfigError as error:
        lines = " ".join(error.lines)
        return tuple(before), tuple(f"{key}={value}" for key, value in GIVEN.items() if f"{key}: is ???" in lines)
    return tuple(before), ()


def filled(config: Path) -> str:
    """A config's text with a value for each ???, so that no override hides the effect of a mutation."""
    return config.read_text(encoding="utf-8").replace("???", "builtin:student")


@st.composite
def structures(draw) -> tuple[Path, str]:
    """A config, and its text with keys removed, renamed or moved and values replaced; it is still YAML."""
    config = draw(st.sampled_from(CONFIGS))
    tree = yaml.safe_load(filled(config))
    for _ in range(draw(st.integers(1, 3))):
        places = [path for path, _ in walk(tree) if path]
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        parent = at(tree, above)
        deed = draw(st.sampled_from(["replace", "replace", "remove", "rename", "move", "wrap"]))
        if deed == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif deed == "remove":
            del parent[key]
        elif deed == "wrap":
            parent[key] = draw(st.sampled_from([[parent[key]], {"value": parent[key]}, {key: parent[key]}]))
        elif isinstance(parent, dict):
            other = draw(
                st.one_of(
                    st.sampled_from(sorted({p[-1] for p in places if isinstance(p[-1], str)})), st.text(max_size=4)
                )
            )
            target = (
                parent if deed == "rename" else draw(st.sampled_from([v for _, v in walk(tree) if isinstance(v, dict)]))
            )
            target[str(other)] = copy.deepcopy(parent[key]) if deed == "move" else parent.pop(key)
    return config, yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


@st.composite
def texts(draw) -> tuple[Path, bytes]:
    """A config, and its text with syntax inserted and lines removed, repeated, swapped or indented."""
    config = draw(st.sampled_from(CONFIGS))
    text = filled(config)
    for _ in range(draw(st.integers(1, 4))):
        deed = draw(st.sampled_from(["put", "put", "word", "cut", "double", "indent", "swap", "end"]))
        lines = text.splitlines(keepends=True) or ["\n"]
        row = draw(st.integers(0, len(lines) - 1))
        if deed == "put":
            start = draw(st.integers(0, len(text)))
            text = text[:start] + draw(st.sampled_from(PIECES)) + text[start + draw(st.integers(0, 8)) :]
            continue
        if deed == "word":
            lines[row] = lines[row].split(":")[0] + ": " + draw(st.sampled_from(WORDS)) + "\n"
        elif deed == "cut":
            lines[row] = ""
        elif deed == "double":
            lines[row] *= 2
        elif deed == "indent":
            lines[row] = draw(st.sampled_from(["  ", "\t", " "])) + lines[row]
        elif deed == "swap":
            other = draw(st.integers(0, len(lines) - 1))
            lines[row], lines[other] = lines[other], lines[row]
        else:
            lines = lines[:row]
        text = "".join(lines)
    encoding = draw(st.sampled_from(["utf-8"] * 12 + ["utf-16", "latin-1", "utf-8-sig"]))
    return config, text.encode(encoding, errors="surrogatepass" if encoding.startswith("utf") else "replace")


overrides = st.lists(
    st.one_of(
        st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(WORDS)),
        st.builds("{}={}".format, st.sampled_from(KEYS), st.text(max_size=8)),
        st.builds("stages.{}={}".format, st.sampled_from(["a.run", "a", "b.algorithm.name"]), st.sampled_from(WORDS)),
        st.text(max_size=12),
        st.sampled_from(
            ["=", "a=", ".=1", "run.=1", "--x", "x.yaml", "run=", "run.name.x=1", "stages={a: {}, '': {}}"]
        ),
    ),
    max_size=3,
)


def outcome(config: Path, path: Path, more=()) -> list | None:
    """The stages loaded from `path` in place of `config`; None after mistakes, each reported in one line."""
    start = time.monotonic()
    try:
        return load_stages([*command(config)[0], str(path)], more)
    except ConfigError as error:
        assert error.lines
        for line in error.lines:
            assert line == " ".join(line.splitlines()) and ": " in line, line
            assert len(line) < 1000, line
        return None
    finally:
        assert time.monotonic() - start < LONGEST_S, "loading hangs"


def assert_reads_the_same_again(path: Path, stages) -> None:
    """The text of every stage gives the same configuration again, and it is valid UTF-8."""
    for stage in stages:
        again = path.with_name("again.yaml")
        again.write_text(stage.loaded.text, encoding="utf-8")
        assert load([str(again)]).config == stage.loaded.config


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "config.yaml"


@cases(50, 3400)
@given(drawn=texts(), more=st.one_of(st.just([]), overrides))
def test_broken_text(path, drawn, more):
    config, text = drawn
    path.write_bytes(text)
    for stage in outcome(config, path, more) or []:
        stage.loaded.text.encode("utf-8")


@cases(50, 3400)
@given(drawn=structures())
def test_another_structure(path, drawn):
    config, text = drawn
    path.write_text(text, encoding="utf-8")
    stages = outcome(config, path)
    if stages is None:
        return
    assert_reads_the_same_again(path, stages)
    if stages[0].name is None:
        values = stages[0].loaded.config.model_dump()
        for place, written in walk(yaml.safe_load(text)):
            if isinstance(written, int | float | bool):
                found = at(values, place)
                found = found["value"] if isinstance(found, dict) else found  # a number is a constant schedule
                same = found == written or str(found) == str(written)  # NaN
                assert same or isinstance(found, str), (place, written, found)  # a name may look like a number


@cases(50, 3400)
@given(config=st.sampled_from(CONFIGS), more=overrides)
def test_the_command_line(config, more, capsys):
    """Through `main`, with the output that a user sees: the merged YAML and 0, or lines on stderr and 2."""
    before, arguments = command(config)
    argv = [part for file in (*before, config) for part in ("--config", str(file))]
    code = main([*argv, *arguments, *more, "--print-config"])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert (code == 2 and said.err.strip() and not said.out) or (code == 0 and said.out and not said.err)
