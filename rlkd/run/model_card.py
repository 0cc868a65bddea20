"""The model card of an exported student: its README.md, in the form that the Hugging Face hub shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlkd import __version__
from rlkd.algorithms.registry import algorithm_class
from rlkd.config.schema import Config, DataConfig
from rlkd.data.heldout import heldout
from rlkd.storage.run_folder import seen_by

CARD = "README.md"

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MEASURED = {
    "eval/greedy": "greedy",
    "eval/avg@k": "mean of {k} samples at temperature {t:g}",
    "eval/pass@k": "at least one of {k} samples",
}
"""Metric → what it is the share of correct answers of."""
_PRIVATE = ("dir", "resume", "accept_changes")
"""Keys of the section `run` that name places on this machine, and no property of the model."""


def model_card(config: Config, iteration: int, prompts: int, adapter: bool = False) -> str:
    """The README.md of a student after `iteration` iterations.

    What a run did not record is called "not recorded" or "not measured".

    Args:
        prompts: the number of held-out prompts that the run's evaluations measured.
        adapter: whether the card is for the adapter alone, in PEFT's format.
    """
    run_dir, method = Path(config.run_dir), method_of(config)
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    front["tags"] = ["rlkd", config.algorithm.name.rpartition(":")[2].lower()]
    if _on_hub(config.model.path):
        front["base_model"] = config.model.path
    if _on_hub(config.data.path):
        front["datasets"] = [path for path in (config.data.path, *config.data.mix) if _on_hub(path)]
    facts = {
        "Base model": _base(config),
        "Method": method,
        "Teacher": ", ".join(f"`{teacher.path}`" for _, teacher in config.teachers) or f"{config.teacher.backend}",
        "Training data": _named(config.data) + _mixed_in(config.data),
        "Reward": _reward(config),
        "Iterations": f"{iteration}, of {config.rollout.prompts} prompts each",
        "Trained with": code_version(),
    }
    if config.model.lora is not None:
        facts["LoRA"] = f"rank {config.model.lora.r}, alpha {config.model.lora.alpha:g}" + (
            ", for the base model named here" if adapter else ", merged into the weights"
        )
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {config.run.name}\n\n| | |\n|---|---|\n{table}\n"
        f"## Held-out accuracy\n\n{_accuracy(config, prompts)}\n"
        f"## Configuration\n\n{_configuration(run_dir / 'config.yaml')}"
    )


def method_of(config: Config) -> str:
    """The name of the algorithm, and a link to the paper that its docstring names first."""
    algorithm = algorithm_class(config.algorithm.name)
    found = _ARXIV.search(algorithm.__doc__ or "")
    return algorithm.__name__ + (f" ([arXiv {found[1]}](https://arxiv.org/abs/{found[1]}))" if found else "")


def code_version() -> str:
    """The version of rlkd and, in a git checkout, its commit."""
    version = f"rlkd {__version__}"
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=, with uncommitted changes", "--exclude=*"]
    found = subprocess.run([*command, "--abbrev=40"], capture_output=True, text=True)
    return f"{version}, commit {found.stdout.strip()}" if found.returncode == 0 else version  # not git's own checkout


def _base(config: Config) -> str:
    path = config.model.path
    iterations = seen_by(path)
    return f"`{path}`" + (f", which a run of rlkd trained for {iterations} iterations" if iterations else "")


def _reward(config: Config) -> str:
    functions = config.reward.functions
    names = " + ".join((f"{one.weight:g} · " if one.weight != 1 else "") + f"`{one.name}`" for one in functions)
    uses = algorithm_class(config.algorithm.name).uses_rewards
    return names if uses else f"none ({names} measures the accuracy)"


def _named(data: DataConfig) -> str:
    return f"`{data.path}`, split {data.split}"


def _mixed_in(data: DataConfig) -> str:
    return "".join(f", and `{path}` ({share:.0%} of each iteration)" for path, share in data.mix.items())


def _accuracy(config: Config, prompts: int) -> str:
    """A table of the first and the last evaluation in metrics.jsonl."""
    data, path = heldout(config), Path(config.run_dir, "metrics.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row.get("eval/greedy") is not None]
    if not rows or data is None:
        return "Not measured.\n"
    columns = [rows[0], rows[-1]][: len(rows)]
    titles = " | ".join(f"after {row['iteration']} iterations" if row["iteration"] else "before" for row in columns)
    table = f"| share of correct answers | {titles} |\n|---|{'---|' * len(columns)}\n"
    for name, title in _MEASURED.items():
        values = " | ".join(_percent(row, name) for row in columns)
        table += f"| {title.format(k=config.eval.samples, t=config.eval.temperature)} | {values} |\n"
    return f"{_named(data)}: n = {prompts} prompts.\n\n{table}"


def _percent(row: Mapping[str, float | None], name: str) -> str:
    value = row.get(name)
    return "not measured" if value is None else f"{value:.1%}"


def _configuration(file: Path) -> str:
    """The run's config.yaml, in which references such as ${oc.env:X} are not resolved, since they may be secrets."""
    if not file.exists():
        return "Not recorded: the run was started from Python.\n"
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    settings["run"] = {key: value for key, value in settings["run"].items() if key not in _PRIVATE}
    return f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```\n"


def _on_hub(name: str) -> bool:
    """Whether `name` is an id on the hub, which refuses cards that name anything else there."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()
