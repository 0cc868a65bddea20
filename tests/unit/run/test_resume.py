"""A run resumes only with the configuration of its checkpoint, except for the keys that may change."""

import functools
import json
from dataclasses import asdict, make_dataclass

import pytest
import torch
from builders import config
from lines import assert_lines

from rlkd.algorithms.registry import build_algorithm
from rlkd.builtin import resolve
from rlkd.data.chat import load_tokenizer
from rlkd.data.rows import Row
from rlkd.data.sources import load_source
from rlkd.pipeline.loader import RolloutLoader
from rlkd.run.resume import FREE, as_run, changes
from rlkd.storage.run_folder import FILE, save_config, save_data

SCHEDULE = "optim.lr={kind: linear, start: 1.0e-3, end: 0.0, over: 9}"


@pytest.fixture
def resumed(tmp_path):
    """A function from overrides to the changes that prevent resuming a run with them."""

    def lines(now, before=()):
        where = (f"run.dir={tmp_path}", "run.name=r", "run.resume=auto")
        folder = tmp_path / "r" / "checkpoints" / "iteration-000003"
        folder.mkdir(parents=True, exist_ok=True)
        save_config(as_run(config(*where, *before)), folder)
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
def test_keys_for_length_place_and_logging_may_change(resumed, free):
    assert resumed(free) == []


@pytest.mark.parametrize(
    ("change", "key", "values"),
    [
        ("trainer.micro_batch_tokens=4096", "trainer.micro_batch_tokens", (4096, 8192)),
        ("run.seed=7", "run.seed", (7, 0)),
        ("model.path=builtin:mentor", "model.path", ("builtin:mentor", "builtin:student")),
        ("reward.functions=[{name: math}]", "reward.functions.0.name", ("math", "exact_match")),
        ("algorithm.kd.coef=0.5", "algorithm.kd.coef.value", (0.5, 0.2)),
    ],
)
def test_what_changes_the_trajectory_is_refused_until_it_is_named(resumed, change, key, values):
    (found,) = resumed((change,))
    assert_lines([found], (f"{key}: ", *values, "iteration-000003", f"run.accept_changes=[{key}]"))
    key = change.split("=")[0]
    assert resumed((change, f"run.accept_changes=[{key}]")) == []
    assert resumed((change, "run.accept_changes=[optim.betas]")) == [found]


def test_a_key_that_the_checkpoint_does_not_know_is_a_change_only_when_it_is_set(tmp_path):
    """Also if a section has its own default there, like SDPO's context."""
    folder = tmp_path / "r" / "checkpoints" / "iteration-000003"
    folder.mkdir(parents=True)
    context = "context: {template: '{prompt}{context}', sibling: ' seen {text}'}"
    plain = (f"run.dir={tmp_path}", "run.name=r", "run.resume=auto", "teacher={backend: self}")
    plain = (*plain, f"algorithm={{name: sdpo, {context}}}")
    save_config(as_run(config(*plain)), folder)
    saved = json.loads((folder / FILE).read_text())
    newer = ("algorithm.ratio_cap", "algorithm.mask_eos", "algorithm.context.feedback_beside_sibling")
    for key in newer:
        *above, name = key.split(".")
        del functools.reduce(dict.__getitem__, above, saved)[name]
    (folder / FILE).write_text(json.dumps(saved))
    as_it_was = (*plain, "algorithm.ratio_cap=null", "algorithm.context.feedback_beside_sibling=true")
    assert changes(config(*as_it_was)) == []
    (line,) = changes(config(*as_it_was, "algorithm.mask_eos=true"))
    assert line.startswith("algorithm.mask_eos: expected absent, with which iteration-000003 was trained, got True")
    (line,) = changes(config(*as_it_was, "algorithm.ratio_cap=3.0"))
    assert line.startswith("algorithm.ratio_cap: expected None, with which iteration-000003 was trained, got 3.0")
    beside, cap = changes(config(*plain))  # SDPO's current defaults are a different objective
    assert beside.startswith("algorithm.context.feedback_beside_sibling: expected True, with which iteration-000003")
    assert cap.startswith("algorithm.ratio_cap: expected None, with which iteration-000003 was trained, got 2.0")


def test_the_ratio_cap_of_grpo_is_no_weight_of_a_divergence(tmp_path):
    """It is a different key of the same name, and was never null."""
    where = (f"run.dir={tmp_path}", "run.name=r", "run.resume=auto", "algorithm={name: grpo}", "teacher=null")
    folder = tmp_path / "r" / "checkpoints" / "iteration-000003"
    folder.mkdir(parents=True)
    save_config(as_run(config(*where)), folder)
    saved = json.loads((folder / FILE).read_text())
    del saved["algorithm"]["ratio_cap"]
    (folder / FILE).write_text(json.dumps(saved))
    assert changes(config(*where)) == []


def test_each_changed_key_is_a_line_and_a_section_may_be_named_whole(resumed):
    change = ("algorithm={name: grpo, group_size: 8}", "teacher=null")
    keys = {line.split(":")[0] for line in resumed(change)}
    assert {"algorithm.name", "teacher.backend", "teacher.path"} <= keys
    assert resumed((*change, "run.accept_changes=[algorithm, teacher]")) == []


@pytest.fixture
def with_data(tmp_path):
    """A function from data rows to the changes that prevent resuming a run that was trained on ROWS."""
    path = tmp_path / "train.jsonl"

    def lines(rows, *overrides):
        where = (f"run.dir={tmp_path}", "run.name=r", "run.resume=auto", f"data.path={path}", *overrides)
        folder = tmp_path / "r" / "checkpoints" / "iteration-000003"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        old = config(*where[:4])
        save_config(as_run(old), folder)
        save_data(asdict(load_source(old.data, load_tokenizer("builtin:student")).identity), folder)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return changes(config(*where))

    return lines


ROWS = [{"prompt": f"reverse: {word}", "answer": word[::-1], "level": 1} for word in ("abc", "de", "fgh")]


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        (ROWS[:2], 2),
        ([*ROWS, ROWS[0]], 4),
        ([*ROWS[:2], ROWS[2] | {"answer": "hgh"}], 3),
        ([*ROWS[:2], ROWS[2] | {"level": 2}], 3),
        (ROWS[::-1], 3),
    ],
)
def test_other_data_under_the_same_path_is_refused_until_it_is_named(with_data, tmp_path, rows, count):
    (line,) = with_data(rows)
    parts = (f"{tmp_path}/train.jsonl", f"{count} rows (SHA-256 ", "3 rows (SHA-256 ", "iteration-000003")
    assert_lines([line], ("data.path: ", *parts, "run.accept_changes=[data.path]"))
    assert with_data(rows, "run.accept_changes=[data.path]") == [] == with_data(rows, "run.accept_changes=[data]")


def test_the_same_data_goes_on_however_it_is_written(with_data):
    assert with_data(ROWS) == []
    assert with_data([dict(reversed(row.items())) for row in ROWS]) == []


def test_a_changed_key_of_data_is_reported_without_the_changed_rows(with_data):
    (line,) = with_data(ROWS, "data.limit=2")
    assert_lines([line], ("data.limit: ", 2))
    assert with_data(ROWS, "data.limit=2", "run.accept_changes=[data.limit]") == []


def test_what_is_held_out_is_not_changed_in_silence(with_data):
    """A student that was trained on a prompt cannot be evaluated on it."""
    (line,) = with_data(ROWS, "eval.fraction=0.5")
    assert_lines([line], ("eval.fraction: expected None", "iteration-000003", "got 0.5"))
    assert with_data(ROWS, "eval.fraction=0.5", "run.accept_changes=[eval.fraction]") == []
    assert with_data(ROWS, "eval.samples=9", "eval.every=3") == [], "the other keys of the section may change"


def test_a_key_that_does_not_change_the_rows_does_not_excuse_other_rows(with_data):
    accepted = ("data.max_prompt_tokens=99", "run.accept_changes=[data.max_prompt_tokens]")
    assert with_data(ROWS, *accepted) == []
    (line,) = with_data(ROWS[:2], *accepted)
    assert line.startswith("data.path: ") and "got 2 rows" in line
    columns = ("data.privileged_column=level", "run.accept_changes=[data.privileged_column]")
    assert with_data(ROWS, *columns) == []


def test_the_digest_of_a_row_outlives_new_fields():
    """Old checkpoints keep the digest of these very bytes."""
    row = {"where": "f:1", "id": "0", "prompt": "p", "answer": "a", "meta": {"level": 1}}
    row |= dict.fromkeys(("privileged", "completion", "rejected", "tools"))
    old = (
        b'{"answer": "a", "completion": null, "id": "0", "meta": {"level": 1}, "privileged": null, "prompt": "p", '
        b'"rejected": null, "tools": null}'
    )
    assert Row(**row).canonical() == old
    later = make_dataclass("Later", [("images", "str | None", None)], bases=(Row,), frozen=True, kw_only=True)
    assert later(**row).canonical() == old
    assert later(**row, images="x").canonical() != old


def test_a_checkpoint_from_before_there_was_a_digest_goes_on(resumed):
    assert resumed(()) == []


def test_a_key_that_is_newer_than_the_checkpoint_was_its_default(resumed, tmp_path):
    assert resumed(()) == []
    file = tmp_path / "r" / "checkpoints" / "iteration-000003" / "config.json"
    saved = json.loads(file.read_text())
    for key in ("special_tokens", "messages", "template_variables", "tools_column"):
        del saved["data"][key]
    file.write_text(json.dumps(saved))
    where = (f"run.dir={tmp_path}", "run.name=r", "run.resume=auto")
    (line,) = changes(config(*where))
    assert line.startswith("data.special_tokens: expected tokens, with which iteration-000003 was trained, got text; ")
    where = (*where, "data.special_tokens=tokens")  # at that time a spelled special token was always the token
    assert changes(config(*where)) == []
    (line,) = changes(config(*where, "data.template_variables={thinking: true}"))
    assert_lines([line], ("data.template_variables.thinking: ", "True"))


def test_a_checkpoint_of_a_run_knows_its_data(tmp_path):
    """The loader saves the same identity that a resumed run compares."""
    settings = config(f"run.dir={tmp_path}", "run.name=r", "run.resume=auto", "data.limit=64")
    loader = RolloutLoader(settings, build_algorithm(settings))
    folder = tmp_path / "r" / "checkpoints" / "iteration-000001"
    folder.mkdir(parents=True)
    loader.save(folder)
    save_config(as_run(settings), folder)
    assert json.loads((folder / "data.json").read_text())["rows"] == 64
    assert changes(settings) == []


def test_without_a_checkpoint_nothing_is_compared(tmp_path):
    assert changes(config(f"run.dir={tmp_path}", "run.resume=auto")) == []


def test_a_checkpoint_without_its_configuration_is_refused(tmp_path):
    (tmp_path / "iteration-000001").mkdir()
    (line,) = changes(config(f"run.resume={tmp_path / 'iteration-000001'}"))
    assert_lines([line], ("run.resume: ", "iteration-000001", "config.json"))


def test_a_folder_of_something_else_is_no_checkpoint():
    """A model's folder has a config.json too."""
    (line,) = changes(config(f"run.resume={resolve('builtin:student')}"))
    assert_lines([line], ("run.resume: ", "checkpoint", "never, auto", "<run>/checkpoints/iteration-…"))


def leaves(tree, above=""):
    """The dotted keys of a configuration; the sections in a list are numbered."""
    for name, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def test_the_keys_that_may_change_exist():
    """Checked in a full configuration, so that renaming a key does not silently change whether it may change."""
    alone = "backend: served, path: 'builtin:teacher', urls: ['http://h:1']"
    local = "{backend: local, name: b, path: 'builtin:teacher'}"
    keys = set(
        leaves(
            config(f"teacher={{backend: routed, teachers: [{{name: a, {alone}}}, {local}]}}").model_dump(mode="json")
        )
    )
    free = {key for key in keys if FREE.fullmatch(key)}
    sections = ("log", "eval", "checkpoint", "rollout.server", "teacher.teachers.0.server")
    for section in sections:
        below = {key for key in keys if key.startswith(f"{section}.") and not key.startswith("eval.fraction")}
        assert below and below <= free, section
    assert {key for key in free if not key.startswith(tuple(f"{section}." for section in sections))} == {
        *("run.dir", "run.name", "run.iterations", "run.resume", "run.accept_changes"),
        *("trainer.devices", "trainer.num_nodes", "reward.workers", "reward.timeout_s"),
        *("teacher.teachers.0.url", "teacher.teachers.0.urls"),
    }
    assert {"teacher.url", "teacher.server.launch"} <= {
        key for key in leaves(config(f"teacher={{{alone}}}").model_dump(mode="json")) if FREE.fullmatch(key)
    }


@pytest.fixture
def gpus(monkeypatch):
    """A function that gives this machine a GPU, or takes it away."""
    return lambda there: monkeypatch.setattr(torch.cuda, "is_available", lambda: there)


def test_another_kind_of_hardware_does_not_change_the_precision_in_silence(gpus, tmp_path):
    """A checkpoint records what `auto` was. Both directions, and back on the same kind of hardware."""
    auto = ("trainer.accelerator=auto",)
    for there, was, now in ((False, "fp32", "bf16"), (True, "bf16", "fp32")):
        gpus(there)
        folder = tmp_path / "r" / "checkpoints" / "iteration-000003"
        folder.mkdir(parents=True, exist_ok=True)
        settings = config(*auto, f"run.dir={tmp_path}", "run.name=r", "run.resume=auto")
        save_config(as_run(settings), folder)
        assert changes(settings) == []
        gpus(not there)
        (line,) = changes(settings)
        assert_lines([line], ("trainer.precision: ", f"expected {was}", "iteration-000003", f"got {now}"))
        with_key = settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"precision": was})})
        assert changes(with_key) == []
        accepted = settings.run.model_copy(update={"accept_changes": ["trainer.precision"]})
        assert changes(settings.model_copy(update={"run": accepted})) == []
