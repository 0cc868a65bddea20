"""Weights & Biases offline: a run's metrics, its configuration and a table of samples."""

import json

import pytest
from runs import ENV, arguments, train

from rlkd.run.wandb_logger import COLUMNS


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
    assert {table["data"][0][0] for table in read} == {2, 3}, "at every evaluation and at the end"
    for table in read:
        assert table["columns"] == ["iteration", *COLUMNS]
        dump = (folder / "rollouts" / f"{table['data'][0][0]:06d}-rank0.jsonl").read_text().splitlines()
        completions = [json.loads(line)["completion"] for line in dump]
        assert len(table["data"]) == 12 and all(row[2] in completions for row in table["data"])
