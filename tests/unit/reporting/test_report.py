"""The page of a run: well-formed, self-contained, honest about gaps, and safe with any text that a model writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlkd.reporting.metric_reference import METRICS
from rlkd.reporting.report_page import write_report

CONFIG = """\
run: {name: tiny-kdrl, iterations: 4}
model: {path: "builtin:student"}
teacher: {backend: served, url: "${oc.env:NO_SUCH_VARIABLE}"}
eval: {samples: 4}
algorithm: {name: kdrl, kd: {coef: 0.1}}
"""
ROWS = [
    {"iteration": 0, "eval/greedy": 0.0625, "eval/avg@k": 0.05, "eval/pass@k": 0.125},
    {"iteration": 1, "reward/mean": 0.25, "loss": 0.5, "grad_norm": 1.0, "time/total": 2.0, "lr": 1e-6},
    {"iteration": 2, "reward/mean": 0.5, "loss": None, "grad_norm": float("nan"), "time/total": 2.0, "lr": 1e-6},
    {"iteration": 3, "reward/mean": 0.75, "loss": 0.25, "grad_norm": float("inf"), "time/total": 2.0, "lr": 1e-6},
    {"iteration": 4, "reward/mean": 0.875, "loss": 0.125, "grad_norm": 3.0, "time/total": 2.0, "lr": 1e-6,
     "eval/greedy": 0.75, "eval/avg@k": 0.5, "eval/pass@k": 0.9375, "my/<figure>": 3},
]  # fmt: skip
ROLLOUTS = [
    {
        "iteration": 4, "prompt": f"reverse: ab{i}", "completion": f"<script>alert({i})</script> & \ud800",
        "answer": f"{i}ba", "reward": None if i == 0 else 1.0, "advantage": 0.5, "finish_reason": "stop",
    }
    for i in range(64)
]  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    write_lines(tmp_path / "metrics.jsonl", ROWS)
    (tmp_path / "rollouts").mkdir()
    write_lines(tmp_path / "rollouts" / "9.jsonl", [{"completion": "of an older iteration"}])
    write_lines(tmp_path / "rollouts" / "10.jsonl", ROLLOUTS)
    return tmp_path


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """The tags, attributes and text that a browser sees; asserts that all elements are closed in order."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def svgs(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]

    def plot(self, metric: str) -> ElementTree.Element:
        (plot,) = [svg for svg in self.svgs() if f" {metric} by iteration" in svg.get("aria-label", "")]
        return plot


def curve(plot: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The (x, y) of each unbroken stretch of the first series, faint and bold alike."""
    paths = [element.get("d", "") for element in plot.iter() if element.get("class", "").split()[:1] == ["c0"]]
    return [[tuple(map(float, pair.split(","))) for pair in d[1:].split("L")] for d in paths if d]  # type: ignore[misc]


def test_the_page_is_well_formed_and_every_plot_parses(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    labels = [svg.get("aria-label") for svg in Page(path).svgs() if svg.get("role") == "img"]
    assert labels == [
        "Reward: reward/mean by iteration",
        "Held-out evaluation: eval/greedy, eval/avg@k, eval/pass@k by iteration",
        "Loss: loss by iteration",
        "Learning rate: lr by iteration",
        "Gradient norm: grad_norm by iteration",
        "Whole iteration: time/total by iteration",
        "my/<figure>: my/<figure> by iteration",
    ]


def test_what_is_declared_has_its_plot_and_the_rest_is_among_the_others(run_dir: Path) -> None:
    names = [*METRICS, "tokens/of_my_own"]
    write_lines(run_dir / "metrics.jsonl", [{"iteration": i + 1} | dict.fromkeys(names[1:], 0.5) for i in range(2)])
    labels = [svg.get("aria-label") for svg in Page(write_report(run_dir)).svgs() if svg.get("role") == "img"]
    assert labels.pop() == "tokens/of_my_own: tokens/of_my_own by iteration"
    plots = [label.removesuffix(" by iteration").split(": ", 1) for label in labels]
    expected = {name: metric.panel or metric.title for name, metric in METRICS.items() if metric.plotted}
    assert {name: title for title, shown in plots for name in shown.split(", ")} == expected


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("kd/coef", [0.2] * 30),
        ("kd/coef", [0.2, 0.20000000298, 0.19999999] * 10),  # in single precision, summed in different orders
        ("loss/pg", [1e-9, -2e-9, 3e-10] * 10),  # zero up to rounding
        ("entropy", [0.0] * 30),
    ],
)
def test_equal_values_are_a_flat_line(run_dir: Path, metric: str, values: list[float]) -> None:
    write_lines(run_dir / "metrics.jsonl", [{"iteration": i + 1, metric: value} for i, value in enumerate(values)])
    (points,) = curve(Page(write_report(run_dir)).plot(metric))
    assert len(points) == 30 and len({y for _, y in points}) == 1


def test_small_values_that_do_change_are_no_flat_line(run_dir: Path) -> None:
    write_lines(run_dir / "metrics.jsonl", [{"iteration": i + 1, "lr": 1e-9 * i} for i in range(10)])
    (points,) = curve(Page(write_report(run_dir)).plot("lr"))
    assert len({y for _, y in points}) == 10


def test_the_headline_says_before_and_after(run_dir: Path) -> None:
    text = Page(write_report(run_dir)).text
    for figure in ("tiny-kdrl", "kdrl on builtin:student", "6.2% → 75.0%", "+68.8 points, iteration 0 → 4"):
        assert figure in text
    for figure in ("avg@4 5.0% → 50.0%", "pass@4 12.5% → 93.8%", "4 of 4", "8 s"):
        assert re.sub(r"\s+", " ", figure) in re.sub(r"\s+", " ", text)
    assert "unfinished" not in text


def test_nothing_that_a_model_wrote_becomes_markup(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    assert "script" not in page.tags and "figure>" in page.text
    assert "<script>alert(5)</script> & \\ud800" in page.text
    assert page.text.count("<script>") == 12, "12 samples, evenly spaced over the newest iteration"
    assert "12 of the 64 rollouts in 10.jsonl of iteration 4" in page.text
    assert "of an older iteration" not in page.text


def test_the_page_fetches_nothing(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    source = page.source.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://|//[a-z]|url\(|@import", source)
    assert not {"link", "img", "script", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "srcset", "onload"} & {name for name, _ in page.attributes}


def test_values_that_are_not_finite_leave_gaps(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    assert "nan" not in page.source.lower() and not re.search(r"\binf", page.source)
    loss = page.plot("loss")
    assert [len(stretch) for stretch in curve(loss)] == [2], "iterations 3 and 4; 1 is alone and only has its dot"
    assert len(loss.findall("{*}circle")) == 3
    assert curve(page.plot("grad_norm")) == [] and len(page.plot("grad_norm").findall("{*}circle")) == 2
    assert "1 not finite" in page.text and "2 not finite" in page.text


def test_a_curve_is_drawn_to_scale_and_absent_keys_do_not_break_it(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    (stretch,) = curve(page.plot("reward/mean"))
    xs, ys = [x for x, _ in stretch], [y for _, y in stretch]
    assert [x - xs[0] for x in xs] == pytest.approx([i * (xs[1] - xs[0]) for i in range(4)], abs=0.11)
    rise = [(ys[0] - y) / (ys[0] - ys[-1]) for y in ys]
    assert rise == pytest.approx([0, 0.4, 0.8, 1.0], abs=0.01), "0.25, 0.5, 0.75, 0.875"
    labels = page.plot("reward/mean").findall("{*}text[@class='y']")
    ticks = {label.text: float(label.get("y", "")) - 4 for label in labels}
    assert ticks["0.4"] > ys[1] > ticks["0.6"] > ys[2] > ticks["0.8"] > ys[3], "the axis agrees with the curve"
    evaluations = curve(page.plot("eval/greedy, eval/avg@k, eval/pass@k"))
    assert [len(stretch) for stretch in evaluations] == [2], "iterations between evaluations are no gap"


@pytest.mark.parametrize(
    "values",
    [[0.0], [0.0, 0.0], [5.0, 5.0], [-5.0], [1, 3], [1e-7, 1.0000000000000002e-7], [-1e38, 1e38], [9e299], [None]],
)
def test_every_range_of_values_gives_a_plot(run_dir: Path, values: list[float | None]) -> None:
    write_lines(run_dir / "metrics.jsonl", [{"iteration": i + 1, "loss": v} for i, v in enumerate(values)])
    plot = Page(write_report(run_dir)).plot("loss")
    ticks = [text.text for text in plot.findall("{*}text[@class='y']")]
    assert 2 <= len(ticks) <= 7 and len(set(ticks)) == len(ticks)
    _, _, width, height = map(float, plot.get("viewBox", "").split())
    assert all(0 < x < width and 0 < y < height for stretch in curve(plot) for x, y in stretch)


def test_smoothing_is_drawn_only_with_enough_points_and_says_so(run_dir: Path) -> None:
    assert "bold: mean" not in Page(write_report(run_dir)).text
    rows = [{"iteration": i, "loss": float(i % 2), "lr": 1e-6} for i in range(1, 61)]
    write_lines(run_dir / "metrics.jsonl", rows)
    page = Page(write_report(run_dir))
    assert page.text.count("bold: mean of last 10") == 1, "the loss, not the learning rate"
    raw, mean = curve(page.plot("loss"))
    assert len(raw) == len(mean) == 60
    assert mean[-1][1] == pytest.approx((raw[-1][1] + raw[-2][1]) / 2, abs=0.11)


def test_the_report_of_a_run_in_progress_can_be_written(run_dir: Path) -> None:
    with open(run_dir / "metrics.jsonl", "w") as file:
        file.write(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]) + "\n" + '{"iteration": 2, "rewa')
    text = Page(write_report(run_dir)).text
    assert "last line of metrics.jsonl was cut off" in text
    assert "unfinished: 1 of 4 iterations" in text
    assert "one evaluation, after iteration 0" in text


def test_a_run_without_rows_or_rollouts_has_a_page(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text("")
    for path in (run_dir / "rollouts").iterdir():
        path.unlink()
    (run_dir / "rollouts").rmdir()
    page = Page(write_report(run_dir))
    assert "unfinished: 0 of 4 iterations" in page.text and not page.svgs() and "Samples" not in page.text


def test_a_resumed_run_shows_the_later_of_repeated_rows(run_dir: Path) -> None:
    write_lines(run_dir / "metrics.jsonl", [*ROWS, {"iteration": 4, "loss": 0.0625}])
    page = Page(write_report(run_dir))
    assert "Iteration 4 has several rows" in page.text
    assert "0.0625" in page.text and "75.0%" in page.text


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
    assert "${oc.env:NO_SUCH_VARIABLE}" in Page(write_report(run_dir)).text
    (run_dir / "config.yaml").write_text(
        'run: {name: 7, iterations: "${oc.env:N}"}\nmodel: {path: "${oc.env:M}"}\nalgorithm: {name: grpo}\n'
    )
    text = Page(write_report(run_dir)).text
    assert "grpo on ${oc.env:M}" in text and "of ${oc.env:N}" in text and "avg@4" in text


@pytest.mark.process
def test_the_command_needs_no_torch_and_ends_a_mistake_in_one_line(run_dir: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "rlkd.report"]
    good = subprocess.run([*command, str(run_dir)], capture_output=True, text=True, timeout=60)
    assert good.returncode == 0 and good.stdout.strip() == str(run_dir / "report.html")
    assert "rlkd.reporting.svg_plots" in good.stderr and "torch" not in good.stderr
    bad = subprocess.run([sys.executable, "-m", "rlkd.report", "no-such"], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 2 and len(bad.stderr.splitlines()) == 1 and "got no-such, which" in bad.stderr
