"""What is recorded of each token agrees with the run's own metrics, and the report shows it."""

import json

import numpy as np
import pytest
from run_results import rows
from runs import train_small

from rlkd.reporting.samples import samples

pytestmark = pytest.mark.process


def recorded(folder, iteration, ranks):
    """The arrays of all ranks, each as one."""
    files = [np.load(folder / f"tokens/{iteration:06d}-rank{rank}.npz") for rank in range(ranks)]
    return {name: np.concatenate([file[name] for file in files]).astype(float) for name in files[0].files}


@pytest.mark.parametrize(("ranks", "updates"), [(1, 1), (2, 1), (1, 2)])
def test_gaps_and_entropies_are_those_of_the_metrics(tmp_path, ranks, updates):
    folder = tmp_path / "run"
    batches = f"trainer.updates_per_iteration={updates}"
    train_small(ranks, folder, "run.iterations=3", batches, "log.rollouts_every=2", "trainer.micro_batch_tokens=128")
    found = sorted(path.name for path in (folder / "tokens").iterdir())
    assert found == [f"00000{at}-rank{rank}.npz" for at in (1, 3) for rank in range(ranks)]
    for iteration in (1, 3):
        arrays, row = recorded(folder, iteration, ranks), rows(folder)[iteration - 1]
        assert np.abs(arrays["gaps"]).mean() == pytest.approx(row["mismatch/mean"], rel=0.05, abs=1e-9)
        assert np.abs(arrays["gaps"]).max() == pytest.approx(row["mismatch/max"], rel=1e-2)
        assert arrays["lengths"].sum() == len(arrays["gaps"])
        if updates == 1:
            assert arrays["entropies"].mean() == pytest.approx(row["entropy"], rel=1e-2)
        else:
            assert "entropies" not in arrays, "the student changes between the updates"


def test_the_report_gives_each_rollout_its_own(tmp_path):
    folder = tmp_path / "run"
    train_small(1, folder, "run.iterations=1")
    arrays = np.load(folder / "tokens/000001-rank0.npz")
    starts = np.cumsum(arrays["lengths"]) - arrays["lengths"]
    lines = [json.loads(line) for line in (folder / "rollouts/000001-rank0.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(len(lines)))
    assert [len(line["token_ids"]) for line in lines] == arrays["lengths"].tolist()
    shown = samples(folder / "rollouts")
    assert shown
    for sample in shown:
        (row,) = (
            r for r, line in enumerate(lines) if line["token_ids"] == sample["ids"] and line["id"] == sample["id"]
        )
        mine = slice(starts[row], starts[row] + arrays["lengths"][row])
        assert sample["gap"] == pytest.approx(arrays["gaps"][mine].tolist(), rel=1e-3)
        assert sample["entropy"] == pytest.approx(arrays["entropies"][mine].tolist(), rel=1e-3)
