"""A configuration is read, printed, explained and refused without torch: the answer comes in a second, not in ten."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from import_graph import LEVELS
from packages import install

from rlkd.algorithms.registry import OPTIONS, algorithm_class

ROOT = Path(__file__).parents[3]
HEAVY = {"torch", "lightning", "transformers", "datasets", "vllm", "peft", "trl", "numpy"}

pytestmark = pytest.mark.process


def run(code: str) -> tuple[Any, set[str], str]:
    """(its variable `code`, the top-level modules it imported, its stderr) of a Python process that runs `code`."""
    code = f"import json, sys\ncode = 0\n{code}\nsys.stdout.write('\\n' + json.dumps([code, list(sys.modules)]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, {name.partition(".")[0] for name in modules}, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["bad.key=1"], 2, "command line: bad: unknown key"),
        (["algorithm.kd.estimator=k1"], 2, "command line: algorithm.kd.estimator: "),
        (["algorithm={name: opd, divergence: {tier: full}}", "teacher={backend: served, path: x, url: y}"], 2, "tier"),
        (["--print-config"], 0, ""),
        (["--help"], 0, ""),
    ],
)
def test_the_command_line_answers_without_torch(arguments, code, said):
    config = ["--config", "configs/quickstart.yaml"]
    got, modules, stderr = run(f"from rlkd.train import main\ncode = main({[*config, *arguments]!r})")
    assert (got, modules & HEAVY) == (code, set()) and said in stderr


@pytest.mark.parametrize(
    ("program", "arguments", "code"),
    [
        ("evaluate", ["bad.key=1"], 2),
        ("evaluate", ["--help"], 0),
        ("generate", ["builtin:student", "a prompt", "bad.key=1"], 2),
        ("generate", ["--help"], 0),
        ("serve", ["--role", "policy", "--host", "h", "--port", "1", "bad.key=1"], 2),
        ("serve", ["--role", "policy", "--host", "h", "--port", "1"], 2),
    ],
)
def test_the_other_programs_answer_without_torch_too(program, arguments, code):
    arguments = ["--config", "configs/quickstart.yaml", *arguments]
    got, modules, stderr = run(f"from rlkd.{program} import main\ncode = main({arguments!r})")
    assert (got, modules & HEAVY) == (code, set()) and len(stderr.splitlines()) == (code == 2)


def test_a_push_without_a_student_is_refused_without_torch(tmp_path):
    got, modules, stderr = run(f"from rlkd.push import main\ncode = main([{str(tmp_path)!r}])")
    assert (got, modules & HEAVY) == (2, set()) and "has no hf/" in stderr and len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "read"), [(["--help"], False), (["--print-config"], False), (["teacher.backend=lcal"], True)]
)
def test_no_package_is_asked_for_names_before_an_unknown_one(tmp_path, monkeypatch, arguments, read):
    install(tmp_path, "plg-asked", {"rlkd.teachers": {"lokal": "plg_asked:Local"}})
    monkeypatch.setenv("PYDANTIC_DISABLE_PLUGINS", "__all__")  # pydantic reads entry points of its own
    (opened, modules), _, stderr = run(
        f"sys.path.append({str(tmp_path)!r})\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, of: opened.append(str(of[0])) if event == 'open' else None)\n"
        f"from rlkd.train import main\nmain(['--config', 'configs/quickstart.yaml', *{arguments!r}])\n"
        "code = ['plg_asked' in ' '.join(opened), 'plg_asked' in sys.modules]"
    )
    assert (opened, modules) == (read, False) and ("lokal" in stderr) == read


def test_the_configuration_s_modules_and_the_options_import_no_torch():
    files = [*(ROOT / "rlkd/config").rglob("*.py"), *(ROOT / "rlkd/algorithms").glob("*_options.py")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if file.stem != "__init__"]
    assert len(names) > len(OPTIONS)
    names = ["rlkd.config", "rlkd.algorithms.registry", "rlkd.config_file", "rlkd.train", *sorted(names)]
    found, _, _ = run(
        "import importlib\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        f"    code = code or [name, *sorted({HEAVY} & set(sys.modules))]\n"
        "    code = code if len(code) > 1 else 0"
    )
    assert not found, f"importing {found[0]} imports {found[1:]}"


def test_the_registry_has_the_options_of_every_built_in_algorithm():
    assert {name: algorithm_class(name).Options for name in OPTIONS} == dict(OPTIONS)


def test_the_left_half_imports_no_lightning():
    """Every file of the units up to `pipeline`, as benchmarks/import_graph.py lists them."""
    left = LEVELS[: LEVELS.index("pipeline") + 1]
    files = [file for unit in left for file in [*(ROOT / f"rlkd/{unit}").rglob("*.py"), *ROOT.glob(f"rlkd/{unit}.py")]]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    names = [name for name in names if name != "rlkd.weight_sync.file_engine"]  # vLLM imports it
    assert "rlkd.pipeline.line" in names and "rlkd.algorithms.grpo" in names
    _, modules, _ = run("\n".join(f"import {name}" for name in sorted(names)))
    assert "torch" in modules and not {"lightning", "pytorch_lightning"} & modules
