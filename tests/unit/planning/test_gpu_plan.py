"""Which process is on which GPU with how much memory, and what preflight reports on machines that this one is not.

A machine is what torch reports of it. Model shapes are those of published config.json files; no weights exist.
"""

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from lines import assert_lines, one_line
from transformers import Qwen2Config

from rlkd.command_line import parse
from rlkd.config.load import ConfigError
from rlkd.config.schema import Config
from rlkd.config_file import load, load_stages
from rlkd.planning.gpu_plan import ASLEEP, gpu_plan, room_problems
from rlkd.planning.memory import GIB, published_bytes
from rlkd.planning.preflight import check
from rlkd.serve import command as serve
from rlkd.serve import plan as serve_plan
from rlkd.servers.placement import seats, weight_sync
from rlkd.train import main, print_plan

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = (
    *("model.path=builtin:student", "teacher.path=builtin:teacher", "data.path=small.jsonl"),
    *("data.prompt_column=prompt", "data.max_prompt_tokens=32", "rollout.max_tokens=16", "rollout.prompts=16"),
    "reward.functions=[{name: exact_match}]",
)


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"q{i}", "prompt": f"abc{i}", "answer": "x"} for i in range(20)]
    Path("small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def box(monkeypatch):
    """Makes torch report a machine with `count` GPUs of `gib` GiB."""

    def make(count: int, gib: float = 80.0) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        kind = namedtuple("Properties", "total_memory")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: kind(int(gib * GIB)))

    return make


def kdrl(*overrides: str) -> Config:
    return load([str(CONFIGS / "kdrl.yaml")], [*TINY, *overrides]).config


def shapes(student: str = "7b", teacher: str = "7b") -> list[str]:
    """Overrides for a student and a teacher with these shapes, whose folders have a config.json only."""
    sizes = {"1.5b": (28, 1536, 8960, 12, 2), "7b": (28, 3584, 18944, 28, 4), "14b": (48, 5120, 13824, 40, 8)}
    for name in {student, teacher}:
        layers, hidden, width, heads, keys = sizes[name]
        Qwen2Config(
            vocab_size=152064,
            hidden_size=hidden,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=keys,
            tie_word_embeddings=name == "1.5b",
            dtype="bfloat16",
        ).save_pretrained(name)
    return [f"model.path={student}", f"teacher.path={teacher}", "data.path=x.jsonl"]


def large(*overrides: str, student: str = "7b", teacher: str = "7b") -> Config:
    return load([str(CONFIGS / "kdrl.yaml")], [*shapes(student, teacher), *overrides]).config


SHARED = ("rollout.server.devices=[[]]", "teacher.server.devices=[[]]")


def test_kdrl_on_two_gpus_is_one_line_with_a_setting_that_works(box):
    box(2)
    (line,) = check(kdrl())
    assert_lines([line], ("teacher.server.devices: ", "GPU 2", "shows 2", "0 to 1", "'teacher.server.devices=[[1]]'"))
    proposed = [word.strip("'") for word in line.split("policy server: ")[1].split()]
    assert check(kdrl(*proposed)) == []
    box(3)
    assert check(kdrl()) == []


def test_a_server_without_a_gpu_is_shown_the_free_ones(box):
    box(8)
    found = check(kdrl("teacher.server.devices=[[8]]", "trainer.devices=2", "rollout.server.devices=[[3]]"))
    assert_lines(found, ("teacher.server.devices: ", "GPU 8", "no process uses GPU 2, 4 to 7"))
    box(2)
    found = check(kdrl("trainer.devices=2", "rollout.server.devices=[[]]", "rollout.server.memory=0.3"))
    assert_lines(found, ("teacher.server.devices: ", "GPU 2", "teacher.server.devices=[[]]", "teacher.server.memory"))


def test_policy_and_teacher_on_one_gpu_share_it_or_are_refused(box):
    box(3)
    keys = ("rollout.server.memory", "teacher.server.memory")
    found = check(kdrl("teacher.server.devices=[[1]]"))
    assert_lines(found, ("rollout.server.devices: ", "GPU 1", 1.7, *keys))
    found = check(kdrl("rollout.server.devices=[[1,2]]"))
    assert_lines(found, ("rollout.server.devices: ", "GPU 2", 1.7, *keys))
    assert check(kdrl("teacher.server.devices=[[1]]", *(f"{key}=0.45" for key in keys))) == []


def test_the_gpu_of_the_first_trainer_is_counted_with_all_that_is_on_it(box):
    box(1)
    assert_lines(check(kdrl(*SHARED)), ("rollout.server.devices: ", "GPU 0", 1.7))
    halves = [f"{key}.server.memory=0.5" for key in ("rollout", "teacher")]
    (line,) = check(kdrl(*SHARED, *halves))
    assert_lines([line], ("rollout.server.memory: ", "GPU 0", "trainer 0", "teacher server", "at most 0.49"))
    thirds = [f"{key}.server.memory=0.3" for key in ("rollout", "teacher")]
    assert check(kdrl(*SHARED, *thirds)) == []


def test_a_local_teacher_that_fits_only_in_shards_is_not_refused():
    """14.8e9 parameters: 27.5 GiB in bf16 on each rank, or 6 GiB with an eighth of its layers."""
    local = (
        "teacher={backend: local, path: 14b, dtype: bfloat16}",
        "trainer.devices=8",
        "rollout.server.devices=[[8]]",
    )
    machine = [24 * GIB] * 9
    (line,) = gpu_plan(large(*local, teacher="14b"), machine).memory_problems()
    assert_lines([line], ("trainer.devices: ", "24.00 GiB"))
    sharded = large(*local, "trainer.shard_frozen=true", teacher="14b")
    assert gpu_plan(sharded, machine).memory_problems() == []


def test_what_a_shared_gpu_holds_is_added_up():
    """1.54e9 parameters: 16 bytes each in AdamW and fp32, and what is gathered and kept while it trains."""
    config = large(*SHARED, "rollout.server.memory=0.3", "teacher.server.memory=0.3", student="1.5b")
    plan = gpu_plan(config, [80 * GIB])
    sampling, training = plan.together(0)
    assert sampling == training == plan.trainer.peak + 0.6 * 80 * GIB
    table = plan.table().splitlines()
    assert [line for line in table if "[[]] is the GPU of trainer 0" in line] == [table[2], table[3]]
    assert "starts after" in table[3] and "starts after" not in table[2]
    assert f"{sampling / GIB:.2f} GiB" in table[4] and "fits" in table[4]
    assert plan.memory_problems() == []
    (line,) = gpu_plan(config, [56 * GIB]).memory_problems()
    assert_lines([line], ("rollout.server.memory: ", "56.00 GiB", "trainer 0", "policy server", "teacher server"))
    most = float(line.split("at most ")[1].split(",")[0])
    room = gpu_plan(config, [56 * GIB]).trainer.peak + 2 * most * 56 * GIB
    assert 0.98 * 56 * GIB < room <= 56 * GIB


def test_a_trainer_that_cannot_hold_its_state_is_refused():
    plan = gpu_plan(large(), [80 * GIB] * 3)
    assert_lines(plan.memory_problems(), ("trainer.devices: ", f"{16 * 7.6156e9 / GIB:.2f} GiB", "80.00 GiB", "GPU 0"))


def test_a_server_too_short_for_what_it_is_asked(box):
    """It scores 48 tokens and generates one."""
    box(3)
    assert check(kdrl("teacher.server.max_model_len=49")) == []
    assert_lines(check(kdrl("teacher.server.max_model_len=48")), ("teacher.server.max_model_len: ", 48, 49))
    own = "teacher={backend: self, weights: live, scorer: policy_server}"
    opsd = (
        "algorithm={name: opsd, divergence: {tier: sampled, kind: reverse_kl}}",
        "data.privileged_column=answer",
        own,
    )
    files = [str(CONFIGS / "kdrl.yaml")]
    privileged = load(
        files, [*(one for one in TINY if "teacher.path" not in one), *opsd, "rollout.server.max_model_len=64"]
    ).config
    found = [line for line in check(privileged) if "max_model_len" in line]
    assert_lines(found, ("rollout.server.max_model_len: ", 64))


def test_14b_on_eight_gpus_does_not_fit_whole_but_tensor_by_tensor():
    eight = ("trainer.devices=8", "rollout.server.devices=[[8]]", "teacher.server.devices=[[9]]")
    trainer = gpu_plan(large(*eight, student="14b"), [80 * GIB] * 10).trainer
    parts = {part.what: part.bytes for part in trainer.phases}
    assert parts["publishing"] == 6 * 152064 * 5120, "the embedding, in fp32 and bf16"
    assert trainer.peak < 77 * GIB < trainer.always + 4 * 14.77e9


def test_a_server_too_small_for_its_model_is_refused_unless_it_may_be_quantized():
    config = large("teacher.server.memory=0.5", student="1.5b", teacher="14b")
    (line,) = gpu_plan(config, [24 * GIB * 2, 80 * GIB, 48 * GIB]).memory_problems()
    assert_lines([line], ("teacher.server.memory: ", "teacher server", "0.5 of its GPU is 24.00 GiB", "27.51 GiB"))
    args = "teacher.server.extra_args=['--quantization', fp8]"
    config = large("teacher.server.memory=0.5", args, student="1.5b", teacher="14b")
    assert gpu_plan(config, [48 * GIB, 80 * GIB, 48 * GIB]).memory_problems() == []


def test_the_directory_of_published_weights_must_have_room(monkeypatch, box):
    """Two versions in bf16, the servers' dtype, beside each other; on a CPU servers compute in fp32."""
    config = large("rollout.server.weight_sync=file", student="1.5b")
    need = 2 * 2 * 1.544e9
    assert published_bytes(config, on_cpu=False) == pytest.approx(need, rel=1e-3)
    assert room_problems(config, gpus=3, free=1.01 * need) == []
    (line,) = room_problems(config, gpus=3, free=64 * 2**20)
    assert_lines([line], ("rollout.server.sync_dir: ", "/dev/shm", "5.75 GiB", "64.00 MiB", "--shm-size"))
    assert room_problems(large(student="1.5b"), gpus=3, free=0) == [], "nccl writes no file"
    other = large("rollout.server.weight_sync=file", "rollout.server.sync_dir=none/yet", student="1.5b")
    (line,) = room_problems(other, gpus=3, free=0)
    assert "none/yet" in line and "--shm-size" not in line
    box(3)
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(free=0))
    assert_lines(check(kdrl("rollout.server.weight_sync=file")), ("rollout.server.sync_dir: ", "/dev/shm"))
    lora = kdrl("model.lora={r: 4}", "rollout.max_staleness=1")
    assert published_bytes(lora, on_cpu=False) == 3 * published_bytes(kdrl("model.lora={r: 4}"), on_cpu=False) / 2


AUTO = [  # GPUs, overrides, what auto means
    (3, (), "nccl"),
    (8, ("trainer.devices=4", "rollout.server.devices=[[4,5],[6,7]]"), "nccl"),
    (1, ("rollout.server.devices=[[]]",), "ipc"),
    (2, ("rollout.server.devices=[[]]",), "ipc"),
    (2, ("rollout.server.devices=[[],[1]]",), "file"),
    (2, ("trainer.devices=2", "rollout.server.devices=[[]]"), "file"),
    (2, ("trainer.devices=2", "rollout.server.devices=[[0],[1]]", "rollout.server.sleep=1"), "file"),
    (1, ("rollout.server.devices=[[0]]", "rollout.server.sleep=2"), "ipc"),
    (0, ("trainer.accelerator=cpu", "rollout.server.devices=[[]]"), "file"),
    (2, ("trainer.accelerator=cpu",), "file"),
    (3, ("model.lora={r: 4}",), "file"),
    (3, ("rollout.server.launch=false", "rollout.server.urls=[http://10.0.0.1:8000]"), "file"),
    (3, ("rollout.server.weight_sync=ipc",), "ipc"),
]


@pytest.mark.parametrize(("gpus", "overrides", "kind"), AUTO)
def test_how_weights_are_sent_follows_the_gpus(gpus, overrides, kind):
    assert weight_sync(kdrl("teacher.server.devices=[[]]", *overrides), gpus) == kind


def test_a_server_started_by_hand_agrees_with_the_trainers_that_are_given_its_address(box, monkeypatch):
    box(3)
    monkeypatch.setenv("RLKD_SERVER_KEY", "k")
    line = ["--config", str(CONFIGS / "kdrl.yaml"), "--role", "policy", "--host", "10.0.0.1", "--port", "8000", *TINY]
    for setting, trainers in (((), "file"), (("rollout.server.weight_sync=nccl",), "nccl")):
        command, _ = serve_plan(**parse(serve, [*line, *setting]))
        sent = command[command.index("--weight-transfer-config") + 1]
        urls = ("rollout.server.launch=false", "rollout.server.urls=[http://10.0.0.1:8000]")
        assert weight_sync(kdrl(*setting, *urls)) == trainers
        assert sent == f'{{"backend": "{"rlkd_file" if trainers == "file" else trainers}"}}'


def test_ways_to_send_weights_that_the_gpus_rule_out(box):
    box(2)
    one = ("rollout.server.memory=0.3", "teacher.server.devices=[[1]]", "rollout.server.devices=[[]]")
    key = "rollout.server.weight_sync: "
    assert_lines(check(kdrl(*one, "rollout.server.weight_sync=nccl")), (key, "nccl", "GPU 0", "auto"))
    assert check(kdrl(*one, "rollout.server.weight_sync=ipc")) == []
    across = ("rollout.server.weight_sync=ipc", "teacher.server.devices=[[]]", "teacher.server.memory=0.3")
    assert_lines(check(kdrl(*across)), (key, "ipc", "GPU 1", "auto"))
    on_cpu = ("trainer.accelerator=cpu", "rollout.server.weight_sync=nccl", "teacher.server.devices=[[0]]")
    assert_lines(check(kdrl(*on_cpu)), (key, "nccl", "CPU", "auto"))


def turns(gpus: int, policy: str, teacher: str = "[[]]") -> list[tuple[str, int]]:
    config = kdrl(f"rollout.server.devices={policy}", f"teacher.server.devices={teacher}", "trainer.accelerator=cpu")
    return [(seat.name, seat.turn) for seat in seats(config, gpus) if seat.role != "trainer"]


def test_servers_that_share_a_gpu_start_one_after_the_other():
    policy, teacher = "policy server", "teacher server"
    assert turns(0, "[[],[]]") == [(f"{policy} 0", 0), (f"{policy} 1", 0), (teacher, 0)], "a CPU has no such profile"
    assert turns(1, "[[]]") == [(policy, 0), (teacher, 1)]
    assert turns(4, "[[1],[2]]", "[[3]]") == [(f"{policy} 0", 0), (f"{policy} 1", 0), (teacher, 0)]
    assert turns(4, "[[1],[1,2],[3]]", "[[2]]") == [
        (f"{policy} 0", 0),
        (f"{policy} 1", 1),
        (f"{policy} 2", 0),
        (teacher, 2),
    ]
    assert turns(1, "[[],[0]]") == [(f"{policy} 0", 0), (f"{policy} 1", 1), (teacher, 2)]


SLEEP = (
    "rollout.server.sleep=2",
    "trainer.devices=2",
    "rollout.server.devices=[[0],[1]]",
    "teacher.server.devices=[[2]]",
)


def test_servers_that_sleep_may_use_the_trainers_gpus(box):
    box(3)
    with pytest.raises(ConfigError, match=one_line("rollout.server.devices", "GPU 0", "rollout.server.sleep")):
        kdrl(*SLEEP, "rollout.server.sleep=0")
    assert check(kdrl(*SLEEP)) == []
    box(0)
    found = check(kdrl(*SHARED, "rollout.server.sleep=1", "trainer.accelerator=cpu"))
    assert_lines(found, ("rollout.server.sleep: ", 1, "CPU"))


def test_a_sleeping_server_leaves_its_memory_to_the_trainer_and_the_other_way_round():
    """7B on 8 GPUs: 14 GiB of state stay while the servers have 0.6 of 80, and 29 while they sleep."""
    eight = [f"[{i}]" for i in range(8)]
    settings = [f"rollout.server.devices=[{','.join(eight)}]", "rollout.server.sleep=2", "trainer.devices=8"]
    config = large(*settings, "teacher.server.devices=[[8]]", "rollout.server.memory=0.6")
    plan = gpu_plan(config, [80 * GIB] * 9)
    assert plan.together(7) == (plan.trainer.always + 48 * GIB, plan.trainer.peak + ASLEEP)
    assert plan.memory_problems() == []
    first, second, third, last = plan.table().splitlines()[1:5]
    assert first.startswith("0 to 7 ") and "asleep while the student trains" in second
    assert f"{48 + plan.trainer.always / GIB:.2f} GiB" in third and last.startswith("8 ")
    full = large(*settings, "teacher.server.devices=[[8]]", "rollout.server.memory=0.95")
    assert_lines(gpu_plan(full, [80 * GIB] * 9).memory_problems(), ("rollout.server.memory: ", "GPU 0", "at most 0.82"))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("rollout.max_staleness=1", "algorithm.importance=truncate"), ("rollout.max_staleness", 1)),
        (("rollout.server.launch=false", "rollout.server.urls=[http://h:8000]"), ("rollout.server.launch",)),
        (("model.lora={r: 4}",), ("model.lora",)),
    ],
)
def test_what_sleep_excludes(change, parts):
    with pytest.raises(ConfigError, match=one_line("rollout.server.sleep", *parts)):
        kdrl("rollout.server.sleep=1", *change)


def test_a_run_begins_with_its_plan(box, capsys):
    files = [str(CONFIGS / name) for name in ("opd.yaml", "opd_then_grpo.yaml")]
    models = [name.replace("teacher.path", "stages.opd.teacher.path") for name in shapes()]
    stages = load_stages(files, [*models, "rollout.server.devices=[[1]]"])
    box(0)
    print_plan(stages)
    assert capsys.readouterr().out == ""
    box(2)
    print_plan(stages)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("stage ")] == [f"stage {stage.name}" for stage in stages]
    assert sum(line.startswith("0 ") and "trainer" in line for line in printed) == len(stages) == 3


def test_the_estimate_of_an_imagined_machine(capsys):
    command = ["--config", str(CONFIGS / "kdrl.yaml"), *shapes(student="1.5b")]
    assert main([*command, "--estimate=8x80"]) == 0
    report = capsys.readouterr().out.splitlines()
    assert any(line.startswith("3 to 7 ") and line.endswith(" no process") for line in report)
    assert "would stop" not in "\n".join(report)
    assert main([*command, "--estimate=2x80"]) == 1
    *_, before, line = capsys.readouterr().out.splitlines()
    assert "would stop" in before
    assert_lines([line], ("teacher.server.devices: ", "GPU 2"))
    many = ["--config", str(CONFIGS / "quickstart.yaml"), "trainer.accelerator=auto", "trainer.devices=16"]
    assert main([*many, "--estimate=8x80"]) == 1
    *_, before, line = capsys.readouterr().out.splitlines()
    assert "would stop" in before
    assert_lines([line], ("trainer.devices: ", "is 16", "has 8"))


def test_the_estimate_of_a_recipe_is_refused_for_its_first_stage_alone(capsys):
    """Only `opd` has a teacher, 14 GiB beside the 23 GiB of the student; the stages after it would run."""
    files = [str(CONFIGS / name) for name in ("opd.yaml", "opd_then_grpo.yaml")]
    models = [name.replace("teacher.path", "stages.opd.teacher.path") for name in shapes(student="1.5b")]
    command = [part for file in files for part in ("--config", file)]
    assert main([*command, *models, "--estimate=2x32"]) == 1
    first, *others = capsys.readouterr().out.split("\nstage ")
    assert_lines(first.splitlines()[-1:], ("trainer.devices: ", "GPU 0", "32.00 GiB"))
    assert others and not any("would stop" in other for other in others)


def test_a_trainer_on_the_cpu_is_on_no_gpu(capsys):
    """A trainer of a 7B student needs 113 GiB and more, in main memory here, while its servers fit 24 GiB each."""
    command = ["--config", str(CONFIGS / "kdrl.yaml"), *shapes(), "rollout.server.devices=[[0]]"]
    command += ["teacher.server.devices=[[1]]", "trainer.devices=2"]
    assert main([*command, "trainer.accelerator=cpu", "--estimate=2x24"]) == 0
    student, *servers = capsys.readouterr().out.split("at most at a time")
    assert servers[0].startswith(", on the CPU (trainer.accelerator: cpu)")
    assert "DOES NOT FIT" not in "".join(servers)
    (row,) = [line for line in servers[-1].splitlines() if "trainer  " in line]
    need = student.split()[-2]
    assert row.startswith("CPU ") and f"{need} GiB" in row and "each of 2" in row
