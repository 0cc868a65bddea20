"""Weights & Biases offline, and TensorBoard: a run's metrics, its configuration and a table of samples."""

import json

import pytest
from run_results import rows
from runs import ENV, RECIPE, arguments, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_files import records

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


@pytest.mark.process
@pytest.mark.long
def test_stages_are_a_group_and_samples_come_as_often_as_asked(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("log: {progress: false, rollouts_every: 0}", ""))
    given = ["log.wandb=offline", "log.samples_every=2", "log.progress=false"]
    train(["--config", str(tmp_path / "recipe.yaml"), f"run.dir={tmp_path}", *given], tmp_path)
    for stage in ("imitate", "taught", "rewarded"):
        folder = tmp_path / "recipe" / stage
        (log,) = (folder / "wandb").glob("offline-run-*/*.wandb")
        read = records(log)
        (run, *_) = [record.run for record in read if record.HasField("run")]
        assert (run.run_group, run.job_type, run.display_name) == ("recipe", stage, f"recipe/{stage}")
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["rlkd"].startswith("rlkd 0.") and settings["run"]["name"] == stage
        logged = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in read
            if record.HasField("history")
        ]
        assert [row["loss"] for row in logged if "loss" in row] == [row["loss"] for row in rows(folder)]
        assert {row["trainer/global_step"] for row in logged if "samples/path" in row} == {2, len(rows(folder))}
        summary = [item for record in read if record.HasField("summary") for item in record.summary.update]
        assert {"loss", "completion/length"} <= {item.key or item.nested_key[0] for item in summary}


@pytest.mark.process
@pytest.mark.long
def test_tensorboard_has_each_iteration_once_also_of_a_run_that_went_back(tmp_path):
    folder = tmp_path / "tracked"
    few = ("checkpoint.every=2", "eval.every=0", "log.tensorboard=true")
    train(arguments(1, folder, "run.iterations=4", *few), tmp_path)
    train(arguments(1, folder, "run.iterations=6", *few, f"run.resume={folder}/checkpoints/iteration-000002"), tmp_path)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [
        (row["iteration"], pytest.approx(row["loss"])) for row in rows(folder)
    ]
