"""One server's client, against plain HTTP servers of our own."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlkd.servers.client import VLLMClient
from rlkd.servers.responses import Answer


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # which keeps connections open by default

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


@pytest.fixture
def url():
    with Server(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_requests_of_many_threads_do_not_close_each_others_connections(url):
    """httpx can hand a finished connection to one thread while another closes it, unless connections are never kept.

    "Bad file descriptor", about once in a hundred requests of this test with a limit of zero kept connections.
    """
    client, interval = VLLMClient(url, timeout_s=30.0), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(client.get, ["/x"] * 1500, [Answer] * 1500))
    finally:
        sys.setswitchinterval(interval)
        client.close()
    assert answers == [Answer()] * 1500
