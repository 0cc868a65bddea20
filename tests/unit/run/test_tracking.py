"""Settings that Weights & Biases would reject are reported before the run."""

import pytest
from builders import config

from rlkd.run.tracking import tracking_problems


@pytest.mark.parametrize("mode", ["", "of", "OFFLINE"])
def test_a_mode_that_wandb_does_not_know_is_one_line(monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    (line,) = tracking_problems(config("log.wandb=online"))
    assert line.startswith(f"WANDB_MODE: got {mode!r}; W&B: Input should be 'online', 'offline', ")
    assert line.endswith("correct the variable or unset it, or set log.wandb: off")
    assert tracking_problems(config("log.wandb=off")) == []


def test_other_variables_of_wandb(monkeypatch):
    for mode in ("online", "offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert tracking_problems(config("log.wandb=online")) == []
    monkeypatch.setenv("WANDB_BASE_URL", "foo")
    (line,) = tracking_problems(config("log.wandb=offline"))
    assert line.startswith("WANDB_BASE_URL: got 'foo'; W&B: Input should be a valid URL")


def test_a_wrong_key_is_not_shown(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", " a secret that is no key ")
    (line,) = tracking_problems(config("log.wandb=online"))
    assert line.startswith("log.wandb: W&B: API key cannot start or end with whitespace") and "secret" not in line
