"""A stub of a teacher's server that starts quickly and can be killed: a token's log-prob is a function of its id.

    python stub_teacher.py PORT

The real server takes most of a minute to start. This one is for tests of what a run does when the server is gone.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def logprob(token):
    return -0.5 - (token % 7) / 10


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        card = {"id": "teacher", "root": "rlkd/builtin/teacher", "parent": None, "max_model_len": 4096}
        self.answer({"data": [card]} if self.path == "/v1/models" else {})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/completions":
            self.answer({"detail": "Not Found"}, status=404)
            return
        entries = [[{str(token): {"logprob": logprob(token)}} for token in prompt] for prompt in asked["prompt"]]
        choices = [{"index": i, "prompt_logprobs": entry} for i, entry in enumerate(entries)]
        self.answer({"model": asked["model"], "choices": choices})

    def answer(self, body, status=200):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
