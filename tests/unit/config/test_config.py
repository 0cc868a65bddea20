"""Loading a configuration: what users write, what they get, and the line for each mistake."""

import re
from pathlib import Path
from typing import Literal

import pytest
from click.shell_completion import ShellComplete
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import BaseModel, Field

from rlkd import cli
from rlkd.command_line import parse
from rlkd.config.help import Schema, fields
from rlkd.config.schedules import Constant, Linear, Schedule, Step
from rlkd.config.schema import AlgorithmConfig, Config, LocalTeacherConfig, NoTeacherConfig, Section
from rlkd.config.yaml_tree import scalar
from rlkd.config_file import ConfigError, Loaded, completions, help_text, load
from rlkd.train import command, main


class Imitation(Section):
    """The teacher's share."""

    coef: Schedule = Field(Constant(value=0.1), description="weight")
    mask: Literal["all", "failed"] = Field("all", description="where")


class Plain(AlgorithmConfig):
    """Rewards only."""

    name: Literal["plain"] = Field(description="plain")
    clip: float = Field(0.2, gt=0, description="clip")


class Taught(Plain):
    """Rewards and a teacher."""

    name: Literal["taught"] = Field(description="taught")  # type: ignore[assignment]
    kd: Imitation = Field(Imitation(), description="the teacher's share")


ALGORITHMS = {"plain": Plain, "taught": Taught}
BASE = """\
model: {path: builtin:student}
data: {path: "builtin:reverse"}
algorithm: {name: plain}
"""
"""Three lines, so the text that a test adds starts on line 4."""


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def loaded(yaml: str = "", *overrides: str, base: str = BASE) -> Loaded:
    Path("a.yaml").write_text(base + yaml, encoding="utf-8")
    return load(["a.yaml"], overrides, ALGORITHMS)


def lines(yaml: str = "", *overrides: str, base: str = BASE) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(yaml, *overrides, base=base)
    assert str(caught.value) == "\n".join(caught.value.lines)
    return caught.value.lines


EXACT = {
    "run: {seed: -1}": "a.yaml:4: run.seed: expected an integer >= 0 and < 2147483648, got -1",
    "run: {iterations: 1.5}": "a.yaml:4: run.iterations: expected an integer >= 1, got 1.5",
    "run: {dir: }": "a.yaml:4: run.dir: expected text, got nothing",
    "checkpoint: {keep: '3'}": "a.yaml:4: checkpoint.keep: expected an integer >= 1, got '3'; drop the quotes",
    "optim: {betas: [0.9]}": "a.yaml:4: optim.betas: expected a list of numbers (exactly 2), got [0.9]",
    "rollout: {backend: vlm}": (
        "a.yaml:4: rollout.backend: expected hf | vllm | module:Class of your own, got 'vlm'; did you mean vllm?"
    ),
    "log: {progress: maybe}": "a.yaml:4: log.progress: expected true or false, got 'maybe'",
    "optim: {lr: fast}": (
        "a.yaml:4: optim.lr: expected a number >= 0, or a schedule with kind: constant | linear | cosine | step | "
        "piecewise, got 'fast'"
    ),
    "optim: {lr: .inf}": "a.yaml:4: optim.lr: expected a finite number, got .inf",
    "optim: {lr: {kind: liner}}": (
        "a.yaml:4: optim.lr.kind: expected constant | linear | cosine | step | piecewise, got 'liner'; did you mean "
        "linear?"
    ),
    "optim: {lrr: 3}": "a.yaml:4: optim.lrr: unknown key; did you mean optim.lr?",
    "optim.lr: 3": "a.yaml:4: optim.lr: unknown key; in YAML the sections are nested: optim: {lr: …}",
    "teacher: local": (
        "a.yaml:4: teacher: expected a section with backend: none | local | served | self | routed, got 'local'; did "
        "you mean teacher.backend: local?"
    ),
    "teacher: {backend: local}": "a.yaml:4: teacher.path: missing; expected text",
    "teacher: {backend: served, path: x, url: u, batch_tokens: 3}": (
        "a.yaml:4: teacher.batch_tokens: unknown key here; only teacher.backend: local | self has it"
    ),
    "reward: {functions: [math]}": (
        "a.yaml:4: reward.functions[0]: expected a section with name, got 'math'; write {name: math}"
    ),
    "optim: {lr: -1}": (
        "a.yaml:4: optim.lr: expected a number >= 0, or a schedule with kind: constant | linear | cosine | step | "
        "piecewise, got -1"
    ),
    "trainer: {micro_batch_tokens: 3}": (
        "a.yaml:4: trainer.micro_batch_tokens: is 3, less than one sequence of data.max_prompt_tokens + "
        "rollout.max_tokens = 1280 tokens; raise it"
    ),
    "run:\n\tseed: 3": "a.yaml:5: broken YAML: found a tab; indent YAML with spaces",
    "run: {seed: 1}\nrun: {seed: 2}": "a.yaml:5: run: set twice, first on line 4; keep one",
    "run:\n  seed: ???": "a.yaml:5: run.seed: is ???, a placeholder; set a value",
    "eval: {path: '${oc.env:RLKD_NOT_SET}'}": (
        "a.yaml:4: eval.path: expected a reference that resolves, got '${oc.env:RLKD_NOT_SET}': Environment variable "
        "'RLKD_NOT_SET' not found"
    ),
}

PLACES = {
    "run: {name: a b}": ("a.yaml:4: run.name: ", "got 'a b'"),
    "run: {dir: null}": ("a.yaml:4: run.dir: ", "got null"),
    "run: {dir: true}": ("a.yaml:4: run.dir: ", "got true"),
    "checkpoint: {keep: true}": ("a.yaml:4: checkpoint.keep: ", "got true"),
    "run: {seed: 010}": ("a.yaml:4: run.seed: ", "got '010'"),
    "eval:\n  every: 1\n  prompts: [1]": ("a.yaml:6: eval.prompts: ", "got [1]"),
    "rollout: 3": ("a.yaml:4: rollout: ", "got 3"),
    "log: {wandb: on}": ("a.yaml:4: log.wandb: ", "got 'on'", "did you mean online?"),
    "optim: {lr: '1e-6'}": ("a.yaml:4: optim.lr: ", "got '1e-6'", "drop the quotes"),
    "optim: {lr: 12:30}": ("a.yaml:4: optim.lr: ", "got '12:30'"),
    "optim: {lr: true}": ("a.yaml:4: optim.lr: ", "got true"),
    "optim: {lr: {start: 1}}": ("a.yaml:4: optim.lr.kind: ", "missing"),
    "optim: {lr: {kind: linear, start: 1, end: x, over: 3}}": ("a.yaml:4: optim.lr.end: ", "got 'x'"),
    "optim: {lr: {kind: step, start: 1, end: 0, at: -1}}": ("a.yaml:4: optim.lr.at: ", "got -1"),
    "lr: 3": ("a.yaml:4: lr: ", "did you mean optim.lr?"),
    "trainer: {temperature: 1}": (
        "a.yaml:4: trainer.temperature: ",
        "did you mean eval.temperature or rollout.temperature or teacher.temperature?",
    ),
    "rollout:\n  server:\n    lunch: true": ("a.yaml:6: rollout.server.lunch: ", "did you mean rollout.server.launch?"),
    "checkpoint: {zzz: 1}": ("a.yaml:4: checkpoint.zzz: ", "every, keep"),
    "on: 1": ("a.yaml:4: on: ", "trainer, eval, log"),
    "teacher: {path: x}": ("a.yaml:4: teacher.backend: ", "none | local | served"),
    "teacher: {backend: lokal, path: 3}": ("a.yaml:4: teacher.backend: ", "got 'lokal'", "did you mean local?"),
    "teacher: {backend: served, path: x}": ("a.yaml:4: teacher: ", "teacher.server.launch"),
    "reward:\n  functions:\n  - name: math\n  - weight: 2": ("a.yaml:7: reward.functions[1].name: ", "missing"),
    "reward: {functions: []}": ("a.yaml:4: reward.functions: ", "got []"),
    "reward: {functions: [{name: math, options: {strict: off}}]}": (
        "a.yaml:4: reward.functions[0].options.strict: ",
        "got off",
    ),
    "run: [1": ("a.yaml:4: ",),
    "run:\n  seed: 1\n  dir: x\n  seed: 2": ("a.yaml:7: run.seed: ", "first on line 5"),
    "data: {split: x}": ("a.yaml:4: data: ", "first on line 2"),
    "run: &x {seed: *x}": ("a.yaml:4: ", "anchor"),
    "run: *x": ("a.yaml:4: ", "alias"),
    "run: !!python/object:os.system {}": ("a.yaml:4: ", "python/object:os.system"),
    "run: {seed: 1}\n---\nrun: 2": ("a.yaml:5: ", "single document"),
    "? [1]\n: 2": ("a.yaml:4: ", "list"),
    "run:\n  name: ${run.dir}\n  dir: ???": ("a.yaml:6: run.dir: ", "???"),
    "data2: 1": ("a.yaml:4: data2: ", "did you mean data?"),
    "eval: {path: 'a ${x} b'}": ("a.yaml:4: eval.path: ", "got 'a ${x} b'", "write \\${"),
    "eval: {path: 'a ${ b'}": ("a.yaml:4: eval.path: ", "got 'a ${ b'", "write \\${"),
    "eval: {prompts: '${log.project}'}": (
        "a.yaml:4: eval.prompts: ",
        "got '${log.project}'",
        "${oc.decode:${log.project}}",
    ),
    "eval: {path: '${eval}'}": ("a.yaml:4: eval.path: ", "got '${eval}'"),
}
"""What is written → where the line says it is, and what it must mention."""


def assert_place(found: list[str], place: str, *mentioned: str) -> None:
    (line,) = found
    assert line.startswith(place) and all(word in line for word in mentioned) and len(line.splitlines()) == 1, line


@pytest.mark.parametrize("yaml", EXACT, ids=lambda yaml: re.sub(r"\s+", " ", yaml))
def test_one_mistake_is_one_exact_line(yaml):
    assert lines(yaml) == [EXACT[yaml]]


@pytest.mark.parametrize("yaml", PLACES, ids=lambda yaml: re.sub(r"\s+", " ", yaml))
def test_one_mistake_is_one_line_with_its_place(yaml):
    assert_place(lines(yaml), *PLACES[yaml])


ON_THE_COMMAND_LINE = {
    "foo": ("command line: ", "got 'foo'"),
    "b.yaml": ("command line: ", "got 'b.yaml'", "--config b.yaml"),
    "=3": ("command line: ", "got '=3'"),
    "a..b=3": ("command line: ", "got 'a..b=3'"),
    "optim.lr=": ("command line: optim.lr: ", "got nothing"),
    "optim.lrr=3": ("command line: optim.lrr: ", "did you mean optim.lr?"),
    "algorithm=taught": ("command line: algorithm: ", "got 'taught'", "did you mean algorithm.name: taught?"),
    "algorithm.name=tought": ("command line: algorithm.name: ", "got 'tought'", "did you mean taught?"),
    "algorithm.kd.coef=1": ("command line: algorithm.kd: ", "algorithm.name: taught"),
    "algorithm.clip=0": ("command line: algorithm.clip: ", "got 0"),
    "teacher.backend=local": ("command line: teacher.path: ", "missing"),
    "data.system=[INST] hi": ("command line: data.system: ", "quote"),
}


@pytest.mark.parametrize("override", ON_THE_COMMAND_LINE)
def test_one_mistake_on_the_command_line_is_one_line_with_its_key(override):
    assert_place(lines("", override), *ON_THE_COMMAND_LINE[override])


def test_three_mistakes_are_three_lines_and_each_names_the_place_that_set_it():
    Path("b.yaml").write_text("rollout:\n  temperature: 0\n")
    Path("a.yaml").write_text(BASE + "optim: {lrr: 1}\nrollout: {temperature: 1, prompts: many}\n")
    with pytest.raises(ConfigError) as caught:
        load(["a.yaml", "b.yaml"], ["algorithm.clip=-1"], ALGORITHMS)
    assert caught.value.lines == [
        "a.yaml:5: rollout.prompts: expected an integer >= 1, got 'many'",
        "b.yaml:2: rollout.temperature: expected a number > 0, got 0",
        "command line: algorithm.clip: expected a number > 0, got -1",
        "a.yaml:4: optim.lrr: unknown key; did you mean optim.lr?",
    ]


def test_a_mistake_behind_a_reference_names_the_reference():
    yaml = "rollout: {server: {devices: [[0], [1]]}}\noptim:\n  betas: ${rollout.server.devices}\n"
    assert lines(yaml) == [
        "a.yaml:6: optim.betas[0]: expected a number, got list from '${rollout.server.devices}'",
        "a.yaml:6: optim.betas[1]: expected a number, got list from '${rollout.server.devices}'",
    ]


def test_missing_keys_name_the_files_or_the_section_that_lacks_them():
    assert lines(base="model:\ndata: {split: x}\n") == [
        "a.yaml:1: model.path: missing; expected text",
        "a.yaml:2: data.path: missing; expected text",
        "a.yaml: algorithm.name: missing; expected plain | taught",
    ]
    assert lines(base="") == [
        "a.yaml: model.path: missing; expected text",
        "a.yaml: data.path: missing; expected text",
        "a.yaml: algorithm.name: missing; expected plain | taught",
    ]


def test_files_that_cannot_be_read():
    Path("broken.yaml").write_text("a: [")
    Path("list.yaml").write_text("- a\n")
    Path("zero.yaml").write_bytes(b"a: \x00")
    for name, line in {
        "none.yaml": "none.yaml: cannot be read: No such file or directory",
        ".": ".: cannot be read: Is a directory",
        "list.yaml": "list.yaml:1: expected sections such as model: and data:, got a list",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load([name], ["nonsense=1"], ALGORITHMS)
        assert caught.value.lines == [line]
    with pytest.raises(ConfigError) as caught:
        load(["zero.yaml", "broken.yaml"], [], ALGORITHMS)
    assert [line.split(": ")[:2] for line in caught.value.lines] == [
        ["zero.yaml", "broken YAML"],
        ["broken.yaml:1", "broken YAML"],
    ]


def test_a_file_without_mistakes_gives_the_values_it_holds():
    config = loaded("optim: {lr: 1e-6, betas: [0.9, 0]}\nrollout: {prompts: 1_000}\nlog: {wandb: off}").config
    assert type(config) is Config and type(config.algorithm) is Plain
    assert config.optim.lr == Constant(value=1e-6) and config.optim.betas == [0.9, 0]
    assert config.rollout.prompts == 1000 and config.log.wandb == "off"


def test_words_that_yaml_1_1_would_change_keep_the_meaning_of_their_place():
    config = loaded("run: {name: 1.10}\nlog: {wandb: off, progress: off, project: no}").config
    assert (config.run.name, config.log.wandb, config.log.progress, config.log.project) == ("1.10", "off", False, "no")
    for name in ("7", "2024", "1e-6", "007", "0x1F", "1_000", "on"):
        assert loaded(f"run: {{name: {name}}}").config.run.name == name
        assert loaded("", f"run.name={name}").config.run.name == name
    for word, value in {"on": True, "Yes": True, "true": True, "NO": False, "off": False}.items():
        assert loaded("", f"log.progress={word}").config.log.progress is value
    arguments = loaded("rollout: {server: {extra_args: [--seed, 3, on, 1.50]}}").config.rollout.server.extra_args
    assert arguments == ["--seed", "3", "on", "1.50"]


def test_null_and_blank():
    assert loaded("teacher: null").config.teacher == NoTeacherConfig()
    assert loaded("rollout:\n  # prompts: 4\n").config.rollout.prompts == 16
    assert loaded("", "data.answer_column=null").config.data.answer_column is None
    Path("blank.yaml").write_text("rollout:\n  # prompts: 4\nteacher: null\n")
    Path("a.yaml").write_text(BASE + "rollout: {prompts: 4}\nteacher: {backend: local, path: x}\n")
    config = load(["a.yaml", "blank.yaml"], [], ALGORITHMS).config
    assert config.rollout.prompts == 4 and config.teacher == NoTeacherConfig()


def test_overrides_are_words_unless_they_start_with_a_quote_or_a_bracket():
    for text in ("Answer: briefly # please", "- x", "*x", "!x", "a, b", "x=y", "no"):
        assert loaded("", f"data.system={text}").config.data.system == text
    assert loaded("", "data.system='[INST] hi'").config.data.system == "[INST] hi"
    urls = "rollout.server.urls=[http://a:1, http://b:2]"
    assert loaded("", urls, "rollout.backend=vllm").config.rollout.server.urls == ["http://a:1", "http://b:2"]


def test_a_temperature_that_vllm_would_raise_is_told_before_the_run():
    served = "rollout: {backend: vllm, temperature: 0.009, server: {launch: true}}\neval: {temperature: 0.001, path: x}"
    with pytest.raises(ConfigError) as caught:
        loaded(served)
    assert [line.split(": ", 1)[1] for line in caught.value.lines] == [
        f"{key}: is {value}, but vLLM silently raises it to 0.01; set it to at least that"
        for key, value in (("rollout.temperature", 0.009), ("eval.temperature", 0.001))
    ]
    loaded(served.replace("0.009", "0.01"), "eval.every=0")
    loaded("rollout: {temperature: 0.009}")


def test_schedules():
    assert loaded("optim: {lr: 1}").config.optim.lr == Constant(value=1)
    linear = loaded("optim: {lr: {kind: linear, start: 5e-3, end: 1e-3, over: 80}}").config.optim.lr
    assert linear == Linear(kind="linear", start=5e-3, end=1e-3, over=80)
    yaml = "optim: {lr: {kind: linear, start: 5e-3, end: 1e-3, over: 80}}"
    step = Step(kind="step", start=1, end=2, at=3)
    assert loaded(yaml, "optim.lr={kind: step, start: 1, end: 2, at: 3}").config.optim.lr == step
    assert loaded(yaml, "optim.lr.over=90").config.optim.lr == linear.model_copy(update={"over": 90})
    assert loaded(yaml, "optim.lr=2").config.optim.lr == Constant(value=2)


def test_another_algorithm_or_teacher_replaces_the_section_and_the_same_one_is_merged():
    yaml = "teacher: {backend: served, path: a, url: 'http://x:1', check_parity: true}"
    taught = "model: {path: m}\ndata: {path: d}\nalgorithm: {name: taught, group_size: 4, kd: {coef: 3}}\n"
    for order in (["algorithm.name=plain", "algorithm.clip=0.5"], ["algorithm.clip=0.5", "algorithm.name=plain"]):
        assert loaded("", *order, base=taught).config.algorithm == Plain(name="plain", clip=0.5)
    changed_my_mind = ["algorithm.name=taught", "algorithm.clip=0.5", "algorithm.name=plain"]
    assert loaded("", *changed_my_mind, base=taught).config.algorithm == Plain(name="plain", clip=0.5)
    same = loaded("", "algorithm.name=taught", "algorithm.kd.mask=failed", base=taught).config.algorithm
    assert same == Taught(name="taught", group_size=4, kd=Imitation(coef=Constant(value=3), mask="failed"))
    config = loaded(yaml, "teacher.backend=local", "teacher.path=b").config
    assert config.teacher == LocalTeacherConfig(backend="local", path="b")
    Path("b.yaml").write_text("algorithm: {name: plain}\nteacher: {backend: none}\n")
    Path("a.yaml").write_text(taught + yaml)
    config = load(["a.yaml", "b.yaml"], [], ALGORITHMS).config
    assert config.algorithm == Plain(name="plain") and config.teacher == NoTeacherConfig()


def test_references_are_resolved_in_the_config_and_kept_in_the_text(monkeypatch):
    monkeypatch.setenv("RLKD_SECRET", "hunter2")
    monkeypatch.setenv("RLKD_KIND", "taught")
    monkeypatch.setenv("RLKD_SEED", "3")
    result = loaded(
        "run: {dir: '/x/${oc.env:RLKD_SECRET}', seed: '${oc.decode:${oc.env:RLKD_SEED}}', name: '${run.seed}'}\n"
        "eval: {prompts: '${rollout.prompts}'}\n"
        r"log: {project: 'a \${b}'}",
        "algorithm.name=${oc.env:RLKD_KIND}",
        "algorithm.kd.coef=2",
    )
    config = result.config
    assert (config.run.dir, config.run.seed, config.run.name) == ("/x/hunter2", 3, "3")
    assert config.eval.prompts == config.rollout.prompts  # of a default that nobody set
    assert config.log.project == "a ${b}"
    assert isinstance(config.algorithm, Taught)
    assert "hunter2" not in result.text and "${oc.env:RLKD_SECRET}" in result.text and r"a \${b}" in result.text
    wrong = lines("run: {seed: '${oc.env:RLKD_SECRET}'}")
    assert "hunter2" not in "".join(wrong)


def test_a_placeholder_is_filled_by_a_later_file_or_override():
    assert loaded("run:\n  name: ???", "run.name=x").config.run.name == "x"
    assert loaded("run: {name: x}", "run.name=???").config.run.name == "x"


def test_anchors_and_merge_keys():
    config = loaded("eval: &e {prompts: 3, samples: 2}\n").config
    assert config.eval.prompts == 3
    config = loaded("teacher: {backend: local, path: &p x}\neval: {path: *p}\n").config
    assert config.eval.path == "x"
    config = loaded("", base="model: &m {path: x}\ndata: {<<: *m, split: s}\nalgorithm: {name: plain}\n").config
    assert (config.data.path, config.data.split) == ("x", "s")


ROUND_TRIPS = [
    "",
    "run: {name: 1.10}\nlog: {project: no, wandb: off, progress: off}",
    "data: {system: \"a\\nb: 'c' # ${data.split} \\\\${x}\"}\n",
    "teacher: {backend: served, path: x, server: {launch: true, extra_args: ['1e-6', '012', on, 'null', '~', '1:3']}}",
    "optim: {lr: {kind: cosine, start: 1e-5, end: 0, over: 9}}",
    "reward: {functions: [{name: math, weight: 2, options: {a: 'off', b: [1e-3, true, null], c: {d: '1'}}}]}",
]


@pytest.mark.parametrize("yaml", ROUND_TRIPS)
def test_the_text_shows_every_key_and_gives_the_same_config_again(yaml):
    base = "\n".join(line for line in BASE.splitlines() if not (line.startswith("data") and yaml.startswith("data")))
    yaml = yaml.replace("{system", "{path: x, system")
    first = loaded(yaml, base=base + "\n")
    Path("b.yaml").write_text(first.text, encoding="utf-8")
    again = load(["b.yaml"], [], ALGORITHMS)
    assert again.config == first.config and again.text == first.text

    def shown(model: type[BaseModel], values: dict[str, object]) -> None:
        assert list(values) == list(fields(model))
        for name, value in values.items():
            free = fields(model)[name].is_free  # a mapping of names of the user's
            if isinstance(value, dict) and not free and name not in ("algorithm", "teacher", "lr"):
                shown(fields(model)[name].models[0], value)

    shown(Config, OmegaConf.to_container(OmegaConf.create(first.text)))  # other readers of YAML can read it too
    assert "\t" not in first.text


def test_a_plain_word_means_what_yaml_1_2_says():
    for text, value in {"1e-6": 1e-6, "-3": -3, "+.5": 0.5, "1.": 1.0, "1_0": 10, "~": None, "True": True}.items():
        assert scalar(text) == value and type(scalar(text)) is type(value)
    for text in ("010", "0x1F", "12:30", "2024-01-01", "on", "y", "nan", "1e", ".", "-", "e5", "1.2.3", "_1"):
        assert scalar(text) == text


def test_command_line():
    args = parse(command, ["--config", "a.yaml", "x.y=1", "--config=b.yaml", "--print-config", "z=--w"])
    assert args == {
        "config": ("a.yaml", "b.yaml"),
        "words": ("x.y=1", "z=--w"),
        "print_config": True,
        "estimate": None,
        "dry_run": False,
        "profile": False,
    }
    for argv, line in {
        ("--config",): "command line: --config: expected a value, got nothing",
        ("--config", "--profile"): "command line: --config: expected a FILE, got --profile",
        ("--confg", "a"): "command line: --confg: unknown flag; did you mean --config?",
        ("--optim.lr=3",): "command line: --optim.lr: unknown flag; did you mean optim.lr=VALUE?",
        ("-x",): "command line: -x: unknown flag; expected one of --config, --print-config, --estimate, --dry-run, "
        "--profile, --help or key=value",
    }.items():
        with pytest.raises(ConfigError) as caught:
            parse(command, argv)
        assert caught.value.lines == [line]


def test_a_command_line_without_a_configuration_is_one_line(capsys):
    for argv, hint in {
        (): "e.g. --config configs/quickstart.yaml",
        ("a.yaml",): "did you mean --config a.yaml?",
    }.items():
        assert main(argv) == 2
        assert capsys.readouterr().err == f"command line: --config: missing; {hint}\n"


def test_the_help_is_one_screen_and_explains_each_section_and_key_when_asked(capsys):
    def printed(*words):
        assert main(["--help", *words]) == 0
        return capsys.readouterr().out

    page = printed()
    assert len(page.splitlines()) < 40 and all(len(line) <= 100 for line in page.splitlines())
    assert {name for name in Config.model_fields if f"\n  {name} " in page} == set(Config.model_fields)
    for param in command.params:
        assert param.name == "words" or param.opts[0] in page
    assert printed("all") == help_text()
    assert printed("checkpoint").splitlines()[0] == "checkpoint - Checkpoints and the exported student."
    assert "algorithm.t_start" in printed("taid") and "checkpoint." not in printed("taid")
    assert printed("run.seed").splitlines()[0] == "  run.seed: an integer >= 0 and < 2147483648; default 0"
    assert len(printed("optim.lr", "run.name").splitlines()) == 5
    assert main(["--help", "checkpont"]) == 2
    assert capsys.readouterr().err == (
        "command line: --help checkpont: unknown section or key; did you mean checkpoint?\n"
    )


def test_completions():
    assert completions("run.se") == ["run.seed="]
    assert completions("trainer.accelerator=") == [f"trainer.accelerator={word}" for word in ("auto", "cpu", "gpu")]
    assert completions("log.profile=") == ["log.profile=true", "log.profile=false"]
    assert completions("algorithm.name=kd") == ["algorithm.name=kdrl"]
    assert completions("nothing") == completions("run.name=x") == []


def test_what_a_shell_offers():
    group = cli.Commands("rlkd")
    for words, incomplete, offered in (
        ([], "tr", ["train"]),
        (["train"], "--pri", ["--print-config"]),
        (["train", "--config", "x.yaml"], "optim.l", ["optim.lr="]),
        (["evaluate"], "eval.pr", ["eval.prompts="]),
    ):
        found = ShellComplete(group, {}, "rlkd", "_RLKD_COMPLETE").get_completions(words, incomplete)
        assert [item.value for item in found] == offered


def test_help_lists_every_key_of_every_kind_of_section():
    text = help_text(algorithms=ALGORITHMS)
    listed = set(re.findall(r"^  ([\w.\[\]]+):", text, flags=re.MULTILINE))
    assert {f"{section}.{key}" for section, key in Schema(ALGORITHMS).all_keys()} <= listed
    assert {"teacher.url", "teacher.batch_tokens", "algorithm.kd.coef", "reward.functions[].weight"} <= listed
    assert "run.seed: an integer >= 0 and < 2147483648; default 0" in text
    assert "model.path: text; required" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert all(f"kind: {kind}" in text for kind in ("constant", "linear", "cosine", "step", "piecewise"))


def test_every_key_has_a_help_text():
    def walk(model: type[BaseModel]) -> None:
        for name, place in Schema(ALGORITHMS).fields(model).items():
            if name != "algorithm" and model is not Config:
                assert model.model_fields[name].description, f"{model.__name__}.{name}"
            for inner in (*place.models, *(place.item.models if place.item else ())):
                if not place.is_schedule:
                    walk(inner)

    walk(Config)


def test_the_quickstart_and_the_registered_algorithms():
    configs = Path(__file__).parents[3] / "configs"
    with pytest.raises(ConfigError) as caught:
        load([str(configs / "quickstart.yaml")], ["algorithm.kd.estimator=k1", "teacher.backend=none"])
    assert [line.split(": ")[:2] for line in caught.value.lines] == [["command line", "algorithm.kd.estimator"]]
    assert "algorithm.kd.coef" in help_text()


FULL = (
    BASE
    + """\
run: {name: x, seed: 3}
teacher: {backend: local, path: t}
rollout: {server: {urls: [], extra_args: [a]}}
optim: {lr: {kind: linear, start: 1e-3, end: 0, over: 3}}
reward: {functions: [{name: math, options: {a: 1}}]}
eval: {path: "${data.path}"}
"""
)
_PIECES = st.sampled_from(
    ["{", "}", "[", "]", ":", ": ", "\n", "\n  ", "- ", "'", '"', "${", "}", "\\", "&a ", "*a", "!x ", "???", "~", "#",
     "<<: ", "null", "on", "1e-6", "-1", ".inf", "\t", "name", "kind: ", "é", "\x00", "|", ">", "? ", "---", ",", "0"]
)  # fmt: skip
_OVERRIDES = st.builds(
    lambda key, value: f"{key}={value}",
    st.sampled_from(
        ["run", "run.seed", "teacher", "teacher.backend", "optim.lr", "optim.lr.kind", "algorithm", "algorithm.name",
         "reward.functions", "reward.functions.0", "eval.path", "rollout.server", "a.b", "data.", "model.path.x"]
    ),
    st.one_of(st.text(max_size=6), _PIECES, st.sampled_from(["{}", "[]", "{kind: step}", "${run}", "${oc.env:X}"])),
)  # fmt: skip


@pytest.mark.long
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(FULL)), st.integers(0, 12), _PIECES), max_size=3),
    overrides=st.lists(_OVERRIDES, max_size=2),
)
def test_whatever_is_written_ends_in_a_config_or_in_lines(edits, overrides):
    text = FULL
    for start, length, piece in edits:
        text = text[:start] + piece + text[start + length :]
    try:
        result = loaded("", *overrides, base=text)
    except ConfigError as error:
        assert error.lines and all(line == " ".join(line.splitlines()) and ": " in line for line in error.lines)
        return
    Path("b.yaml").write_text(result.text, encoding="utf-8")
    assert load(["b.yaml"], [], ALGORITHMS).config == result.config


def test_a_key_cannot_break_its_line_or_steer_a_terminal():
    assert lines('rollout: {"a\\n\\e[2J": 1}') == [
        r"a.yaml:4: rollout.a\n\x1b[2J: unknown key; rollout has "
        + ", ".join(fields(Config)["rollout"].models[0].model_fields)
    ]


def test_numbers_that_python_does_not_read_are_texts():
    for text in ("1__0", "1_", "1__0.5", "1_.5", "9" * 5000, "-" + "9" * 301):
        assert scalar(text) == text
    assert scalar("1_0.2_5") == 10.25 and scalar("9" * 300) == 10**300 - 1


@pytest.mark.parametrize(
    ("yaml", "line"),
    [
        ("run: {name: " + "[" * 3000, "a.yaml: broken YAML: sections and lists nested more than 50 deep"),
        ("run: {name: " + "[" * 60 + "]" * 60 + "}", "a.yaml:4: broken YAML: sections and lists nested more than 50"),
        ('run: {name: "a\\0b"}', "a.yaml:4: expected text without NUL characters"),
        ('run: {name: "\\ud83d"}', "a.yaml:4: expected UTF-8 text"),
        ("\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9)),
         "a.yaml:1: broken YAML: more than 100000 values once aliases (*) are expanded"),
    ],
)  # fmt: skip
def test_what_would_end_in_a_traceback_or_never(yaml, line):
    assert lines(yaml)[0].startswith(line)


@pytest.mark.parametrize("argument", ["run.name=a\udcff", "run.name=a\0", "run.name=" + "[" * 3000, "a." * 99 + "b=1"])
def test_an_override_that_would_end_in_a_traceback(argument):
    (line,) = lines("", argument)
    assert line.startswith("command line: ") and len(line) < 300 and line.isprintable()
