"""The page of a run: self-contained, bounded, honest about gaps, and safe with any text that a model writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import CONFIG, long_run, rollout, write_lines

from rlkd.report import main
from rlkd.reporting.metric_reference import METRICS
from rlkd.reporting.report_data import report_data
from rlkd.reporting.report_page import write_report
from rlkd.storage.run_folder import save_stage_names

ROWS = [
    {"iteration": 0, "eval/greedy": 0.0625, "eval/avg@k": 0.05, "eval/pass@k": 0.125},
    {"iteration": 1, "reward/mean": 0.25, "loss": 0.5, "grad_norm": 1.0, "time/total": 2.0, "lr": 1e-6},
    {"iteration": 2, "reward/mean": 0.5, "loss": None, "grad_norm": float("nan"), "time/total": 2.0, "lr": 1e-6},
    {"iteration": 3, "reward/mean": 0.75, "loss": 0.25, "grad_norm": float("inf"), "time/total": 2.0, "lr": 1e-6},
    {"iteration": 4, "reward/mean": 0.875, "loss": 0.125, "grad_norm": 3.0, "time/total": 2.0, "lr": 1e-6,
     "eval/greedy": 0.75, "eval/avg@k": 0.5, "eval/pass@k": 0.9375, "my/<figure>": 3},
]  # fmt: skip
NASTY = "</script><script>alert(1)</script><!--<script> & \ud800 \u2028 %%data%% <img src=x onerror=alert(2)>"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return a_run(tmp_path / "tiny-kdrl")


def a_run(folder: Path, rows: list[dict[str, object]] = ROWS, iterations: int = 4) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(name=folder.name, iterations=iterations))
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "rollouts" / "000004-rank0.jsonl", [rollout(4, n, [NASTY, "b"]) for n in range(8)])
    return folder


class Page(HTMLParser):
    """The elements, attributes and texts that a browser sees; asserts that all elements are closed in order."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(self.source)
        self.close()
        assert not self.open, f"left open: {self.open}"
        self.data = json.loads(self.texts["script"][0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def tiles(folder: Path) -> dict[str, tuple[str, str]]:
    """Label → (value, detail) of the first screen."""
    return {tile["label"]: (tile["value"], tile["detail"]) for tile in report_data([folder])["runs"][0]["tiles"]}


def panels(data: dict) -> dict[str, dict]:
    return {panel["title"]: panel for section in data["sections"] for panel in section["panels"]}


def test_nothing_that_a_model_wrote_becomes_markup(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    assert page.tags.count("script") == 2 and not {"img", "figure"} & set(page.tags)
    (sample, *_) = page.data["runs"][0]["samples"]
    assert sample["tokens"] == [NASTY, "b"], "as it was written, half a surrogate pair included"
    assert page.source.count("alert(") == 0 or "<script>alert" not in page.source
    assert len(re.findall(r"</script", page.source)) == 2


def test_the_page_runs_only_its_own_script_and_fetches_nothing(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    (policy,) = [value for name, value in page.attributes if name == "content" and "default-src" in (value or "")]
    assert policy is not None and policy.startswith("default-src 'none'; ") and policy.endswith("connect-src 'none'")
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy), "neither 'unsafe-inline' nor a host"
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "srcset", "onload"} & {name for name, _ in page.attributes}
    style = "".join(page.texts["style"])
    assert "url(" not in style and "@import" not in style


def test_every_metric_that_is_declared_has_its_plot_and_the_rest_is_among_the_others(run_dir: Path) -> None:
    names = [*METRICS, "tokens/of_my_own"]
    write_lines(run_dir / "metrics.jsonl", [{"iteration": i + 1} | dict.fromkeys(names[1:], i) for i in range(2)])
    data = report_data([run_dir])
    assert data["sections"][-1]["title"] == "Other metrics"
    shown = {key: title for title, panel in panels(data).items() for key in panel["keys"]}
    expected = {name: metric.panel or metric.title for name, metric in METRICS.items() if metric.plotted}
    assert shown == expected | {"tokens/of_my_own": "tokens/of_my_own"}
    assert set(data["runs"][0]["series"]) == set(shown)


def test_what_never_changes_is_folded_away(run_dir: Path) -> None:
    flat = {title for title, panel in panels(report_data([run_dir])).items() if panel["flat"]}
    assert flat == {"Learning rate", "Whole iteration"}, "a metric with one point is no constant"


def test_the_first_screen_compares_before_and_after(run_dir: Path) -> None:
    shown = tiles(run_dir)
    assert shown["Accuracy, greedy"] == ("6.2% → 75.0%", "+68.8 points, iteration 0 → 4")
    assert shown["avg@4"][0] == "5.0% → 50.0%" and shown["pass@4"][0] == "12.5% → 93.8%"
    assert shown["Reward"] == ("0.375 → 0.812", "means of the first and last 2 iterations")
    assert shown["Loss"][0] == "0.5 → 0.125" and shown["Iterations"] == ("4 in 8 s", "of 4, 2 s each")
    assert report_data([run_dir])["runs"][0]["notes"] == []


def test_values_that_are_not_finite_are_gaps(run_dir: Path) -> None:
    series = report_data([run_dir])["runs"][0]["series"]
    assert series["loss"]["y"] == [0.5, None, 0.25, 0.125] and series["loss"]["missing"] == 1
    assert series["grad_norm"]["y"] == [1.0, None, None, 3.0] and series["grad_norm"]["missing"] == 2
    assert series["eval/greedy"]["x"] == [0, 4], "iterations between evaluations are no gap"


def test_the_stages_of_a_run_are_one_page(tmp_path: Path) -> None:
    folder = tmp_path / "recipe"
    a_run(folder / "sft", ROWS[:3], iterations=2)
    a_run(folder / "kdrl", ROWS)
    save_stage_names(folder, ["sft", "kdrl", "not_begun"])
    (run,) = report_data([folder])["runs"]
    assert [(stage["name"], stage["start"], stage["done"]) for stage in run["stages"]] == [
        ("sft", 0, 2),
        ("kdrl", 2, 4),
    ]
    assert run["series"]["reward/mean"]["x"] == [1, 2, 3, 4, 5, 6]
    assert run["series"]["eval/greedy"]["x"] == [0, 2, 6]
    assert {sample["at"] for sample in run["samples"] if sample["stage"] == 1} == {6}
    assert tiles(folder)["Accuracy, greedy"] == ("6.2% → 75.0%", "+68.8 points, iteration 0 → 6")
    assert write_report(folder) == folder / "report.html"


def test_runs_laid_over_each_other_have_names_of_their_own(tmp_path: Path) -> None:
    first, second = a_run(tmp_path / "a" / "x"), a_run(tmp_path / "b" / "x", ROWS[:3])
    data = report_data([first, second])
    assert [run["label"] for run in data["runs"]] == ["a/x", "b/x"]
    assert panels(data)["Whole iteration"]["flat"] and not panels(data)["Reward"]["flat"]
    assert write_report(first, second) == tmp_path / "compare.html"
    with pytest.raises(ValueError, match="expected different runs"):
        report_data([first, first])


def test_a_constant_that_differs_between_runs_is_no_less_constant(tmp_path: Path) -> None:
    rows = [[{"iteration": i + 1, "lr": rate} for i in range(3)] for rate in (1e-6, 1e-5)]
    folders = [a_run(tmp_path / name, some) for name, some in zip("ab", rows, strict=True)]
    assert panels(report_data(folders))["Learning rate"]["flat"]


MIB = 2**20


def test_the_page_of_a_long_run_is_below_4_mib(tmp_path: Path) -> None:
    """10,000 iterations of all metrics; completions of 2,500 tokens."""
    names = [name for name, metric in METRICS.items() if metric.plotted]
    folder = long_run(tmp_path / "long", 10_000, names, dumps=20, completion=2500)
    assert (folder / "metrics.jsonl").stat().st_size > 10 * MIB
    size = write_report(folder).stat().st_size
    assert MIB < size < 4 * MIB, size


def test_the_report_of_a_run_in_progress_can_be_written(run_dir: Path) -> None:
    with open(run_dir / "metrics.jsonl", "w") as file:
        file.write(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]) + "\n" + '{"iteration": 2, "rewa')
    notes = report_data([run_dir])["runs"][0]["notes"]
    assert notes == ["The last line of metrics.jsonl was cut off and is left out.", "1 of 4 iterations are done."]
    assert tiles(run_dir)["Accuracy, greedy"] == ("6.2%", "one evaluation, after iteration 0")


def test_a_run_without_rows_or_rollouts_has_a_page(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text("")
    for path in (run_dir / "rollouts").iterdir():
        path.unlink()
    data = Page(write_report(run_dir)).data
    assert data["sections"] == [] and data["runs"][0]["samples"] == []
    assert data["runs"][0]["notes"] == ["0 of 4 iterations are done."]


def test_a_resumed_run_shows_the_later_of_repeated_rows(run_dir: Path) -> None:
    write_lines(run_dir / "metrics.jsonl", [*ROWS, {"iteration": 4, "loss": 0.0625}])
    (run,) = report_data([run_dir])["runs"]
    assert "Iteration 4 has several rows" in run["notes"][0]
    assert run["series"]["loss"]["last"] == 0.0625 and run["series"]["eval/greedy"]["last"] == 0.75


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"iteration": 2, "rewa', "line 2: not JSON"),
        ("[1, 2]", "line 2: expected one JSON object, got [1, 2]"),
        ('{"loss": 1.0}', "line 2: expected an integer as iteration, got None"),
        ('{"iteration": 2, "loss": "low"}', "line 2: expected a number or null as loss, got 'low'"),
    ],
)
def test_a_broken_line_is_named(run_dir: Path, line: str, message: str) -> None:
    (run_dir / "metrics.jsonl").write_text(f"{json.dumps(ROWS[0])}\n{line}\n{json.dumps(ROWS[1])}\n")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        write_report(run_dir)
    assert "metrics.jsonl" in str(caught.value)


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a run directory, got .* has no metrics\.jsonl"):
        write_report(tmp_path)


def test_the_configuration_is_shown_as_it_stands(run_dir: Path) -> None:
    """An interpolation is often a secret: it must stay unresolved, and need not resolve here."""
    assert "${oc.env:NO_SUCH_VARIABLE}" in report_data([run_dir])["runs"][0]["stages"][0]["config"]
    (run_dir / "config.yaml").write_text(
        'run: {name: 7, iterations: "${oc.env:N}"}\nmodel: {path: "${oc.env:M}"}\nalgorithm: {name: grpo}\n'
    )
    (run,) = report_data([run_dir])["runs"]
    assert run["stages"][0]["student"] == "${oc.env:M}" and run["stages"][0]["planned"] == "${oc.env:N}"
    assert tiles(run_dir)["Iterations"][1].startswith("of ${oc.env:N}") and "avg@4" in tiles(run_dir)


@pytest.mark.process
def test_the_command_needs_no_torch_and_ends_a_mistake_in_one_line(run_dir: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "rlkd.report"]
    good = subprocess.run([*command, str(run_dir)], capture_output=True, text=True, timeout=60)
    assert good.returncode == 0 and good.stdout.strip() == str(run_dir / "report.html")
    assert "rlkd.reporting.report_page" in good.stderr and "torch" not in good.stderr
    bad = subprocess.run([sys.executable, "-m", "rlkd.report", "no-such"], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 2 and len(bad.stderr.splitlines()) == 1 and "got no-such, which" in bad.stderr


def test_several_runs_and_a_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(a_run(tmp_path / name)) for name in "ab"]
    assert main([*folders, "--out", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "both.html")
    assert len(Page(tmp_path / "both.html").data["runs"]) == 2


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["x", "--port=1"], "--port"),
        (["x", "y", "--serve"], "--serve"),
        (["no-such", "--serve"], "got no-such"),
        (["no-such", "--out", "/no/such/folder/x.html"], "got no-such"),
        (["{run}", "--out", "/no/such/folder/x.html"], "/no/such/folder"),
        ([], "runs"),
    ],
)
def test_mistakes_are_one_line(
    run_dir: Path, options: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([option.replace("{run}", str(run_dir)) for option in options]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and part in said
