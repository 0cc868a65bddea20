"""Fixtures for all tests."""

from vllm_fixtures import policy_path, policy_server

__all__ = ["policy_path", "policy_server"]
