"""Weights & Biases offline: figures, the run's configuration and a table of samples; and what W&B would refuse."""

import json

import pytest
from builders import config
from runs import ENV, arguments, train

from rlkd.run.wandb_logger import COLUMNS, tracking_problems


@pytest.mark.process
@pytest.mark.long
def test_a_run_leaves_its_configuration_and_samples_but_no_secret(tmp_path):
    folder = tmp_path / "tracked"
    secret = "data.system='${oc.env:SECRET}'"
    few = ("run.iterations=3", "eval.every=2", "eval.prompts=4", "data.max_prompt_tokens=48", "log.wandb=offline")
    environment = ENV | {"SECRET": "openSesame"}
    train([*arguments(1, folder), *few, "trainer.micro_batch_tokens=512", secret], tmp_path, env=environment)
    (log,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    written = log.read_bytes()
    assert b'"path":"builtin:reverse"' in written and b"${oc.env:SECRET}" in written
    assert b"openSesame" not in written
    tables = sorted((folder / "wandb").glob("offline-run-*/files/media/table/samples_*.table.json"))
    read = [json.loads(table.read_text()) for table in tables]
    assert {table["data"][0][0] for table in read} == {2, 3}, "where there is an evaluation, and at the end"
    for table in read:
        assert table["columns"] == ["iteration", *COLUMNS]
        dump = (folder / "rollouts" / f"{table['data'][0][0]:06d}-rank0.jsonl").read_text().splitlines()
        completions = [json.loads(line)["completion"] for line in dump]
        assert len(table["data"]) == 12 and all(row[2] in completions for row in table["data"])


@pytest.mark.parametrize("mode", ["", "of", "OFFLINE"])
def test_a_mode_that_wandb_does_not_know_is_one_line(monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    (line,) = tracking_problems(config("log.wandb=online"))
    assert line.startswith(f"WANDB_MODE: got {mode!r}; W&B says: Input should be 'online', 'offline', ")
    assert line.endswith("correct the variable or unset it, or set log.wandb: off")
    assert tracking_problems(config("log.wandb=off")) == []


def test_other_variables_of_wandb(monkeypatch):
    for mode in ("online", "offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert tracking_problems(config("log.wandb=online")) == []
    monkeypatch.setenv("WANDB_BASE_URL", "foo")
    (line,) = tracking_problems(config("log.wandb=offline"))
    assert line.startswith("WANDB_BASE_URL: got 'foo'; W&B says: Input should be a valid URL")


def test_a_wrong_key_is_not_shown(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", " a secret that is no key ")
    (line,) = tracking_problems(config("log.wandb=online"))
    assert line.startswith("log.wandb: W&B says: API key cannot start or end with whitespace") and "secret" not in line
