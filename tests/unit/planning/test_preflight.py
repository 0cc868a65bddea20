"""What is found out before any model is loaded: one line for each thing that is wrong."""

import json
import logging
import os
import shutil
import socket
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from lines import assert_lines
from transformers import AutoConfig, AutoTokenizer
from vllm_fixtures import own_address

from rlkd.builtin import resolve
from rlkd.config.schema import Config
from rlkd.config_file import load
from rlkd.data.chat import load_tokenizer
from rlkd.generation.sampler import eos_ids
from rlkd.models.vocabulary import load_config, vocabulary_size
from rlkd.pipeline.build import build_sampler
from rlkd.planning.preflight import _refuse_elsewhere, check, check_evaluation
from rlkd.servers.client import ServerError
from rlkd.train import main

QUICKSTART = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
ROWS = [{"id": f"q{i}", "prompt": f"abc{i}", "answer": "x"} for i in range(20)]


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(*overrides: str) -> Config:
    """The quickstart with a small data set."""
    Path("small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return load([QUICKSTART], ["eval.every=0", "data.path=small.jsonl", *overrides]).config


def model_folder(name: str, positions: int = 512, extra: list[str] | None = None) -> str:
    """A model folder without weights, since preflight must not need them."""
    folder = Path(name)
    shutil.copytree(resolve("builtin:student"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if extra:
        tokenizer = load_tokenizer(name)
        tokenizer.add_tokens(extra)
        tokenizer.save_pretrained(name)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": positions}))
    return str(folder)


def data_file(rows: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@contextmanager
def server(model: str, length: int = 4096, routes: dict[str, Any] | None = None) -> Iterator[str]:
    """The URL of a server that answers a few GETs like vLLM; `routes` replaces responses, None is a 404."""
    answers: dict[str, Any] = {
        "/health": {},
        "/v1/models": {"data": [{"id": model, "root": model, "parent": None, "max_model_len": length}]},
        "/weight_info": {"weight_version": "default"},
    } | (routes or {})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path)
            body = json.dumps(answer).encode() if not isinstance(answer, bytes) else answer
            self.send_response(404 if answer is None else 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    stub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=stub.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{stub.server_address[1]}"
    finally:
        stub.shutdown()
        stub.server_close()


def with_servers(*urls: str, path: str = "builtin:student") -> Config:
    return config(f"model.path={path}", "rollout.backend=vllm", f"rollout.server.urls=[{','.join(urls)}]")


def test_the_quickstart_is_fine():
    assert check(load([QUICKSTART]).config) == []


def test_no_weights_are_read():
    assert check(config(f"model.path={model_folder('m')}", "teacher.path=m")) == []


def test_model_paths():
    Path("empty").mkdir()
    assert_lines(check(config("model.path=/no/such/folder")), ("model.path: ", "/no/such/folder"))
    assert_lines(check(config("teacher.path=~/m")), ("teacher.path: ", "~/m", "not expanded"))
    assert_lines(check(config("model.path=empty")), ("model.path: ", "empty", "config.json"))
    (line,) = check(config("model.path=builtin:studnet"))
    assert line.startswith("model.path: ") and "builtin:student" in line
    shutil.copy(Path(resolve("builtin:student")) / "config.json", "empty")
    (line,) = check(config("teacher.path=empty"))
    assert_lines([line], ("teacher.path: ", "'empty'", "tokenizer"))


def with_ends(name: str, generation: dict[str, Any] | None, **changes: Any) -> str:
    """A model whose generation_config.json is `generation` (None: it has none), with changes to its config.json."""
    folder = Path(model_folder(name))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))
    return name


def test_the_ends_of_completions_are_found_wherever_a_model_names_them():
    eos = load_tokenizer("builtin:student").eos_token_id
    assert eos_ids(with_ends("several", {"eos_token_id": [eos, 5]}), False) == (eos, 5)
    assert eos_ids(with_ends("in_config", None, eos_token_id=7), False) == (7,)
    assert eos_ids(with_ends("in_both", {"pad_token_id": 0}, eos_token_id=7), False) == (7,)
    assert eos_ids(with_ends("of_text", {}, eos_token_id=None, text_config={"eos_token_id": 6}), False) == (6,)
    assert eos_ids(with_ends("in_tokenizer", None, eos_token_id=None), False) == (eos,)
    assert check(config("model.path=in_tokenizer", "teacher.path=in_config")) == []


@pytest.mark.parametrize("value", [[], [1, 56], -1, "</s>"])
def test_completions_that_never_end_are_refused(value):
    with_ends("endless", {"eos_token_id": value})
    parts = ("endless", "eos_token_id", "generation_config.json", str(value), 56)
    assert_lines(check(config("model.path=endless")), ("model.path: ", *parts))
    assert_lines(
        check_evaluation({"small": config("model.path=endless", "eval.path=small.jsonl")}), ("model.path: ", *parts)
    )
    with server("teacher") as url:
        found = check(config(f"teacher={{backend: served, path: endless, urls: [{url}]}}"))
    assert_lines([line for line in found if line.startswith("teacher.path")], ("teacher.path: ", *parts))


def test_an_fp32_head_of_a_quantised_model_is_refused_where_vllm_would():
    with_ends("quantised", {"eos_token_id": 1}, quantization_config={"quant_method": "fp8"})
    settings = ("model.path=quantised", "model.fp32_head=true")
    served = ("rollout.backend=vllm", "rollout.server.launch=true")
    found = [line for line in check(config(*settings, *served)) if line.startswith("model.")]
    assert_lines(found, ("model.fp32_head: ", "quantised model quantised", "false"))
    others = (settings, (*settings, *served, "model.fp32_head=false"), ("model.fp32_head=true", *served))
    assert not [line for other in others for line in check(config(*other)) if line.startswith("model.fp32_head")]


LOCAL = "teacher={backend: local, path: endless}"
OTHERS = "algorithm={name: opd, group_size: 1, student_share: 0.5, others: teacher, divergence: {tier: full}}"
GUIDED = "algorithm={name: thinktuning, group_size: 4, feedback: {max_tokens: 40, max_prompt_tokens: 80}}"


@pytest.mark.parametrize("algorithm", [OTHERS, GUIDED])
def test_a_teacher_in_process_that_writes_is_asked_for_its_end_too(algorithm):
    with_ends("endless", {"eos_token_id": []})
    (line,) = check(config(algorithm, LOCAL))
    assert line.startswith("teacher.path: endless: expected eos_token_id of generation_config.json to be")
    assert check(config(OTHERS, "algorithm.student_share=1.0", LOCAL)) == []  # this one only scores


def test_the_end_of_a_tokenizer_that_brings_its_own_code():
    folder = Path(with_ends("coded", None, eos_token_id=None))
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    eos = load_tokenizer("builtin:student").eos_token_id
    assert eos_ids("coded", trust_remote_code=True) == (eos,)
    trusting = config("model.path=coded", "teacher.path=coded", "model.trust_remote_code=true")
    assert check(trusting) == []
    assert build_sampler(trusting).eos_ids == (eos,)


def test_a_server_may_have_models_that_transformers_has_no_causal_class_for():
    """vLLM loads Qwen3-VL and the like; in process they are still refused."""
    folder = Path(model_folder("seeing"))
    text = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen3_vl_text"}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "text_config": text}))
    with server("seeing") as url:
        assert check(config(f"teacher={{backend: served, path: seeing, urls: [{url}]}}")) == []
    (line,) = check(config("teacher.path=seeing"))
    assert line.startswith(
        "teacher.path: expected a model that writes text from left to right, got seeing of type qwen3_vl"
    )


def test_a_model_without_an_end_anywhere_is_refused():
    folder = Path(with_ends("endless", None, eos_token_id=None))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (line,) = check(config("model.path=endless"))
    assert_lines([line], ("model.path: ", "endless", "eos_token_id", "None"))


def test_teacher_and_student_must_share_a_vocabulary():
    known = len(load_tokenizer("builtin:student"))
    other = model_folder("other", extra=["<think>"])
    assert_lines(check(config(f"teacher.path={other}")), ("teacher.path: ", "other", "model.path", known, "'<think>'"))
    assert check(config(f"teacher.path={other}", f"model.path={other}")) == []


def test_lengths_are_the_algorithms():
    """Here the student is trained on longer sequences than it samples, and the teacher reads longer ones still."""
    model_folder("short", positions=90)
    settings = ("algorithm={name: thinktuning, group_size: 4, feedback: {max_tokens: 40, max_prompt_tokens: 80}}",)
    assert check(config(*settings, "algorithm.feedback.max_prompt_tokens=50", "model.path=short")) == []
    assert_lines(
        check(config(*settings, "model.path=short", "rollout.max_tokens=24")),
        ("algorithm.max_augmented_tokens: ", "data.max_prompt_tokens", 96, "model.path", "short", 90),
    )
    assert_lines(
        check(config(*settings, "teacher.path=short")),
        ("algorithm.feedback.max_tokens: ", "algorithm.feedback.max_prompt_tokens", 120, "teacher.path", "short", 90),
    )


def test_lengths_must_fit_both_models():
    model_folder("short", positions=40)
    parts = ("rollout.max_tokens: ", "data.max_prompt_tokens", 48, "short", 40)
    assert_lines(check(config("teacher.path=short")), (*parts, "teacher.path"))
    assert_lines(check(config("model.path=short")), (*parts, "model.path"))
    assert check(config("model.path=short", "rollout.max_tokens=8")) == []


def test_data():
    assert check(config(f"data.path={data_file(ROWS)}")) == []
    (line,) = check(config("data.path=none.jsonl"))
    assert_lines([line], ("data.path: ", "none.jsonl", "No such file"))
    (line,) = check(config("data.path=data.jsonl", "data.prompt_column=question"))
    assert_lines([line], ("data.path: ", "data.jsonl:1: ", "'question'", "data.prompt_column", "id, prompt, answer"))
    (line,) = check(config(f"data.path={data_file([], 'empty.jsonl')}"))
    assert_lines([line], ("data.path: ", "empty.jsonl: ", "empty"))
    (line,) = check(config(f"data.path={data_file(ROWS[:3], 'few.jsonl')}"))
    assert_lines([line], ("data.path: ", "rollout.prompts", 16, 3))
    long = data_file([*ROWS, {"id": "long", "prompt": "a" * 99, "answer": "x"}], "long.jsonl")
    (line,) = check(config(f"data.path={long}"))
    assert_lines([line], ("data.path: ", "long.jsonl:21: ", "'20'", "data.max_prompt_tokens", 32))


def test_held_out_data_is_read_only_where_it_is_used():
    overrides = (f"data.path={data_file(ROWS)}", "eval.path=none.jsonl")
    assert check(config(*overrides)) == []
    (line,) = check(config(*overrides, "eval.every=5"))
    assert_lines([line], ("eval.path: ", "none.jsonl", "No such file"))


def test_rewards():
    (line,) = check(config("reward.functions=[{name: exact_macth}]"))
    assert line.startswith("reward.functions: ") and "exact_match" in line


def test_answers_of_the_data_that_math_cannot_use():
    rows = [{"prompt": f"abc{i}", "answer": "1/0" if i == 7 else str(i)} for i in range(20)]
    overrides = (f"data.path={data_file(rows)}", "reward.functions=[{name: math}]")
    (line,) = check(config(*overrides))
    assert_lines([line], ("data.path: ", "'math'", "'7'", "'1/0'"))
    (line,) = check(config(overrides[0], "data.answer_column=null"))
    assert_lines([line], ("data.path: ", "'exact_match'", "'0'; '1'; '2'", 17))
    assert (
        check(
            config(
                *overrides,
                "algorithm={name: sft}",
                "data.completion_column=answer",
                "teacher=null",
                "data.max_completion_tokens=16",
            )
        )
        == []
    )


def test_a_directory_that_holds_a_run_is_not_overwritten():
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/config.yaml").touch()  # another rank of this run may have written it
    assert check(config()) == []
    Path("runs/quickstart/metrics.jsonl").touch()
    assert_lines(check(config()), ("run.name: ", "runs/quickstart", "run.resume=auto"))
    assert check(config("run.resume=auto")) == []
    assert check(config("run.name=other")) == []


def test_where_a_run_cannot_be_written():
    Path("file").touch()
    for name in ("file", "file/deeper", "/dev/null"):
        assert_lines(check(config(f"run.dir={name}")), ("run.dir: ", "a file", f"{name}/quickstart"))
    Path("runs").mkdir()
    (line,) = check(config(f"run.name={'n' * 300}"))
    assert_lines([line], ("run.dir: ", "runs/nnn", "File name too long", "run.name"))
    if os.geteuid() != 0:  # root may write everywhere
        Path("locked").mkdir(mode=0o500)
        assert_lines(check(config("run.dir=locked/runs"))[:1], ("run.dir: ", "locked"))


def test_what_only_writing_finds_out_is_one_line_too(capsys):
    assert main(["--config", QUICKSTART, "run.dir=/proc/runs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert_lines([line], ("run.dir: ", "/proc/runs/quickstart", "No such file or directory"))


LAUNCHED = ("rollout.backend=vllm", "rollout.server.launch=true")


def test_gpus_of_servers(monkeypatch):
    """The GPUs of the machine are those that torch reports."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert check(config(*LAUNCHED)) == []
    found = check(config(*LAUNCHED, "rollout.server.devices=[[5]]"))
    assert_lines(found, ("rollout.server.devices: ", "GPU 5", "shows 0", "[[]]"))
    teacher = "teacher={backend: served, path: 'builtin:teacher', server: {launch: true, devices: [[3]], memory: 0.5}}"
    assert_lines(check(config(teacher)), ("teacher.server.devices: ", "GPU 3", "shows 0", "[[]]"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: namedtuple("Properties", "total_memory")(2**36))
    assert_lines(
        check(config(*LAUNCHED, "rollout.server.devices=[[1, 4], [-1]]")),
        ("rollout.server.devices: ", "GPU 4", "0 to 3"),
        ("rollout.server.devices: ", "GPU -1", "0 to 3"),
    )
    found = check(config(*LAUNCHED, "rollout.server.devices=[[1, 1]]"))
    assert_lines(found, ("rollout.server.devices: ", "[1, 1]", "twice"))
    assert check(config(*LAUNCHED, teacher, "rollout.server.devices=[[1], [2]]")) == []
    assert_lines(
        check(config(*LAUNCHED, teacher, "rollout.server.devices=[[1], [3]]")),
        ("rollout.server.devices: ", "GPU 3", 1.35, "rollout.server.memory", "teacher.server.memory"),
    )
    assert check(config(*LAUNCHED, teacher, "rollout.server.devices=[[3]]", "rollout.server.memory=0.5")) == []
    monkeypatch.setenv("RANK", "1")  # for another node, which starts no server
    assert check(config(*LAUNCHED, "rollout.server.devices=[[5]]")) == []


def test_a_checkpoint_to_resume_from_must_exist():
    assert_lines(check(config("run.resume=Auto")), ("run.resume: ", "Auto", "never, auto"))
    Path("runs/quickstart/checkpoints/iteration-000050").mkdir(parents=True)
    assert check(config("run.resume=runs/quickstart/checkpoints/iteration-000050")) == []
    assert_lines(
        check(config("run.resume=iteration-000050")), ("run.resume: ", "runs/quickstart/checkpoints/iteration-000050")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without GPUs")
def test_devices():
    assert_lines(check(config("trainer.accelerator=gpu")), ("trainer.accelerator: ", "no GPU", "set cpu"))


def test_a_server_that_serves_the_model_is_fine():
    folder = model_folder("m")
    with server(folder) as by_path, server("m") as by_name:
        assert check(with_servers(by_path, by_name, path=folder)) == []


def test_servers_that_do_not_answer_are_named_with_their_key():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but not listening
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert_lines(check(with_servers(url)), ("rollout.server.urls: ", url, "GET /health", "5 s"))
        teacher = f"teacher={{backend: served, path: 'builtin:teacher', url: '{url}'}}"
        assert_lines(check(config(teacher)), ("teacher.url: ", url, "GET /health"))
    assert_lines(check(with_servers("localhost:8000")), ("rollout.server.urls: ", "'localhost:8000'", "http://"))
    (line,) = check(with_servers("http://localhost:port"))
    assert line.startswith("rollout.server.urls: ") and "port" in line


def test_each_of_several_teachers_is_checked():
    other = model_folder("other", extra=["<think>"])
    first = "{backend: local, name: a, path: 'builtin:teacher'}"
    second = f"{{backend: served, name: b, path: {other}, url: 'http://127.0.0.1:9'}}"
    problems = check(config(f"teacher={{backend: routed, teachers: [{first}, {second}]}}"))
    assert_lines(
        problems,
        ("teacher.teachers[1].path: ", "other", "model.path"),
        ("teacher.teachers[1].url: ", "http://127.0.0.1:9"),
    )


@pytest.mark.long
def test_a_server_of_another_model_or_kind_is_refused():
    with server("somebody/else") as url:
        assert_lines(check(with_servers(url)), ("rollout.server.urls: ", url, "'somebody/else'"))
    with server("student", length=40) as url:
        assert_lines(check(with_servers(url)), ("rollout.server.urls: ", "--max-model-len 40", 48))
    with server("teacher", length=48) as url:  # scoring 48 tokens takes 49: the server must generate one
        found = check(config(f"teacher={{backend: served, path: 'builtin:teacher', url: '{url}'}}"))
        assert_lines(found, ("teacher.url: ", 49))
    with server("student", routes={"/weight_info": None}) as url:
        assert_lines(check(with_servers(url)), ("rollout.server.urls: ", f"GET {url}/weight_info", 404))
    for answer in ({}, {"data": 3}, b"<html>"):
        with server("student", routes={"/v1/models": answer}) as url:
            assert_lines(check(with_servers(url)), ("rollout.server.urls: ", f"GET {url}/v1/models", 200))
    with server("teacher", routes={"/weight_info": None}) as url:  # a teacher never takes new weights
        assert check(config(f"teacher={{backend: served, path: 'builtin:teacher', url: '{url}'}}")) == []


def test_a_server_on_another_machine_cannot_read_weights_from_memory():
    for here in ("127.0.0.1", "localhost", own_address()):
        _refuse_elsewhere(f"http://{here}:8000")
    with pytest.raises(
        ServerError, match=r"^http://192.0.2.7:8000 is on another machine, .*; set rollout.server.sync_"
    ):
        _refuse_elsewhere("http://192.0.2.7:8000")


def test_all_problems_are_reported_together():
    keys = [
        line.split(":")[0]
        for line in check(
            config(
                "run.resume=nowhere",
                "model.path=/no/student",
                "teacher.path=/no/teacher",
                "reward.functions=[{name: nonsense}]",
                "rollout.backend=vllm",
                "rollout.server.urls=[x]",
            )
        )
    ]
    assert keys == ["run.resume", "model.path", "teacher.path", "reward.functions", "rollout.server.urls"]


def test_torchrun_and_the_config_must_agree_on_the_number_of_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert_lines(check(config("trainer.devices=2")), ("trainer.devices: ", "torchrun", 4, "2 × 1"))


def test_servers_that_other_nodes_cannot_reach_are_refused():
    launched = ("rollout.backend=vllm", "rollout.server.launch=true", "trainer.num_nodes=2")
    found = [line for line in check(config(*launched)) if line.startswith("rollout.server.host: ")]
    assert_lines(found, ("rollout.server.host: ", "127.0.0.1"))
    assert not [
        line
        for line in check(config(*launched, "rollout.server.host=10.0.0.1"))
        if line.startswith("rollout.server.host")
    ]


def test_each_model_is_read_once(monkeypatch):
    """It is read again if its files have changed. A tokenizer reads its model's configuration itself."""
    read: list[str] = []
    for kind in (AutoConfig, AutoTokenizer):
        plain = kind.from_pretrained
        monkeypatch.setattr(
            kind, "from_pretrained", lambda *a, _of=kind, _as=plain, **k: read.append(_of.__name__) or _as(*a, **k)
        )
    model_folder("mine")
    model_folder("theirs")
    settings = config("model.path=mine", "teacher.path=theirs")
    assert check(settings) == []
    assert read.count("AutoTokenizer") == 3 and read.count("AutoConfig") - 3 <= 2
    assert vocabulary_size(settings.model) == 56
    assert read.count("AutoTokenizer") == 3
    load_config("mine", False).vocab_size = 3  # the caller's own copy
    assert load_config("mine", False).vocab_size == 56
    known = json.loads(Path("mine/config.json").read_text())
    Path("mine/config.json").write_text(json.dumps(known | {"vocab_size": 50}))
    assert vocabulary_size(settings.model) == 50


def test_a_hub_that_refuses_a_model_is_one_line(monkeypatch, capfd, caplog):
    """It answers twice that it is busy: huggingface_hub asks again at once, and then warns and waits a second."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(429 if len(asked) < 3 else 404)
            self.send_header("Retry-After", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [caplog.handler])
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        assert main(["--config", QUICKSTART, "model.path=nowhere/at-all", "--estimate=8x80"]) == 2
    finally:
        hub.shutdown()
        hub.server_close()
    assert len(asked) == 3 and caplog.messages == []
    assert_lines(capfd.readouterr().err.splitlines(), ("--estimate: nowhere/at-all: ",))
