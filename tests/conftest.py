"""Fixtures for all tests, and the switch between the short and the full form of a test."""

import pytest
from hypothesis import HealthCheck, settings
from vllm_fixtures import policy_path, policy_server

__all__ = ["policy_path", "policy_server"]


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="the whole of the tests that `make test` only begins")


def pytest_configure(config):
    """The cases that hypothesis draws: the same every time in `make test`, different each time in `make soak`."""
    ours = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("short", derandomize=True, **ours)
    settings.register_profile("soak", print_blob=True, **ours)
    settings.load_profile("soak" if config.getoption("--soak") else "short")


def pytest_collection_modifyitems(config, items):
    """Skip tests with the mark `soak` unless --soak is given."""
    if not config.getoption("--soak"):
        left_out = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def soak(request) -> bool:
    return request.config.getoption("--soak")
