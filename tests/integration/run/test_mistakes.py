"""What a new user gets wrong: each mistake is one line that names what was expected and what there is, with its code.

The second half starts processes: mistakes that are found while a run starts, and how long the first kind takes.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from lines import assert_lines
from runs import ENV, ROOT, start

from rlkd.builtin import resolve
from rlkd.serve import main as serve
from rlkd.storage import hub
from rlkd.train import main

ROWS = [json.dumps({"prompt": f"reverse abc{i}", "answer": "cba"}) for i in range(40)]
QUICKSTART = ["--config", "configs/quickstart.yaml", "eval.every=0", "run.iterations=1"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with a user's files, some of them wrong, and the configs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    student = Path(resolve("builtin:student"))
    shutil.copytree(student, "models/mine", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(student, "models/plain", ignore=shutil.ignore_patterns("*.safetensors", "chat_template.jinja"))
    shutil.copytree("models/mine", "runs/first/hf")
    shutil.copytree("models/mine", "models/unknown")
    settings = json.loads(Path("models/unknown/config.json").read_text())
    Path("models/unknown/config.json").write_text(json.dumps(settings | {"model_type": "grok9"}))
    for name, file in (("models/adapter", "adapter_config.json"), ("runs/first/adapter", "adapter_config.json")):
        Path(name).mkdir()
        Path(name, file).write_text("{}")
    files = {
        "good.jsonl": ROWS,
        "broken.jsonl": [*ROWS[:3], '{"prompt": "x", "answer": '],
        "empty.jsonl": [],
        "some.jsonl": [*ROWS, '{"prompt": "reverse x"}'],
        "column.jsonl": [row.replace("prompt", "question") for row in ROWS],
        "tab.yaml": ["run:", "\tname: x"],
        "variable.yaml": ["model:", "  path: ${oc.env:RLKD_NO_SUCH_VARIABLE}"],
    }
    for name, lines in files.items():
        Path(name).write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def silent_hub(monkeypatch) -> Iterator[list[str]]:
    """The paths that a hub was asked for which never answers."""
    asked: list[str] = []

    class Silent(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.close_connection = True

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        hub.require.cache_clear()
        yield asked
        server.shutdown()


NO_MODEL = {
    "the config's name": (
        ["--config", "configs/quikstart.yaml"],
        ("configs/quikstart.yaml: ", "configs/quickstart.yaml"),
    ),
    "a tab in YAML": (["--config", "tab.yaml"], ("tab.yaml:2: ", "tab", "spaces")),
    "an unset variable": (["--config", "variable.yaml"], ("variable.yaml:2: model.path: ", "RLKD_NO_SUCH_VARIABLE")),
    "spaces around =": (["optim.lr", "=", "1e-5"], ("command line: ", "optim.lr=1e-5", "spaces")),
    "a space after =": (["optim.lr=", "1e-5"], ("command line: ", "optim.lr=1e-5", "spaces")),
    "a misspelt key": (["optim.lrr=1"], ("command line: optim.lrr: ", "optim.lr?")),
    "a negative learning rate": (["optim.lr=-1"], ("command line: optim.lr: ", ">= 0", -1)),
    "a negative coefficient": (["algorithm.kd.coef=-0.5"], ("command line: algorithm.kd.coef: ", ">= 0", -0.5)),
    "a decay rate above 1": (["optim.betas=[0.9, 1.5]"], ("command line: optim.betas: ", "< 1", 1.5)),
    "a group of one": (["algorithm.group_size=1"], ("command line: algorithm.group_size: ", ">= 2", 1)),
    "ranks that do not divide": (["trainer.devices=3"], ("configs/", "rollout.prompts: ", 16, 3)),
    "a reward without its key": (["reward.functions=[exact_match]"], ("command line: ", "{name: exact_match}")),
    "a misspelt model folder": (
        ["model.path=./models/mime"],
        ("model.path: ", "./models/mime", "did you mean models/mine?"),
    ),
    "a file as model": (["model.path=models/mine/config.json"], ("model.path: ", "file models/mine/config.json")),
    "a LoRA adapter as model": (["model.path=models/adapter"], ("model.path: ", "LoRA adapter", "merge")),
    "a run as model": (["model.path=runs/first"], ("model.path: ", "did you mean runs/first/hf?")),
    "a run's adapter as model": (["model.path=runs/first/adapter"], ("model.path: ", "did you mean runs/first/hf?")),
    "a misspelt data file": (["data.path=god.jsonl"], ("data.path: ", "god.jsonl", "did you mean good.jsonl?")),
    "a broken line": (["data.path=broken.jsonl"], ("data.path: broken.jsonl:4: ", "JSON")),
    "an empty file": (["data.path=empty.jsonl"], ("data.path: empty.jsonl: ", "empty")),
    "an answer missing": (["data.path=some.jsonl"], ("data.path: some.jsonl:41: ", "'answer'", "data.answer_column")),
    "another column": (["data.path=column.jsonl"], ("data.path: column.jsonl:1: ", "data.prompt_column", "question")),
    "a directory of the kernel": (["run.dir=/proc/runs"], ("run.dir: ", "/proc/runs", "No such file or directory")),
    "a file as run.dir": (["run.dir=good.jsonl"], ("run.dir: ", "good.jsonl is a file")),
}
"""Name → (arguments, the parts of the line). Found without a library that loads models."""

MODEL = {
    "a GPU that is not there": (["trainer.accelerator=gpu"], ("trainer.accelerator: ", "no GPU", "set cpu")),
    "a built-in model's bare name": (["model.path=student"], ("model.path: ", "hub", "did you mean builtin:student?")),
    "a hub that is unreachable": (["model.path=Qwen/Qwen9"], ("model.path: Qwen/Qwen9 ", "hub cannot be reached")),
    "an unknown architecture": (
        ["model.path=models/unknown", "teacher.path=models/mine"],
        ("model.path: ", "grok9", "transformers"),
    ),
    "no chat template": (
        ["model.path=models/plain", "teacher.path=models/mine"],
        ("data.path: ", "no chat template", "data.chat_template: false"),
    ),
    "too many tokens": (
        ["rollout.max_tokens=4000", "teacher=null", "algorithm={name: grpo}"],
        ("rollout.max_tokens: ", 4032, 128, "positions"),
    ),
    "prompts that are too long": (
        ["data.max_prompt_tokens=4"],
        ("data.path: ", "data.max_prompt_tokens = 4", "too_long: skip"),
    ),
    "a data set of the hub": (["data.path=openai/gsm8k"], ("data.path: ", "openai/gsm8k", "hub cannot be reached")),
    "a misspelt reward": (["reward.functions=[{name: exact_mach}]"], ("reward.functions: ", "exact_match?")),
}
"""The same, found with one, or by asking the hub."""

MISTAKES = NO_MODEL | MODEL


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, folder, silent_hub, capsys):
    arguments, line = MISTAKES[name]
    if name == "a GPU that is not there" and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has GPUs")
    assert main([*QUICKSTART, *arguments]) == 2
    assert_lines(capsys.readouterr().err.splitlines(), line)
    assert len(silent_hub) == any("hub" in str(part) for part in line), "the hub is asked once"


@pytest.mark.parametrize("mode", ["", "onlin"])
def test_a_mode_of_wandb_is_one_line(mode, folder, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert main([*QUICKSTART, "log.wandb=online"]) == 2
    assert_lines(capsys.readouterr().err.splitlines(), (f"WANDB_MODE: got {mode!r}", "'offline'"))


@pytest.mark.process
def test_what_needs_no_model_is_found_without_the_libraries_that_load_one(folder):
    """1.5 s of processor time, whatever else runs on this machine; torch alone takes more."""
    code = (
        "import sys, json\nfrom rlkd.train import main\n"
        f"codes = [main({QUICKSTART!r} + arguments) for arguments in json.loads(sys.argv[1])]\n"
        "assert not {'torch', 'transformers', 'lightning', 'datasets'} & set(sys.modules), 'heavy'\n"
        "sys.exit(codes != [2] * len(codes))"
    )
    environment = ENV | {"PYTHONPATH": str(ROOT)}
    asked = json.dumps([arguments for arguments, _ in NO_MODEL.values()])
    done = subprocess.run([sys.executable, "-c", code, asked], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(NO_MODEL)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-m", "rlkd", "train", *QUICKSTART, "data.path=some.jsonl"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 2
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.5


@pytest.mark.process
def test_ctrl_c_while_a_run_starts_is_one_line(folder):
    """The data are a pipe, so that the run waits for them."""
    os.mkfifo("pipe.jsonl")
    command = [sys.executable, "-m", "rlkd", "train", *QUICKSTART, "data.path=pipe.jsonl"]
    environment = ENV | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=_heeds_ctrl_c)
    with open("pipe.jsonl", "w"):  # waits until the run opens it
        run.send_signal(signal.SIGINT)
        _, printed = run.communicate(timeout=60)
    assert (run.returncode, printed.split()) == (130, ["interrupted"])


def _heeds_ctrl_c():
    """As on a terminal, also where the tests run in the background of a shell, which lets them ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


REWARD = """import json


def reward(completion, *, answer, prompt, meta):
    return json.loads("{" + answer)
"""


@pytest.mark.process
@pytest.mark.long
def test_a_reward_that_raises_is_named_by_file_and_line(folder):
    """By the line of the user's own file, not by that of the library that it calls."""
    Path("mine.py").write_text(REWARD)
    run = start([*QUICKSTART, "reward.functions=[{name: mine:reward}]"], folder)
    assert run.wait(120) == 1
    assert_lines(
        run.err.read_text().splitlines(), ("stopped: ", "mine:reward", "JSONDecodeError", f"{folder}/mine.py:5")
    )


@pytest.mark.process
@pytest.mark.long
def test_a_port_in_use_is_one_line(folder, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = start(QUICKSTART, folder, env=ENV | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        assert run.wait(120) == 1
        assert_lines(run.err.read_text().splitlines(), ("stopped: MASTER_PORT: ", f"127.0.0.1:{port}", "in use"))
        monkeypatch.setenv("RLKD_SERVER_KEY", "key")
        config = ["--config", "configs/quickstart_vllm.yaml", "--role", "policy"]
        for host, asked, start_ in (
            ("127.0.0.1", port, "--port: "),
            ("127.0.0.1", 99_999, "--port: "),
            ("192.0.2.1", port, "--host: "),
        ):
            assert serve([*config, "--host", host, "--port", str(asked)]) == 2
            shown = asked if start_ == "--port: " else host
            assert_lines(capsys.readouterr().err.splitlines(), (start_, "expected", shown))
