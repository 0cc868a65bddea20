"""The page of a run is there while it runs, and a recipe has one for all stages."""

import json
import re
import time
from pathlib import Path

import pytest
from runs import RECIPE, arguments, start_ranks, train

pytestmark = pytest.mark.process


def page(path):
    """The data of a page."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_is_written_anew_at_each_evaluation(tmp_path):
    folder = tmp_path / "run"
    settings = ("run.iterations=500", "eval.every=3", "eval.prompts=4", "log.wandb=off")
    (run,) = start_ranks(1, arguments(1, folder, *settings), tmp_path)
    seen, until = set(), time.monotonic() + 120
    while len(seen) < 3 and time.monotonic() < until:
        if (folder / "report.html").exists():
            (shown,) = page(folder / "report.html")["runs"]
            seen.add(shown["stages"][0]["done"])
            assert len(shown["series"]["eval/greedy"]["x"]) == 1 + shown["stages"][0]["done"] // 3
        time.sleep(0.01)
    run.kill()
    assert len(seen) == 3 and all(done % 3 == 0 for done in seen), (seen, run.err.read_text()[-2000:])


def test_the_stages_of_a_recipe_share_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE.replace("rollouts_every: 0", "rollouts_every: 1"))
    said = train(["--config", "recipe.yaml", "run.iterations=1"], "printed")
    assert json.loads(Path("runs/recipe/stages.json").read_text()) == ["imitate", "taught", "rewarded"]
    (shown,) = page(Path("runs/recipe/report.html"))["runs"]
    assert [(stage["name"], stage["start"], stage["done"]) for stage in shown["stages"]] == [
        ("imitate", 0, 1),
        ("taught", 1, 1),
        ("rewarded", 2, 1),
    ]
    assert {sample["stage"] for sample in shown["samples"]} == {0, 1, 2}
    imitated = next(sample for sample in shown["samples"] if sample["stage"] == 0)
    assert set(imitated["authors"]) == {"data"} and set(imitated["gap"]) == {None}, "the student sampled nothing"
    assert "runs/recipe/report.html" in said
    assert all(Path("runs/recipe", stage, "report.html").exists() for stage in ("imitate", "taught", "rewarded"))
