"""Every shipped config loads and trains for two iterations with tiny models."""

import functools
import json
from pathlib import Path

import pytest
import yaml
from runs import config_files

from rlkd.config.load import ConfigError
from rlkd.config_file import load_stages
from rlkd.reporting.metric_reference import METRICS
from rlkd.run.fit import run_stages

FOLDER = Path(__file__).parents[3] / "configs"
SERVED = ("quickstart_vllm.yaml",)  # has its own test
SMALL = (
    "run.dir=runs",
    "run.iterations=2",
    "model.path=builtin:student",
    "data.path=data.jsonl",
    "data.id_column=null",
    "rollout.backend=hf",
    "rollout.server.launch=false",
    "rollout.server.devices=[[]]",
    "rollout.prompts=4",
    "rollout.max_tokens=12",
    "rollout.max_mismatch=0.001",
    "reward.functions=[{name: exact_match}]",
    "trainer.accelerator=cpu",
    "trainer.precision=fp32",
    "eval.every=0",
    "log.progress=false",
    "checkpoint.every=0",
)
SHORTER = {
    "dapo.yaml": ("algorithm.overlong_cache=4", "algorithm.resample_rounds=2"),
    "thinktuning.yaml": ("algorithm.feedback.max_tokens=8",),
}
ROW = {"answer": "cba", "solution": "cba", "chosen": "cba", "rejected": "abc", "topic": "letters"}


@pytest.mark.process
@pytest.mark.parametrize("config", sorted(p.name for p in FOLDER.glob("*.yaml") if p.name not in SERVED))
def test_a_shipped_config_trains(config, tmp_path, monkeypatch):
    paths = config_files(FOLDER / config)
    sections = [yaml.safe_load(Path(path).read_text()) for path in paths]
    teachers = [section["teacher"] for section in sections if "teacher" in section]
    overrides = [*SMALL, *SHORTER.get(config, ())]
    if teachers and teachers[-1]["backend"] == "self":
        overrides.append("teacher.dtype=float32")
    elif teachers:
        overrides.append("teacher={backend: local, path: 'builtin:teacher'}")
    monkeypatch.chdir(tmp_path)
    texts = [f"reverse: {word}" for word in ("abc", "bcd", "cde", "def", "efg", "fgh", "ghi", "hij")]
    rows = [{"prompt": text, "problem": text, "question": text, **ROW} for text in texts]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = load_stages(paths, overrides)
    assert run_stages(stages) == 0
    for stage in stages:
        folder = Path(stage.loaded.config.run_dir)
        figures = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in figures] == [1, 2] and all(row["grad_norm"] < 1e4 for row in figures)
        assert {name for row in figures for name in row} <= METRICS.keys()
        assert (folder / "hf" / "model.safetensors").exists()


def test_a_config_leaves_open_only_what_its_command_gives():
    for config in FOLDER.glob("*.yaml"):
        header = config.read_text()
        try:
            load_stages(config_files(config), [])
        except ConfigError as error:
            missing = [line.split(": is ???")[0].split(": ")[-1] for line in error.lines]
            assert all(": is ???, " in line for line in error.lines), error.lines
            assert all(f"{key}=…" in header for key in missing), missing


def value(config, key):
    """The value of `optim.lr`, or at an iteration of `optim.lr@10`."""
    name, _, iteration = key.partition("@")
    found = functools.reduce(getattr, name.split("."), config)
    return found(int(iteration)) if iteration else found


PAPERS = {
    # arXiv 2503.14476, §4.1, Eq. 13; weight decay and dual clip: the authors' scripts
    "dapo.yaml": {
        "rollout.prompts": 512,
        "rollout.max_tokens": 20480,
        "trainer.updates_per_iteration": 16,
        "algorithm.group_size": 16,
        "algorithm.clip_low": 0.2,
        "algorithm.clip_high": 0.28,
        "algorithm.dual_clip": 10.0,
        "algorithm.overlong_cache": 4096,
        "algorithm.filter": "correct",
        "algorithm.reduction": "token_mean",
        "optim.weight_decay": 0.1,
        "optim.lr@20": 1e-6,
    },
    # arXiv 2306.13649, D(p_T‖p_S)(y|x), a mean over the tokens of y
    "gkd.yaml": {"algorithm.reduction": "sequence_mean", "algorithm.student_share": 0.5, "algorithm.group_size": 1},
    # arXiv 2601.18734v3
    "opsd.yaml": {
        "rollout.prompts": 32,
        "rollout.max_tokens": 1024,
        "rollout.temperature": 1.1,
        "teacher.temperature": 1.1,
        "algorithm.reduction": "sequence_mean",
        "algorithm.divergence.clip": 0.05,
        "optim.max_grad_norm": 0.1,
    },
    # arXiv 2601.20802, the authors' user.yaml and sdpo.yaml
    "sdpo.yaml": {
        "rollout.prompts": 32,
        "rollout.max_tokens": 8192,
        "rollout.temperature": 1.0,
        "teacher.temperature": 1.0,
        "teacher.decay": 0.95,
        "data.max_prompt_tokens": 2048,
        "algorithm.group_size": 8,
        "algorithm.context.max_tokens": 10240,
        "algorithm.context.feedback_beside_sibling": False,
        "algorithm.ratio_cap": 2.0,
        "algorithm.divergence.clip": None,
        "optim.lr@0": 0.0,
        "optim.lr@5": 5e-6,
        "optim.lr@10": 1e-5,
        "optim.lr@90": 1e-5,
        "optim.weight_decay": 0.01,
        "optim.max_grad_norm": 1.0,
    },
    # arXiv 2501.16937, the authors' scripts
    "taid.yaml": {
        "rollout.prompts": 64,
        "optim.lr@0": 1e-4,
        "optim.lr@250": 5e-5,
        "optim.lr@500": 0.0,
        "algorithm.t_start": 0.4,
        "algorithm.step": 5e-4,
        "algorithm.momentum": 0.99,
        "algorithm.ratio_cap": None,
    },
    # arXiv 2508.07616, its code
    "thinktuning.yaml": {
        "rollout.prompts": 128,
        "trainer.updates_per_iteration": 4,
        "algorithm.group_size": 5,
        "algorithm.dual_clip": 3.0,
        "optim.lr@0": 1e-6,
    },
    # arXiv 2402.14740
    "rloo.yaml": {
        "algorithm.baseline": "leave_one_out",
        "algorithm.normalise": False,
        "algorithm.reduction": "dr_grpo",
    },
    # arXiv 2503.20783
    "drgrpo.yaml": {"algorithm.normalise": False, "algorithm.reduction": "dr_grpo"},
    # arXiv 2505.24850, §3.2, App. C.3
    "redi.yaml sft": {
        "rollout.prompts": 128,
        "algorithm.reduction": "token_mean",
        "data.max_completion_tokens": 32768,
        "optim.weight_decay": 1e-4,
        "optim.lr@0": 0.0,
        "optim.lr@180": 5e-5,
        "optim.lr@990": 2.5e-5,
        "optim.lr@1800": 0.0,
        "run.iterations": 1800,
    },
    # the same, App. C.4
    "redi.yaml redi": {
        "rollout.prompts": 32,
        "algorithm.alpha": 0.8,
        "algorithm.reduction": "sequence_mean",
        "optim.weight_decay": 1e-4,
        "optim.lr@0": 0.0,
        "optim.lr@166": 1e-6,
        "optim.lr@913": 5e-7,
        "optim.lr@1660": 0.0,
        "run.iterations": 1660,
    },
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_config_named_after_a_paper_has_the_papers_settings(name):
    file, _, stage = name.partition(" ")
    paths = ["model.path=m", "data.path=d"]
    sections = [yaml.safe_load(Path(path).read_text()) for path in config_files(FOLDER / file)]
    if any(section.get("teacher", {}).get("path") == "???" for section in sections):
        paths.append("teacher.path=t")
    found = [s.loaded.config for s in load_stages(config_files(FOLDER / file), paths)]
    config = next(c for c in found if not stage or c.run.name == stage)
    wanted = PAPERS[name]
    assert {key: value(config, key) for key in wanted} == pytest.approx(wanted)


def test_headers_name_the_file_itself():
    for config in FOLDER.glob("*.yaml"):
        text = config.read_text()
        assert text.startswith("#") and config_files(config)[-1].endswith(config.name)
