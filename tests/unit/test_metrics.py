"""The names of metrics, and the declaration of each."""

import ast
import fnmatch
import re
import runpy

import pytest
from runs import ROOT

from rlkd.distributed import RunStopped
from rlkd.metrics import MetricAccumulator
from rlkd.reporting.metric_reference import METRICS, SECTIONS, panels


def test_a_name_with_two_meanings_is_refused():
    """Only one of the two could be in the row."""
    meter = MetricAccumulator()
    meter.maximum("lr", 1e-6)
    meter.total("lr", 2.0)
    with pytest.raises(RunStopped, match="got lr as total and as maximum"):
        meter.reduce()


# What is declared ----------------------------------------------------------------------------------------------------

WRITERS = ("mean", "total", "maximum", "lap")
"""Methods whose first argument is the name of a metric."""
NAME = re.compile(r"[a-z_]+/[a-z_@]+")


def written() -> set[str]:
    """The names of metrics in the package's code, with * for each part that is only known at run time."""
    found, parts = set(), set()
    for file in (ROOT / "rlkd").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text()))) if file.name != "metric_reference.py" else []
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITERS:
                found |= {pattern(argument) for argument in node.args[:1]}
            if isinstance(node, ast.JoinedStr):
                parts |= set(node.values)
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and node not in parts]
        found |= {text for text in texts if isinstance(text, str) and NAME.fullmatch(text)}
    return {name for name in found if name and not name.startswith(("application/", "text/"))}


def pattern(argument: ast.expr) -> str:
    """The text of a literal or f-string; empty for anything else."""
    if isinstance(argument, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "*" for part in argument.values)
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else ""


def test_every_metric_that_the_package_names_is_declared():
    names = written()
    assert {"grad_norm", "reward/mean", "time/*", "leakage/kl_*", "guided/*_failures"} <= names
    assert not [name for name in names if not fnmatch.filter(METRICS, name)]


def test_every_declared_metric_is_written():
    """Names without a slash may be keys of any dictionary: the runs of shipped configs and the quickstart have them."""
    patterns = written()
    slashed = [name for name in METRICS if "/" in name]
    assert not [name for name in slashed if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    assert set(METRICS) - set(slashed) == {
        *("iteration", "update", "accuracy", "loss", "nll", "entropy", "lr"),
        *("grad_norm", "clip_fraction", "tokens_per_s"),
    }


def test_a_declaration_is_complete_and_consistent():
    assert len(METRICS) == sum(len(metrics) for _, metrics in SECTIONS), "a name is declared once"
    for metric in METRICS.values():
        assert metric.title and metric.help.endswith("."), metric.name
    titles = [panel.title for _, plots in panels() for panel in plots]
    assert len(set(titles)) == len(titles), "two different plots have the same title"
    for _, plots in panels():
        for panel in plots:
            assert {METRICS[name].unit for name in panel.keys} == {panel.note}, f"{panel.title}: one axis, one unit"
    assert {name for _, plots in panels() for panel in plots for name in panel.keys} == {
        name for name, metric in METRICS.items() if metric.plotted
    }


def test_the_page_of_metrics_is_what_its_command_writes():
    """If not: python benchmarks/metrics_reference.py"""
    command = runpy.run_path(str(ROOT / "benchmarks" / "metrics_reference.py"))
    assert command["PAGE"].read_text(encoding="utf-8") == command["page"]()
