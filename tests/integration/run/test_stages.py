"""A recipe of several stages: how it is loaded, and that it runs and can be resumed."""

import json
from pathlib import Path

import pytest
from runs import RECIPE, train

from rlkd.config.load import ConfigError
from rlkd.config_file import load_stages


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


def test_each_stage_is_the_file_with_its_changes(recipe):
    stages = load_stages([recipe], ["optim.lr=0.001", "stages.rewarded.run.iterations=7"])
    configs = [stage.loaded.config for stage in stages]
    assert [c.run_dir for c in configs] == ["runs/recipe/imitate", "runs/recipe/taught", "runs/recipe/rewarded"]
    assert [c.algorithm.name for c in configs] == ["sft", "taid", "grpo"]
    assert [c.run.iterations for c in configs] == [2, 2, 7]
    assert [c.optim.lr(0) for c in configs] == [0.001] * 3, "the command line applies to every stage"
    every = load_stages([recipe], ["run.iterations=5"])
    assert [stage.loaded.config.run.iterations for stage in every] == [5] * 3, (
        "and overrides what a stage in the file sets"
    )
    assert [c.teacher.backend for c in configs] == ["none", "local", "none"], "a stage does not see its neighbour"
    assert [stage.starts_from for stage in stages] == [None, "runs/recipe/imitate/hf", "runs/recipe/taught/hf"]


def test_a_file_without_stages_is_one(recipe):
    Path("one.yaml").write_text(RECIPE.split("stages:")[0])
    (stage,) = load_stages(["one.yaml"], [])
    assert stage.name is None and stage.starts_from is None and stage.loaded.config.run_dir == "runs/recipe"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("stages.rewarded.optim.rl=3", "stage rewarded: command line: optim.rl: unknown key; optim has lr"),
        ("stages.taught.teacher.backend=none", "stage taught: "),
        ("checkpoint.export=false", "stage imitate: checkpoint.export: is false, but the next stage starts"),
        ("stages=3", "command line: stages: expected a mapping"),
        ("stages={a/b: {}}", "stages: expected a directory name of letters, digits and . + - _, got 'a/b'"),
    ],
)
def test_a_mistake_names_its_stage(recipe, change, line):
    with pytest.raises(ConfigError) as caught:
        load_stages([recipe], [change])
    assert caught.value.lines[0].startswith(line), caught.value.lines


@pytest.mark.process
def test_each_stage_starts_from_the_previous_student_and_the_chain_can_be_resumed(recipe):
    two = RECIPE.replace("  taught:\n", "").replace("    algorithm: {name: taid, over: 10}\n", "")
    two = two.replace("    teacher: {backend: local, path: builtin:teacher}\n", "").replace(
        "iterations: 2", "iterations: 1"
    )
    Path(recipe).write_text(two)

    def run(*overrides):
        train(["--config", recipe, *overrides], "printed")

    def iterations(stage):
        rows = Path("runs/recipe", stage, "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["iteration"] for row in rows]

    run("stages.rewarded.run.iterations=1")
    assert [iterations(s) for s in ("imitate", "rewarded")] == [[1], [1]]
    before = Path("runs/recipe/imitate/hf/model.safetensors").stat().st_mtime_ns
    run("stages.rewarded.run.iterations=2")
    assert [iterations(s) for s in ("imitate", "rewarded")] == [[1], [1, 2]]
    assert Path("runs/recipe/imitate/hf/model.safetensors").stat().st_mtime_ns == before, "skipped"
    assert "path: runs/recipe/imitate/hf" in Path("runs/recipe/rewarded/config.yaml").read_text()
