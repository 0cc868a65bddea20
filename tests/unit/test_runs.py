import json

import pytest
from lines import one_line

from rlkd.config_file import load as load_config
from rlkd.runs import load

ROWS = [
    {"iteration": 0, "eval/greedy": 0.25},
    {"iteration": 1, "reward/mean": 0.5, "loss": None},
    {"iteration": 2, "reward/mean": 1, "loss": -0.5, "eval/greedy": 0.75},
]


def rollouts(folder, name, *rewards):
    lines = [json.dumps({"id": str(i), "reward": reward, "token_ids": [1, 2]}) for i, reward in enumerate(rewards)]
    (folder / "rollouts").mkdir(exist_ok=True)
    (folder / "rollouts" / name).write_text("".join(line + "\n" for line in lines))


def test_metrics_are_a_table_by_iteration(finished_run):
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (finished_run / "metrics.jsonl").write_text("".join(lines) + '{"iteration": 3, "rewa')
    metrics = load("runs/x").metrics
    assert list(metrics.index) == [0, 1, 2], "the run is writing the last line"
    assert {str(kind) for kind in metrics.dtypes} == {"float64"}
    assert metrics["eval/greedy"].dropna().to_dict() == {0: 0.25, 2: 0.75}
    assert metrics["loss"].isna().tolist() == [True, True, False]
    assert metrics.loc[2, "reward/mean"] == 1


def test_samples_are_those_of_all_ranks_in_one_iteration(finished_run):
    rollouts(finished_run, "000001-rank0.jsonl", 0.0)
    rollouts(finished_run, "000002-rank0.jsonl", 1.0, None)
    rollouts(finished_run, "000002-rank1.jsonl", 0.5)
    run = load(finished_run)
    assert run.samples()["reward"].fillna(-1).tolist() == [1.0, -1, 0.5] and run.samples()["token_ids"][0] == [1, 2]
    assert run.samples(1)["reward"].tolist() == [0.0]
    with pytest.raises(ValueError, match=one_line("iteration 3", "log.rollouts_every")):
        run.samples(3)


def test_the_configuration_is_the_run_s(finished_run):
    run = load(finished_run)
    assert run.config == load_config([str(finished_run / "config.yaml")]).config and run.config.run.name == "x"
    assert run.metrics.empty


def test_a_folder_of_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=one_line(str(tmp_path), "metrics.jsonl")):
        load(tmp_path)
