"""A teacher from a user's file: its options are checked, and what is wrong with it is one line."""

import sys

import pytest
import yaml
from builders import config
from lines import one_line
from packages import install

from rlkd.config_file import ConfigError, load
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import Sampling
from rlkd.pipeline.build import build_sampler, build_teacher
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Signal, TeacherScores

SOURCE = """
from pydantic import Field
from rlkd.config import TeacherConfig
from rlkd.teachers.teacher import FixedTeacher
from rlkd.types import TeacherScores

class FlatConfig(TeacherConfig):
    logprob: float = Field(-1.0, le=0, description="of every token")

class Flat(FixedTeacher):
    Options = FlatConfig

    def __init__(self, config):
        self.logprob = config.teacher.logprob

    def score(self, questions, signal):
        return [TeacherScores(logprobs=(self.logprob,) * len(q.completion)) for q in questions]

class Mute(FixedTeacher):
    Options = TeacherConfig

    def __init__(self, config):
        pass

class Bare(FixedTeacher):
    pass
"""


@pytest.fixture(autouse=True)
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    declared = {"flat": "plg_teacher:Flat", "torn": "plg_teacher:Bare"}
    install(tmp_path, "plg-teacher", {"rlkd.teachers": declared}, SOURCE)


@pytest.mark.parametrize("name", ["plg_teacher:Flat", "flat"])
def test_its_options_are_checked_and_kept(tmp_path, name):
    loaded = load(["configs/quickstart.yaml"], [f"teacher={{backend: '{name}', logprob: -2.0}}"])
    kept = {"backend": name, "logprob": -2.0, "temperature": 1.0, "check_parity": False}
    assert yaml.safe_load(loaded.text)["teacher"] == loaded.config.model_dump(mode="json")["teacher"] == kept
    (tmp_path / "config.yaml").write_text(loaded.text)
    assert load([str(tmp_path / "config.yaml")]).config.model_dump() == loaded.config.model_dump()
    with pytest.raises(ConfigError) as caught:
        load(["configs/quickstart.yaml"], [f"teacher={{backend: '{name}', logprob: 1, logprobs: 1}}"])
    assert sorted(caught.value.lines) == [
        "command line: teacher.logprob: expected a number <= 0, got 1",
        "command line: teacher.logprobs: unknown key; did you mean teacher.logprob?",
    ]


def test_it_scores_and_only_scores():
    made = config("teacher={backend: flat, logprob: -2.0}")
    teacher = build_teacher(made, build_sampler(made))
    asked = [ScoreRequest((1, 2), (3, 4, 5))]
    assert teacher.score(asked, Signal()) == [TeacherScores(logprobs=(-2.0,) * 3)]
    assert teacher.in_process and not teacher.follows and teacher.layers() == ()
    with pytest.raises(RunStopped, match=one_line("teacher.backend", "Flat")):
        teacher.write(asked, Sampling(temperature=1.0, max_tokens=1, seed=0), 0)


def test_what_is_wrong_with_it_is_one_line():
    mute = config("teacher={backend: plg_teacher:Mute}")
    with pytest.raises(RunStopped, match=one_line("plg_teacher:Mute", "without score", "rlkd.teachers.teacher")):
        build_teacher(mute, build_sampler(mute))
    wrong = {
        "plg_teacher:Bare": ("Bare has no Options", "rlkd.config.TeacherConfig"),
        "torn": ("plg-teacher 1.0", "Bare has no Options"),
        "plg_teacher:Flatt": ("did you mean Flat?",),
        "flatt": ("none | local | served | self | routed | flat | torn | module:Class", "did you mean flat?"),
    }
    for name, parts in wrong.items():
        with pytest.raises(ConfigError, match=one_line("teacher.backend", name, *parts)):
            config(f"teacher={{backend: '{name}'}}")
