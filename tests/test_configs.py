"""Every shipped config loads, and trains two iterations with tiny models."""

import json
import re
from pathlib import Path

import pytest
import yaml

from rlkd.config_file import ConfigError
from rlkd.stages import load_stages
from rlkd.train import run_stages

FOLDER = Path(__file__).parents[1] / "configs"
SERVED = ("quickstart_vllm.yaml",)  # the command of its own test
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


def files(config: Path) -> list[str]:
    """The files of the command in the config's header; itself, where it stands alone."""
    header = "".join(line for line in config.read_text().splitlines(keepends=True) if line.startswith("#"))
    named = re.findall(r"--config configs/(\S+)", header)
    return [str(FOLDER / name) for name in (named if config.name in named else [config.name])]


@pytest.mark.process
@pytest.mark.parametrize("config", sorted(p.name for p in FOLDER.glob("*.yaml") if p.name not in SERVED))
def test_a_shipped_config_trains(config, tmp_path, monkeypatch):
    paths = files(FOLDER / config)
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
        assert (folder / "hf" / "model.safetensors").exists()


def test_a_config_leaves_open_only_what_its_command_gives():
    for config in FOLDER.glob("*.yaml"):
        header = config.read_text()
        try:
            load_stages(files(config), [])
        except ConfigError as error:
            missing = [line.split(": is ???")[0].split(": ")[-1] for line in error.lines]
            assert all(": is ???, " in line for line in error.lines), error.lines
            assert all(f"{key}=…" in header for key in missing), missing


def test_headers_name_the_file_itself():
    for config in FOLDER.glob("*.yaml"):
        text = config.read_text()
        assert text.startswith("#") and files(config)[-1].endswith(config.name)
