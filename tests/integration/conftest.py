"""The session's vLLM server, for all tests that need one."""

from vllm_fixtures import policy_path, policy_server

__all__ = ["policy_path", "policy_server"]
