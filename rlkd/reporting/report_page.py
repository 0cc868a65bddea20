"""Writes report.html: one self-contained page about one run, or several laid over each other.

    rlkd report runs/quickstart

The page needs no network: its script, with the plot library uPlot, and its data are in it. It can be written at any
time during a run, and for a run that was killed. Text from a run is data to the script, which never makes markup of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlkd.reporting.report_data import report_data
from rlkd.storage import atomic


def write_report(run_dir: str | Path, *others: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, with `others` laid over it; return its path.

    Args:
        out: the file; None: `<run_dir>/report.html`, or with `others` compare.html in the folder that holds all runs.

    Raises: ValueError if a file of a run is missing or a line is invalid; the message names file and line.
    """
    runs = [run_dir, *others]
    if out is None:
        out = (
            Path(os.path.commonpath(map(os.path.abspath, runs)), "compare.html")
            if others
            else Path(run_dir, "report.html")
        )
    path = Path(out)
    atomic.write(path, page(report_data(runs)))
    return path


def page(data: dict[str, Any], name: str = "page", source: str = "'none'") -> bytes:
    """The page `name`.html with its style, its script and `data`.

    Args:
        source: what its script may connect to, in the words of a Content-Security-Policy.
    """
    style = _file("uplot/uPlot.min.css") + _file("page.css")
    script = _file("uplot/uPlot.iife.min.js") + "\n" + _file(f"{name}.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; connect-src {source}"
    parts = {"policy": policy, "style": style, "script": script, "data": embedded(data)}
    text = _file(f"{name}.html")
    # In one pass: what is filled in may contain the name of a place.
    pieces = [parts[piece] if i % 2 else piece for i, piece in enumerate(text.split("%%"))]
    return "".join(pieces).encode()


def embedded(data: Any) -> str:
    """`data` as JSON that can stand in a <script> element: in ASCII, and without what could end the element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _file(name: str) -> str:
    return files("rlkd.reporting").joinpath(name).read_text(encoding="utf-8")
