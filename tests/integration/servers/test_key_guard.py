"""The key of our servers: required on every route, sent by the client, and never written anywhere."""

import asyncio
import re
import socket

import httpx
import pytest
from vllm_fixtures import KEY

from rlkd.servers.auth import KeyGuard
from rlkd.servers.client import ServerError, VLLMClient
from rlkd.servers.responses import WeightInfo


@pytest.mark.server
def test_a_stranger_gets_401_on_every_route(policy_server):
    """The routes come from the server itself. It listens on an address that others can reach, if there is one."""
    known = VLLMClient(policy_server.url, 30.0, KEY)
    listed = re.findall(r"Route: (/\S*), Methods: (.*)", policy_server.log.read_text())
    routes = [(method, path) for path, methods in listed for method in methods.split(", ")]
    assert {"/update_weights", "/pause", "/v1/completions", "/inference/v1/generate"} <= {path for _, path in routes}
    routes += [("GET", "/nowhere")]
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        with httpx.Client(base_url=policy_server.url, headers=header, trust_env=False, timeout=60) as stranger:
            answers = {f"{method} {path}": stranger.request(method, path).status_code for method, path in routes}
        assert {route for route, code in answers.items() if code != 401} == {"GET /health"}
    assert len(routes) > 50
    assert known.healthy() and VLLMClient(policy_server.url, 30.0).healthy(), "/health needs no key"
    assert known.get("/weight_info", WeightInfo), "the server is unchanged and running"
    with pytest.raises(ServerError, match="answered 401: expected the key of this server"):
        VLLMClient(policy_server.url, 30.0, "wrong").weight_version()
    known.close()


@pytest.mark.server
def test_the_key_is_in_no_log_and_on_no_command_line(policy_server):
    assert KEY not in policy_server.log.read_text()
    with open(f"/proc/{policy_server.pid}/cmdline") as file:
        assert KEY not in file.read()


@pytest.mark.server
def test_it_listens_on_its_own_address_only(policy_server):
    host, port = policy_server.url.removeprefix("http://").split(":")
    others = {"127.0.0.1", "127.0.0.2"} - {host}
    for address in others:
        with socket.socket() as probe:
            assert probe.connect_ex((address, int(port))) != 0, address


def guarded(monkeypatch, scope):
    """(the response of a guarded application, whether the request reached it)."""
    monkeypatch.setenv("RLKD_SERVER_KEY", "right")
    reached, said = [], []

    async def app(scope, receive, send):
        reached.append(scope["type"])

    async def send(message):
        said.append(message)

    asyncio.run(KeyGuard(app)(scope, None, send))
    return reached, [message.get("status", message["type"]) for message in said]


def test_no_protocol_and_no_second_header_gets_round_it(monkeypatch):
    right, wrong = (b"authorization", b"Bearer right"), (b"authorization", b"Bearer wrong")
    assert guarded(monkeypatch, {"type": "http", "path": "/x", "headers": [right]}) == (["http"], [])
    assert guarded(monkeypatch, {"type": "http", "path": "/health", "headers": []}) == (["http"], [])
    assert guarded(monkeypatch, {"type": "lifespan"}) == (["lifespan"], [])
    for headers in ([], [wrong], [wrong, right], [right, wrong]):
        refused = guarded(monkeypatch, {"type": "http", "path": "/x", "headers": headers})
        assert refused == ([], [401, "http.response.body"])
        refused = guarded(monkeypatch, {"type": "websocket", "path": "/v1/realtime", "headers": headers})
        assert refused == ([], ["websocket.close"])
    for path in ("/health/", "//health", "/health/../pause", "/HEALTH"):
        assert guarded(monkeypatch, {"type": "http", "path": path, "headers": []})[0] == []


@pytest.mark.parametrize("key", [None, ""])
def test_a_server_without_a_key_does_not_start(monkeypatch, key):
    monkeypatch.delenv("RLKD_SERVER_KEY") if key is None else monkeypatch.setenv("RLKD_SERVER_KEY", key)
    with pytest.raises(ValueError, match="RLKD_SERVER_KEY: expected the server's key, got nothing; set"):
        KeyGuard(None)
