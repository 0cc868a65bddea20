"""The GPU tests without a GPU: they are skipped with the reason, and are sound up to their first call of CUDA."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
NO_CUDA = r"Torch not compiled with CUDA enabled|Found no NVIDIA driver|No CUDA GPUs are available"
"""What torch raises, by its build, at the first call of CUDA."""


def gpu_tests(folder: Path, *options: str) -> tuple[list[ElementTree.Element], list[list[str]], str]:
    """Run them all: (a <testcase> for each, the rows of the table, the output)."""
    report, table = folder / "report.xml", folder / "tables" / "gpu_tests.md"
    line = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", f"--junitxml={report}", f"--gpu-table={table}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*line, "--tb=short", *options],
        cwd=ROOT,
        env=environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    cases = list(ElementTree.parse(report).iter("testcase"))
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("| ")][1:]
    return cases, rows, done.stdout + done.stderr


@pytest.mark.process
def test_without_gpus_they_are_skipped_and_the_table_gives_the_reason(tmp_path):
    cases, rows, output = gpu_tests(tmp_path)
    assert len(cases) == len(rows) > 20, output
    for case, row in zip(cases, rows, strict=True):
        (skipped,) = case.iter("skipped")
        assert re.search(r"needs (1 GPU|[2-8] GPUs), has 0$", skipped.get("message")), case.get("name")
        assert row[0] == case.get("name").removeprefix("test_") and row[-1] in skipped.get("message")
    numbers = [int(found[1]) for row in rows if (found := re.match(r"g(\d+)_", row[0]))]
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, 13)), "G1 to G12, in this order"


@pytest.mark.process
def test_each_runs_as_far_as_its_first_cuda_call(tmp_path):
    cases, rows, output = gpu_tests(tmp_path, "--gpu-anyway")
    assert len(cases) == len(rows) > 20, output
    for case, row in zip(cases, rows, strict=True):
        (failure,) = [*case.iter("failure"), *case.iter("error")]
        assert failure.tag == "failure" and re.search(NO_CUDA, failure.get("message")), (case.get("name"), failure.text)
        assert row[-1].startswith("NO: ") and re.search(NO_CUDA, row[-1])
