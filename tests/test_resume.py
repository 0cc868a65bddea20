"""A run goes on only under the configuration that its checkpoint was trained under; what may change is listed."""

import pytest
from builders import config

from rlkd.config import Config
from rlkd.resume import FREE, changes, save_config
from rlkd.tiny import resolve

SCHEDULE = "optim.lr={kind: linear, start: 1.0e-3, end: 0.0, over: 9}"


@pytest.fixture
def resumed(tmp_path):
    """(what stands in the way of going on with these overrides, for a run that had those)."""

    def lines(now, before=()):
        where = (f"run.dir={tmp_path}", "run.name=r", "run.resume=auto")
        folder = tmp_path / "r" / "checkpoints" / "iteration-000003"
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config(*where, *before), folder)
        return changes(config(*where, *now))

    return lines


def test_the_same_configuration_goes_on(resumed):
    assert resumed((SCHEDULE,), (SCHEDULE,)) == []


@pytest.mark.parametrize(
    "free",
    [
        ("run.iterations=999",),
        ("trainer.devices=2",),
        ("eval.every=1", "eval.prompts=3"),
        ("log.progress=false", "checkpoint.keep=9"),
        ("rollout.server.request_timeout_s=7", "reward.workers=2"),
    ],
)
def test_how_long_where_and_what_is_looked_at_may_change(resumed, free):
    assert resumed(free) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            "trainer.micro_batch_tokens=4096",
            r"trainer.micro_batch_tokens: is 4096, but iteration-000003 was trained with 8192; put it back, or accept "
            r"it by run.accept_changes=[trainer.micro_batch_tokens]",
        ),
        ("run.seed=7", "run.seed: is 7, but iteration-000003 was trained with 0; "),
        ("model.path=builtin:mentor", "model.path: is builtin:mentor, but iteration-000003 was trained with builtin:"),
        ("reward.functions=[{name: math}]", "reward.functions.0.name: is math, but iteration-000003 was trained with "),
        ("algorithm.kd.coef=0.5", "algorithm.kd.coef.value: is 0.5, but iteration-000003 was trained with 0.2; "),
    ],
)
def test_what_changes_the_trajectory_is_refused_until_it_is_named(resumed, change, line):
    (found,) = resumed((change,))
    assert found.startswith(line)
    key = change.split("=")[0]
    assert resumed((change, f"run.accept_changes=[{key}]")) == []
    assert resumed((change, "run.accept_changes=[optim.betas]")) == [found]


def test_each_changed_key_is_a_line_and_a_section_may_be_named_whole(resumed):
    change = ("algorithm={name: grpo, group_size: 8}", "teacher=null")
    keys = {line.split(":")[0] for line in resumed(change)}
    assert {"algorithm.name", "teacher.backend", "teacher.path"} <= keys
    assert resumed((*change, "run.accept_changes=[algorithm, teacher]")) == []


def test_without_a_checkpoint_nothing_is_compared(tmp_path):
    assert changes(config(f"run.dir={tmp_path}", "run.resume=auto")) == []


def test_a_checkpoint_without_its_configuration_is_refused(tmp_path):
    (tmp_path / "iteration-000001").mkdir()
    (line,) = changes(config(f"run.resume={tmp_path / 'iteration-000001'}"))
    assert line.startswith("run.resume: ") and "has no readable config.json" in line


def test_a_folder_of_something_else_is_no_checkpoint():
    """A model's folder has a config.json too."""
    (line,) = changes(config(f"run.resume={resolve('builtin:student')}"))
    assert line.endswith(" is no checkpoint of a run; wants never, auto, or <run>/checkpoints/iteration-…")


def test_what_is_free_are_keys_that_exist():
    """A renamed key must not stay free, or become forbidden, in silence."""
    for key in ("run.dir", "run.name", "run.iterations", "run.resume", "run.accept_changes", "trainer.devices"):
        section, name = key.split(".")
        assert FREE.fullmatch(key) and name in Config.model_fields[section].annotation.model_fields
    for section in ("log", "eval", "checkpoint"):
        assert section in Config.model_fields
    assert not FREE.fullmatch("rollout.max_tokens") and not FREE.fullmatch("teacher.path")
    assert FREE.fullmatch("teacher.teachers.0.server.port") and FREE.fullmatch("teacher.url")
