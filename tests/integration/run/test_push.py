"""`rlkd push`, against a stub of the hub's routes, and against nothing."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.process


class Hub(ThreadingHTTPServer):
    """Takes files and keeps what it was sent; refuses every request if `refuses` is a status."""

    daemon_threads = True

    def __init__(self, refuses=None):
        super().__init__(("127.0.0.1", 0), Routes)
        self.refuses, self.files, self.created = refuses, {}, {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Routes(BaseHTTPRequestHandler):
    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        hub, sent = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert self.headers["Authorization"] == "Bearer hf_made_up"
        route = self.path.partition("?")[0]
        if hub.refuses is not None:
            return self.answer({"error": "You are not allowed here"}, hub.refuses)
        if route == "/api/repos/create":
            hub.created = json.loads(sent)
            return self.answer({"url": f"{hub.url}/someone/{hub.created['name']}"})
        if route.endswith("/preupload/main"):
            files = json.loads(sent)["files"]
            return self.answer({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        if route.endswith("/commit/main"):
            lines = [json.loads(line) for line in sent.splitlines()]
            hub.files = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"
            }
            return self.answer({"commitUrl": f"{hub.url}/someone/x/commit/1", "commitOid": "1"})
        return self.answer({})  # the check of the card's front matter

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(request):
    server = Hub(getattr(request, "param", None))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def push(*words, endpoint="http://127.0.0.1:1", **changes):
    """(exit code, stdout, lines of stderr)."""
    own = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_made_up", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    own |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-m", "rlkd.push", *words], env=os.environ | own | changes, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_the_hub_gets_every_file_of_the_export(finished_run, hub):
    (finished_run / "hf" / "README.md").write_text("---\ntags: [rlkd]\n---\n")
    code, out, err = push("runs/x", "--private", endpoint=hub.url)
    assert (code, out, err) == (0, f"{hub.url}/someone/x\n", [])
    assert hub.files == {path.name: path.read_bytes() for path in (finished_run / "hf").iterdir()}
    assert (hub.created["name"], hub.created["visibility"]) == ("x", "private")


def test_the_adapter_alone_under_another_name(finished_run, hub):
    (finished_run / "adapter").mkdir()
    (finished_run / "adapter" / "adapter_config.json").write_text("{}")
    assert push("runs/x", "--part", "adapter", "--repo", "other", endpoint=hub.url)[0] == 0
    assert hub.files == {"adapter_config.json": b"{}"} and hub.created["name"] == "other"


@pytest.mark.parametrize("hub", [401, 403], indirect=True)
def test_a_hub_that_refuses_is_one_line(finished_run, hub):
    code, out, err = push("runs/x", endpoint=hub.url)
    assert (code, out) == (1, "") and len(err) == 1 and "runs/x/hf was not uploaded: " in err[0]


@pytest.mark.parametrize(
    ("words", "changes", "code", "parts"),
    [
        (["runs/x"], {}, 1, ("127.0.0.1:1", "runs/x/hf")),
        (["runs/x"], {"HF_TOKEN": ""}, 2, ("token", "HF_TOKEN")),
        (["runs/x"], {"HF_HUB_OFFLINE": "1"}, 2, ("HF_HUB_OFFLINE",)),
        (["runs/x", "--repo", "a/b/c"], {}, 2, ("--repo", "a/b/c")),
        (["runs/x", "--part", "adapter"], {}, 2, ("runs/x", "adapter/")),
        (["runs/y"], {}, 2, ("runs/y",)),
    ],
)
def test_every_failure_is_one_line(finished_run, words, changes, code, parts):
    got, out, err = push(*words, **changes)
    assert (got, out) == (code, "") and len(err) == 1, err
    assert all(part in err[0] for part in parts), err
