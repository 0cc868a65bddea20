"""The README.md of an export: what the run knows, and nothing else."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from builders import config

from rlkd.algorithms.registry import OPTIONS
from rlkd.config_file import load
from rlkd.run.model_card import code_version, method_of, model_card

ROOT = Path(__file__).parents[3]
ROWS = (
    {"iteration": 0, "eval/greedy": 0.125, "eval/avg@k": 0.1, "eval/pass@k": 0.25},
    {"iteration": 1, "reward/mean": 0.3},
    {"iteration": 2, "eval/greedy": 0.5, "eval/avg@k": 0.45, "eval/pass@k": None},
)


def card_of(folder, rows=ROWS, overrides=(), **changes):
    """(front matter, text, the config that it shows) of the card of a run with these rows of metrics."""
    named = [f"run.dir={folder}", "run.name=mine", "eval.samples=8", *overrides]
    loaded = load([str(ROOT / "configs" / "quickstart.yaml")], named)
    (folder / "mine").mkdir()
    (folder / "mine" / "config.yaml").write_text(loaded.text)
    (folder / "mine" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, front, text = model_card(loaded.config, 2, 96, **changes).split("---\n", 2)
    return yaml.safe_load(front), text, yaml.safe_load(re.search(r"```yaml\n(.*)```", text, re.DOTALL)[1])


def test_it_has_the_accuracies_of_the_first_and_the_last_evaluation(tmp_path):
    _, text, _ = card_of(tmp_path)
    assert "split heldout: n = 96 prompts." in text
    assert "| share of correct answers | before | after 2 iterations |" in text
    assert "| greedy | 12.5% | 50.0% |" in text
    assert "| mean of 8 samples at temperature 1 | 10.0% | 45.0% |" in text
    assert "| at least one of 8 samples | 25.0% | not measured |" in text


@pytest.mark.parametrize(
    ("rows", "overrides"),
    [((), ()), (ROWS[1:2], ()), (ROWS[:1], ("data.path=own.jsonl",))],
)
def test_what_was_not_held_out_is_not_measured(tmp_path, rows, overrides):
    _, text, _ = card_of(tmp_path, rows, overrides)
    assert "## Held-out accuracy\n\nNot measured.\n" in text and "%" not in text


def test_it_names_what_the_student_was_made_from(tmp_path):
    front, text, settings = card_of(
        tmp_path, overrides=("reward.functions=[{name: math}, {name: format, weight: 0.5}]", "data.mix={b.jsonl: 0.25}")
    )
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["rlkd", "kdrl"]}
    for line in (
        "# mine",
        "| Base model | `builtin:student` |",
        "| Method | KDRL ([arXiv 2506.02208](https://arxiv.org/abs/2506.02208)) |",
        "| Teacher | `builtin:teacher` |",
        "| Training data | `builtin:reverse`, split train, and `b.jsonl` (25% of each iteration) |",
        "| Reward | `math` + 0.5 · `format` |",
    ):
        assert f"{line}\n" in text
    written = yaml.safe_load((tmp_path / "mine" / "config.yaml").read_text())
    del written["run"]["dir"], written["run"]["resume"], written["run"]["accept_changes"]
    assert settings == written and str(tmp_path) not in text


def test_only_ids_of_the_hub_are_given_to_the_hub(tmp_path, monkeypatch):
    ids = ("model.path=Qwen/Qwen3-0.6B", "data.path=openai/gsm8k")
    lora = ("model.lora={r: 4, alpha: 8}",)
    front, text, _ = card_of(tmp_path, overrides=(*ids, *lora), adapter=True)
    assert (front["base_model"], front["datasets"]) == ("Qwen/Qwen3-0.6B", ["openai/gsm8k"])
    assert front["library_name"] == "peft" and "| LoRA | rank 4, alpha 8, for the base model named here |" in text
    settings = config(*ids)
    monkeypatch.chdir(tmp_path)
    for path in ("Qwen/Qwen3-0.6B", "openai/gsm8k"):
        Path(path).mkdir(parents=True)
    assert not {"base_model", "datasets"} & yaml.safe_load(model_card(settings, 1, 1).split("---")[1]).keys()


def test_secrets_are_not_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hidden")
    _, text, settings = card_of(tmp_path, overrides=("log.project=${oc.env:MY_SECRET}",))
    assert settings["log"]["project"] == "${oc.env:MY_SECRET}" and "hidden" not in text


def test_a_run_from_python_has_no_configuration_to_show(tmp_path):
    text = model_card(config(f"run.dir={tmp_path}"), 1, 0)
    assert "Not measured." in text and "## Configuration\n\nNot recorded: " in text


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_method_s_paper_is_the_one_of_the_readme(name):
    settings = config().model_copy(update={"algorithm": OPTIONS[name].model_construct(name=name)})
    rows = re.findall(r"^\|.*\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    (row,) = [row for row in rows if f"`rlkd/algorithms/{name}.py`" in row or f"`{name}.py`" in row]
    assert re.findall(r"arXiv ([\d.]+)", method_of(settings)) == (
        [] if name == "sft" else re.findall(r"\[([\d.]+)\]", row)
    )


def test_the_commit_is_the_checkout_s():
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f", commit {head.stdout.strip()}" in code_version()
