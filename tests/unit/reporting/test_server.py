"""`rlkd report --serve`: it lists the runs of a folder, sends their pages, and answers only this machine."""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_runs import long_run

from rlkd.reporting.server import found_runs, server
from rlkd.storage.run_folder import save_stage_names


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    long_run(tmp_path / "runs" / "a", 3, ["reward/mean", "eval/greedy"], dumps=1, completion=4)
    long_run(tmp_path / "runs" / "deeper" / "b", 3, ["loss"], dumps=1, completion=4)
    for stage in ("sft", "grpo"):
        long_run(tmp_path / "runs" / "recipe" / stage, 2, ["loss"], dumps=1, completion=4)
    save_stage_names(tmp_path / "runs" / "recipe", ["sft", "grpo"])
    (tmp_path / "runs" / "no_run").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def port(runs: Path) -> Iterator[int]:
    listening = server(runs, 0)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield listening.server_port
    listening.shutdown()
    thread.join()
    listening.server_close()


def get(port: int, path: str, **headers: str) -> tuple[int, str, str | None]:
    """(status, body, ETag)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers["ETag"]


def test_runs_are_found_at_any_depth_and_stages_are_one(runs: Path) -> None:
    assert list(found_runs(runs)) == ["a", "deeper/b", "recipe"]
    assert list(found_runs(runs / "a")) == ["a"]


def test_the_list_has_figures_and_names_a_broken_run(runs: Path, port: int) -> None:
    with open(runs / "deeper/b/metrics.jsonl", "a") as file:
        file.write("{\n[]\n")
    listed = {run["name"]: run for run in json.loads(get(port, "/runs.json")[1])["runs"]}
    assert set(listed) == {"a", "recipe", "deeper/b"}
    assert listed["a"]["done"] == "3 of 3" and len(listed["a"]["reward/mean"]) == 2
    assert listed["recipe"]["algorithm"] == "kdrl → kdrl" and listed["recipe"]["done"] == "2 of 2 + 2 of 2"
    assert "line 4" in listed["deeper/b"]["error"]
    status, text, _ = get(port, "/")
    assert status == 200 and "deeper/b" in text
    status, text, _ = get(port, "/report?run=deeper/b")
    assert status == 500 and "line 4" in text


def test_a_page_is_live(runs: Path, port: int) -> None:
    status, text, _ = get(port, "/report?run=a&run=recipe")
    assert status == 200 and '"live":true' in text and "connect-src 'self'" in text
    asked = "/data.json?run=a&run=recipe"
    status, text, tag = get(port, asked)
    assert status == 200 and [run["label"] for run in json.loads(text)["runs"]] == ["a", "recipe"] and tag
    assert get(port, asked, If_None_Match=tag)[:2] == (304, "")
    with open(runs / "a/metrics.jsonl", "a") as file:
        file.write(json.dumps({"iteration": 4, "reward/mean": 0.5}) + "\n")
    os.utime(runs / "a/metrics.jsonl", (2e9, 2e9))
    status, text, _ = get(port, asked, If_None_Match=tag)
    assert status == 200 and json.loads(text)["runs"][0]["series"]["reward/mean"]["last"] == 0.5


@pytest.mark.parametrize(
    "path",
    [
        "/report",
        "/data.json",
        "/report?run=no_run",
        "/report?run=../runs/a",
        "/report?run=/etc",
        "/x",
        "/a/config.yaml",
    ],
)
def test_only_runs_of_the_folder_are_sent(port: int, path: str) -> None:
    assert get(port, path)[0] == 404


@pytest.mark.parametrize("host", ["example.org", "example.org:80", "127.0.0.1.example.org", ""])
def test_a_page_of_another_site_gets_nothing(port: int, host: str) -> None:
    """A name that resolves to 127.0.0.1 would make a browser send requests here."""
    for path in ("/", "/runs.json", "/report?run=a"):
        status, text, _ = get(port, path, Host=host)
        assert status == 403 and "reward" not in text
    assert get(port, "/", Host="localhost:1")[0] == 200


def test_it_listens_on_this_machine_only(runs: Path) -> None:
    with server(runs, 0) as listening:
        assert listening.server_address[0] == "127.0.0.1"
        with pytest.raises(ValueError, match=re.escape(f"cannot listen on port {listening.server_port}")):
            server(runs, listening.server_port)
