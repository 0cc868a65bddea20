"""Serves the reports of all runs in a folder on this machine: `rlkd report --serve runs/`.

Pages are made when they are asked for, and the browser asks again every few seconds. Configurations and completions may
be confidential, so only this machine can connect, and a page of another site cannot read them: the name in a request's
Host must be this machine's own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rlkd.reporting.report_data import grouped, report_data
from rlkd.reporting.report_page import page
from rlkd.reporting.run_files import is_run, read_stages
from rlkd.storage.run_folder import stage_names

_OWN_NAMES = ("127.0.0.1", "localhost")


def found_runs(root: Path) -> dict[str, Path]:
    """The runs in `root`, or up to three folders below it, by their path in it. A run with stages is one run."""
    return {
        root.resolve().name if folder == root else folder.relative_to(root).as_posix(): folder for folder in _runs(root)
    }


def _runs(folder: Path, depth: int = 3) -> Iterator[Path]:
    """The folder itself if it is a run, which contains no others; else those in it."""
    if is_run(folder) or any(is_run(folder / name) for name in stage_names(folder)):
        yield folder
    elif depth:
        for inside in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield from _runs(inside, depth - 1)


def server(root: Path, port: int) -> ThreadingHTTPServer:
    """The server for the runs in `root`, listening on 127.0.0.1; port 0: any free one. Call its `serve_forever`.

    Raises: ValueError if `root` is no folder or the port is taken.
    """
    if not root.is_dir():
        raise ValueError(f"expected a folder of runs, got {root}, which is none; use runs/")
    handler = type("Handler", (_Handler,), {"root": root})
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise ValueError(f"--port: cannot listen on port {port} ({error.strerror}); choose another") from error


class _Handler(BaseHTTPRequestHandler):
    root: Path

    def do_GET(self) -> None:
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in _OWN_NAMES:
            return self._send(403, b"only for this machine", "text/plain")
        url = urlsplit(self.path)
        runs = found_runs(self.root)
        asked = parse_qs(url.query).get("run", [])
        if not all(name in runs for name in asked) or (url.path.endswith(("/report", "/data.json")) and not asked):
            return self._send(404, b"no such run", "text/plain")
        folders = [runs[name] for name in asked]
        try:
            if url.path == "/":
                self._send(200, page(_listed(runs), "runs", "'self'"), "text/html")
            elif url.path == "/runs.json":
                self._send(200, json.dumps(_listed(runs)).encode(), "application/json")
            elif url.path == "/report":
                self._send(200, page(report_data(folders) | {"live": True}, source="'self'"), "text/html")
            elif url.path == "/data.json":
                self._send_data(folders)
            else:
                self._send(404, b"no such page", "text/plain")
        except ValueError as error:  # a file of the run is invalid
            self._send(500, str(error).encode(), "text/plain")

    def _send_data(self, folders: list[Path]) -> None:
        """The data of a page, unless the browser has it already."""
        tag = f'"{[changed(folder) for folder in folders]}"'
        if self.headers.get("If-None-Match") == tag:
            self._send(304, b"", "application/json")
        else:
            data = json.dumps(report_data(folders) | {"live": True}, allow_nan=False)
            self._send(200, data.encode(), "application/json", tag)

    def _send(self, status: int, body: bytes, kind: str, tag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing for a request."""


def changed(folder: Path) -> float:
    """When the run in `folder` last wrote metrics or rollouts, in seconds since 1970."""
    parts = [folder / name for name in stage_names(folder)] or [folder]
    paths = [part / name for part in parts for name in ("metrics.jsonl", "rollouts")]
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def _listed(runs: dict[str, Path]) -> dict[str, Any]:
    """The runs for the list, the newest first."""
    listed = []
    for name, folder in runs.items():
        entry: dict[str, Any] = {"name": name, "changed": changed(folder)}
        try:
            stages = read_stages(folder)
        except ValueError as error:
            listed.append(entry | {"error": str(error)})
            continue
        rows = [row for stage in stages for row in stage.rows]
        for key in ("eval/greedy", "reward/mean"):
            values = [row[key] for row in rows if row.get(key) is not None]
            entry[key] = [values[0], values[-1]] if values else None
        planned = [stage.config["run"]["iterations"] for stage in stages]
        listed.append(
            entry
            | {
                "algorithm": " → ".join(str(stage.config["algorithm"]["name"]) for stage in stages),
                "student": str(stages[0].config["model"]["path"]),
                "done": " + ".join(
                    f"{stage.done:,} of {grouped(of)}" for stage, of in zip(stages, planned, strict=True)
                ),
            }
        )
    return {"runs": sorted(listed, key=lambda entry: -entry["changed"]), "now": time.time()}
