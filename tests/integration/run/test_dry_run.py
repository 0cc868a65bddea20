"""`--dry-run` loads, publishes and calls the rewards, and leaves nothing behind."""

import re

import pytest
from runs import ROOT, arguments, start, train, train_ranks

pytestmark = pytest.mark.process


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_dry_run_ends_before_the_first_rollout(ranks, tmp_path):
    words = [*arguments(ranks, tmp_path / "small"), "--dry-run"]
    out = train(words, tmp_path) if ranks == 1 else train_ranks(2, words, tmp_path)[0]
    reward, last = out.splitlines()[-2:]
    assert reward.startswith("row train-") and reward.endswith(", which is the answer, is 1")
    assert last == "dry run: models are loaded, servers answer, weights are published; nothing was sampled"
    assert not [path for path in tmp_path.rglob("*") if "small" in str(path)], "it left something behind"


def test_a_reward_that_raises_is_found(tmp_path):
    (tmp_path / "broken.py").write_text("def reward(completion, *, answer, prompt, meta):\n    return meta['points']\n")
    argv = arguments(1, tmp_path / "small", "reward.functions=[{name: 'broken:reward'}]")
    argv[1] = str(ROOT / argv[1])
    run = start([*argv, "--dry-run"], tmp_path, cwd=tmp_path)
    assert run.wait(300) == 1
    line = r"^stopped: the rewards of row train-\d+, for the completion '\w+': .*KeyError: 'points'"
    assert re.search(line, run.err.read_text(), re.MULTILINE), run.err.read_text()
