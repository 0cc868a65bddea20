"""Which server gets which request, and what happens when one is lost. The servers are stubs, the requests are real."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlkd.config.schema import ServerConfig
from rlkd.servers.client import ServerError, ServerLost
from rlkd.servers.command import ServerRole
from rlkd.servers.pool import ServerPool
from rlkd.servers.responses import Answer

ROLE = ServerRole(name="policy", model="m", max_model_len=8)


class Stub:
    """Answers /v1/models, and POST /work with its own name after `delay` seconds; counts concurrent requests."""

    def __init__(self, name, delay=0.0, port=0):
        stub = self
        self.name, self.delay, self.now, self.most, self.done = name, delay, 0, 0, 0
        self.code = 200
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(200, {"data": [{"id": "m", "root": "m", "parent": None, "max_model_len": 8}]})

            def do_POST(self):
                self.rfile.read(int(self.headers["content-length"]))
                with lock:
                    stub.now += 1
                    stub.most = max(stub.most, stub.now)
                time.sleep(stub.delay)
                with lock:
                    stub.now -= 1
                    stub.done += 1
                self.answer(stub.code, {"by": stub.name})

            def answer(self, code, body):
                text = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def die(self):
        self.http.shutdown()
        self.http.server_close()


def opened(*stubs, retry_s=5.0):
    pool = ServerPool(ROLE, ServerConfig(retry_s=retry_s), longest=8)
    pool.open([stub.url for stub in stubs], "m")
    return pool


class Worked(Answer):
    by: str


def work(client, model, job):
    return job, client.post("/work", {"model": model, "job": job}, Worked).by


def test_a_slow_server_gets_less_and_does_not_stall_the_others():
    slow, fast = Stub("slow", delay=1.0), Stub("fast", delay=0.02)
    pool = opened(slow, fast)
    start = time.monotonic()
    answers = pool.run(range(40), work, at_once=2, reconnect=None)
    took = time.monotonic() - start
    assert [job for job, _ in answers] == list(range(40)), "in the order of the jobs"
    assert slow.most <= 2 and fast.most <= 2
    assert slow.done <= 6 and took < 4.0, "with half of the jobs each it would take ten seconds"
    pool.close()


def test_equal_servers_share_equally():
    stubs = [Stub(name, delay=0.05) for name in "abcd"]
    pool = opened(*stubs)
    pool.run(range(32), work, at_once=4, reconnect=None)
    assert all(6 <= stub.done <= 10 for stub in stubs), [stub.done for stub in stubs]
    pool.close()


def test_the_jobs_of_a_dead_server_go_to_the_others_and_it_is_named_once(capfd):
    dead, alive = Stub("dead"), Stub("alive")
    pool = opened(dead, alive)
    dead.die()
    assert {by for _, by in pool.run(range(20), work, at_once=4, reconnect=None)} == {"alive"}
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"policy server {dead.url} is out of service: POST {dead.url}/work: ")
    assert list(pool.lost) == [dead.url]
    alive.die()
    with pytest.raises(ServerLost, match=f"no policy server is in service: .*{alive.port}/work"):
        pool.run([1], work, at_once=4, reconnect=None)
    pool.close()


def test_a_pool_that_reconnects_waits_until_one_is_back():
    first = Stub("first")
    pool = opened(first)
    first.die()
    asked = []
    timer = threading.Timer(3.0, lambda: asked.append(Stub("second", port=first.port)))
    timer.start()
    looks = []
    assert pool.run([1], work, at_once=4, reconnect=looks.append) == [(1, "second")]
    assert [client.url for client in looks] == [first.url], "the role is checked once it answers again"
    asked[0].die()
    with pytest.raises(ServerError, match=r"no policy server came back in 0\.5 s \(retry_s\): POST ") as gone:
        pool.config = ServerConfig(retry_s=0.5)
        pool.run([3], work, at_once=4, reconnect=looks.append)
    assert not isinstance(gone.value, ServerLost), "it is over"
    pool.close()


def test_agreeing_on_lost_servers_retries_only_those():
    """`await_one` returns as soon as one server is back, even if another never returns."""
    gone, back = Stub("gone"), Stub("back")
    pool = opened(gone, back)
    gone.die()
    pool.agree({gone.url: "it died", back.url: "so it was said"})
    pool.await_one(lambda client: None)
    assert list(pool.lost) == [gone.url]
    pool.close()


@pytest.mark.parametrize(("code", "lost"), [(500, False), (400, False), (502, True), (503, True), (504, True)])
def test_a_healthy_servers_refusal_is_no_loss(code, lost):
    """It would refuse again, while 502 to 504 from a gateway mean that the server behind it is gone."""
    stub = Stub("only")
    pool = opened(stub)
    stub.code = code
    with pytest.raises(ServerError) as error:
        pool.run([1], work, at_once=1, reconnect=None)
    assert isinstance(error.value, ServerLost) == lost
    assert bool(pool.lost) == lost
    pool.close()
