"""An algorithm in a user's file, outside the package, is trained, resumed, evaluated, used in a stage and served."""

import gc
import json
import sys
import types
import weakref
from pathlib import Path

import pytest
import yaml
from lines import one_line
from packages import install
from runs import start, train, train_ranks

from rlkd.algorithms.registry import ALGORITHMS, algorithm_class, build_algorithm
from rlkd.config_file import ConfigError, load
from rlkd.training.module import PolicyModule, module_class

ALGORITHM = '''
from dataclasses import replace

from pydantic import Field

from rlkd.config.schema import AlgorithmConfig
from rlkd.losses import weighted_sum
from rlkd.algorithms.base import Algorithm, Loss, Term


class ShortestConfig(AlgorithmConfig):
    """Imitate the shortest completion of a group."""

    group_size: int = Field(4, ge=2, description="completions per prompt")
    scale: float = Field(1.0, gt=0, description="factor of the loss")


class Shortest(Algorithm):
    """L(θ) = −scale · E[ Σ_t log π_θ(y*_t) / N ], y* the shortest completion of its group."""

    Options = ShortestConfig

    def advantages(self, group):
        shortest = min(len(s.rollout.token_ids) for s in group)
        return [replace(s, advantage=float(len(s.rollout.token_ids) == shortest)) for s in group]

    @property
    def terms(self):
        return {"imitation": Term()}

    def loss(self, output, batch, iteration):
        total = weighted_sum(-output.logprobs * batch.advantages, batch.loss_weights["imitation"])
        return Loss(total=self.config.algorithm.scale * total)
'''

CONFIG = """\
run: {name: own, iterations: 2, resume: auto}
model: {path: builtin:student}
data: {path: builtin:reverse, max_prompt_tokens: 32, limit: 16}
rollout: {prompts: 4, max_tokens: 16, max_mismatch: 1.0e-3}
algorithm:
  name: NAME
  scale: 2.0
trainer: {accelerator: cpu}
eval: {every: 0, prompts: 8}
log: {progress: false}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory whose modules no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = dict(ALGORITHMS)
    yield tmp_path
    for name in ALGORITHMS.keys() - known.keys():
        del ALGORITHMS[name]


def config_file(name: str, module: str, source: str = ALGORITHM) -> str:
    Path(f"{module}.py").write_text(source)
    Path("own.yaml").write_text(CONFIG.replace("NAME", name))
    return "own.yaml"


def test_its_options_are_checked_and_its_name_is_kept(here):
    file = config_file("short_a:Shortest", "short_a")
    loaded = load([file])
    assert loaded.config.algorithm.model_dump() == {"name": "short_a:Shortest", "group_size": 4, "scale": 2.0}
    assert yaml.safe_load(loaded.text)["algorithm"]["name"] == "short_a:Shortest"
    assert isinstance(ALGORITHMS["short_a:Shortest"](loaded.config), sys.modules["short_a"].Shortest)
    with pytest.raises(ConfigError) as caught:
        load([file], ["algorithm.scale=-1", "algorithm.scal=1"])
    assert sorted(caught.value.lines) == [
        "command line: algorithm.scal: unknown key; did you mean algorithm.scale?",
        "command line: algorithm.scale: expected a number > 0, got -1",
    ]


def test_a_name_may_come_from_the_environment(here, monkeypatch):
    monkeypatch.setenv("ALGORITHM", "short_b:Shortest")
    file = config_file("${oc.env:ALGORITHM}", "short_b")
    assert load([file]).config.algorithm.name == "short_b:Shortest"


def test_a_subclass_of_ours_has_its_options_and_a_short_name_of_its_own_may_stand_beside(here):
    source = "from rlkd.algorithms.grpo import GRPO\n\nclass Mine(GRPO):\n    pass\n"
    file = config_file("mine_a:Mine", "mine_a", source)
    Path(file).write_text(Path(file).read_text().replace("scale: 2.0", "baseline: leave_one_out\n  normalise: false"))
    assert load([file]).config.algorithm.baseline == "leave_one_out"
    file = config_file("mine_b:Shortest", "mine_b", NAMED)
    assert load([file]).config.algorithm.name == "mine_b:Shortest"
    assert load([file], ["algorithm.name=briefest"]).config.algorithm.name == "briefest"


@pytest.mark.parametrize(
    ("name", "source", "line"),
    [
        ("wrong_a:Shortest", None, "importing wrong_a raised ModuleNotFoundError: No module named 'wrong_a'"),
        ("wrong_b:Shortests", ALGORITHM, "module wrong_b has no class Shortests (did you mean Shortest?)"),
        (
            "wrong_c:Field",
            ALGORITHM,
            "Field of wrong_c: expected a subclass of rlkd.algorithms.base.Algorithm; derive it from",
        ),
        ("wrong_d:X", "import nothing_like_it\n", "importing wrong_d raised ModuleNotFoundError: No module named "),
        ("wrong_e:X", "x = 1\ny = x / 0\n", "importing wrong_e raised ZeroDivisionError: division by zero at {here}:2"),
        ("wrong_f:X", "x = (\n", "importing wrong_f raised SyntaxError: '(' was never closed (wrong_f.py, line 1)"),
        ("wrong_g:X", "raise SystemExit(3)\n", "importing wrong_g raised SystemExit: 3 at {here}:1"),
        (
            "wrong_h:X",
            "from rlkd.algorithms.base import Algorithm\n\nclass X(Algorithm):\n    pass\n",
            "X has no Options; define Options as a subclass of rlkd.config.AlgorithmConfig",
        ),
        ("'wrong_i:'", ALGORITHM, "expected module:Class, got 'wrong_i:'; e.g. my_algorithm:MyAlgorithm"),
    ],
)
def test_what_is_wrong_with_it_is_one_line_at_its_place(here, name, source, line):
    module = name.strip("'").partition(":")[0]
    file = config_file(name, module, source or "")
    if source is None:
        Path(f"{module}.py").unlink()
    with pytest.raises(ConfigError) as caught:
        load([file], ["optim.rl=1"])
    wrong, other = caught.value.lines
    assert wrong.startswith("own.yaml:6: algorithm.name: ") and f"got {name.strip(chr(39))!r}; " in wrong, wrong
    assert line.replace("{here}", str(here / f"{module}.py")) in wrong, wrong
    assert other.startswith("command line: optim.rl: unknown key")


NAMED = ALGORITHM.replace("    group_size", "    name: Literal['briefest']\n    group_size").replace(
    "from dataclasses", "from typing import Literal\nfrom dataclasses"
)


@pytest.mark.parametrize(
    ("source", "name"), [(ALGORITHM, "notebook:Shortest"), (NAMED, "briefest")], ids=["module:Class", "named"]
)
def test_a_class_that_is_defined_again_replaces_the_first_of_which_nothing_is_left(here, monkeypatch, source, name):
    notebook = types.ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", notebook)
    file = config_file(name, "unused")
    exec(source, vars(notebook))
    first = load([file]).config
    old = build_algorithm(first)
    classes = [
        weakref.ref(cls) for cls in (notebook.Shortest, type(old), type(first.algorithm), module_class(type(old)))
    ]
    assert isinstance(old, notebook.Shortest) and old.longest_completion == 16
    exec(source + "\n    longest_completion = 7\n", vars(notebook))
    second = load([file]).config
    assert build_algorithm(second).longest_completion == PolicyModule(second).algorithm.longest_completion == 7
    with pytest.raises(ValueError, match=one_line("algorithm.name", name, "load the configuration again")):
        build_algorithm(first)
    del old, first
    gc.collect()
    assert [cls() for cls in classes] == [None] * 4


def test_a_name_of_another_module_or_of_ours_is_refused(here):
    Path("mine_c.py").write_text(NAMED)
    Path("mine_d.py").write_text(NAMED)
    Path("mine_e.py").write_text(NAMED.replace("'briefest'", "'grpo'"))
    assert load([config_file("mine_c:Shortest", "mine_f")]).config.algorithm.name == "mine_c:Shortest"
    for module, parts in {"mine_d": ("'briefest'", "mine_c"), "mine_e": ("'grpo'", "rlkd.algorithms.grpo")}.items():
        with pytest.raises(ConfigError, match=one_line(module, "Shortest.Options.name", *parts)):
            load(["own.yaml"], [f"algorithm.name={module}:Shortest"])
    assert algorithm_class("grpo").__module__ == "rlkd.algorithms.grpo"


def test_a_package_s_algorithm_has_its_name_there_and_a_broken_one_is_named(here):
    declared = {"shortest-of-plg": "plg_short:Shortest", "torn": "plg_short:Field"}
    sys.path.append(str(here))
    install(here, "plg-short", {"rlkd.algorithms": declared}, ALGORITHM)
    file = config_file("shortest-of-plg", "unused")
    for _ in range(2):
        loaded = load([file])
        assert yaml.safe_load(loaded.text)["algorithm"] == {"name": "shortest-of-plg", "group_size": 4, "scale": 2.0}
        assert isinstance(build_algorithm(loaded.config), sys.modules["plg_short"].Shortest)
    with pytest.raises(ConfigError, match=one_line("'shortest-of'", "torn", "did you mean shortest-of-plg?")):
        load([file], ["algorithm.name=shortest-of"])
    with pytest.raises(ConfigError, match=one_line("algorithm.name", "plg-short 1.0", "subclass")):
        load([file], ["algorithm.name=torn"])


def test_the_error_for_an_unknown_name_mentions_ones_own_algorithms(here):
    with pytest.raises(ConfigError) as caught:
        load([config_file("gppo", "unused")], [])
    assert caught.value.lines[0].endswith(" | module:Class of your own, got 'gppo'; did you mean grpo?")


@pytest.mark.process
@pytest.mark.long
def test_from_a_file_in_the_working_directory_to_a_student(here):
    file = config_file("short_c:Shortest", "short_c")
    train(["--config", file], here / "logs")
    train(["--config", file, "run.iterations=3"], here / "logs")
    rows = [json.loads(line) for line in Path("runs/own/metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert yaml.safe_load(Path("runs/own/config.yaml").read_text())["algorithm"]["name"] == "short_c:Shortest"
    run = start(["runs/own"], here / "evaluation", main="rlkd.evaluate:main")
    assert run.wait(120) == 0, run.err.read_text()[-3000:]
    assert "runs/own/hf, after 3 iterations" in run.err.read_text()


@pytest.mark.process
@pytest.mark.long
def test_as_a_stage_on_two_ranks(here):
    file = config_file("sft", "short_d")
    Path(file).write_text(Path(file).read_text().replace("  scale: 2.0\n", ""))
    stages = "stages={first: {}, own: {algorithm: {name: 'short_d:Shortest'}}}"
    few = ["trainer.devices=2", "run.iterations=1", "data.completion_column=answer", "data.max_completion_tokens=16"]
    train_ranks(2, ["--config", file, stages, *few], here / "logs")
    student = Path("runs/own/own/config.yaml").read_text()
    assert yaml.safe_load(student)["algorithm"]["name"] == "short_d:Shortest"


def test_its_policy_is_served(here, monkeypatch):
    from rlkd.serve import plan

    monkeypatch.setenv("RLKD_SERVER_KEY", "k")
    file = config_file("short_e:Shortest", "short_e")
    vllm = ["rollout.backend=vllm", "rollout.server.urls=[http://localhost:1]"]
    command, _ = plan([file], vllm, role="policy", host="127.0.0.1", port=1, tensor_parallel=1, data_parallel=1)
    assert "--enable-scale-out" in command
