"""Fixtures for all tests, and the switch between a test's short form and its whole one."""

import pytest
from vllm_fixtures import policy_path, policy_server

__all__ = ["policy_path", "policy_server"]


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="the whole of the tests that `make test` only begins")


@pytest.fixture(scope="session")
def soak(request) -> bool:
    return request.config.getoption("--soak")
