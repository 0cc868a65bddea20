"""Weights & Biases cannot be reached."""

import pytest
from run_results import assert_same_run
from runs import ENV, arguments, train

pytestmark = [pytest.mark.process, pytest.mark.soak]  # W&B takes 15 s to give up

# No server listens there. The key has the right format, so that W&B tries to connect.
UNREACHABLE = {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}


def test_a_run_without_its_tracker_continues_with_a_warning(undisturbed, tmp_path):
    folder = tmp_path / "run"
    train(arguments(1, folder, "run.iterations=6", "log.wandb=online"), tmp_path, env=ENV | UNREACHABLE)
    said = [line for line in (tmp_path / "err.txt").read_text().splitlines() if line.startswith("log.wandb: ")]
    assert len(said) == 1 and f"wandb sync {folder}/wandb/offline-*" in said[0]
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert_same_run(folder, undisturbed, 6)
    secret = UNREACHABLE["WANDB_API_KEY"]
    for path in (p for p in folder.rglob("*") if p.is_file()):
        assert secret.encode() not in path.read_bytes(), path
