"""What needs two GPUs or more: NCCL between trainer and servers, taking turns on all GPUs, and the estimate."""

import json
import os
import subprocess
import sys

import pytest
import torch
from gpu_models import RandomModel, qwen_7b
from gpu_runs import QUICK, ROOT, checked, train, write_data
from gpu_transfer import CASES, transfer_config
from transformers import Qwen2Config

from rlkd.planning.memory import GIB, trainer_place
from rlkd.servers.placement import weight_sync

pytestmark = pytest.mark.gpu


def transfer(case, qwen, folder, servers):
    """What tests/gpu_transfer.py prints."""
    assert case in CASES and transfer_config(qwen.path, folder, servers).rollout.server.launch
    qwen.saved()
    line = [sys.executable, str(ROOT / "tests" / "gpu_transfer.py"), case, qwen.path, str(folder), str(servers)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    log = folder / "errors.txt"
    with open(log, "wb") as errors:
        done = subprocess.run(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, timeout=115)
    assert done.returncode == 0, log.read_text(errors="replace")[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.gpu(2)
def test_nccl_publishes(qwen, tmp_path, figure):
    found = transfer("publish", qwen, tmp_path, 1)
    figure(f"publish {found['publish 1']:.2f} s, again {found['publish 2']:.2f} s; largest |Δ| {found['gap']:.2f}")
    assert found["gap"] < 0.5, "another version's weights differ by nats"


@pytest.mark.gpu(2)
def test_nccl_with_a_wrong_name_in_the_stream(qwen, tmp_path, figure):
    found = transfer("wrong_name", qwen, tmp_path, 1)
    figure(f"after {found['seconds']:.1f} s: {found.get('error')}")
    assert "did not reach the servers" in found["error"] and found["seconds"] < 60


@pytest.mark.gpu(2)
def test_nccl_to_a_server_that_is_killed_in_the_middle(qwen, tmp_path, figure):
    found = transfer("kill", qwen, tmp_path, 1)
    figure(f"after {found['seconds']:.1f} s: {found.get('error')}")
    assert "did not reach the servers" in found["error"] and found["seconds"] < 60


@pytest.mark.gpu(3)
def test_nccl_to_two_servers_at_once(qwen, tmp_path, figure):
    """NCCL refuses two members of a group on one GPU, so each server needs its own."""
    found = transfer("publish", qwen, tmp_path, 2)
    figure(f"publish {found['publish 1']:.2f} s, again {found['publish 2']:.2f} s; largest |Δ| {found['gap']:.2f}")
    assert found["gap"] < 0.5


@pytest.mark.gpu(2)
@pytest.mark.parametrize("level", [1, 2])
def test_trainers_and_servers_take_turns(level, qwen, tmp_path, figure):
    """Two trainers and two servers on the same two GPUs; weights travel by file."""
    arguments = (
        *(f"model.path={qwen.path}", f"data.path={write_data(tmp_path)}", "data.chat_template=false"),
        *(f"run.dir={tmp_path}", "run.name=run", "run.iterations=3", "data.max_prompt_tokens=32", "rollout.prompts=16"),
        *("rollout.max_tokens=128", "reward.workers=1", "checkpoint.export=false", "trainer.devices=2"),
        *("rollout.server.devices=[[0],[1]]", "rollout.server.memory=0.6", f"rollout.server.sleep={level}", QUICK),
    )
    assert weight_sync(checked(["grpo"], arguments, gpus=2), gpus=2) == "file"
    qwen.saved()
    rows = train(tmp_path, "--config", "configs/grpo.yaml", *arguments, ranks=2)
    last = rows[-1]
    figure(
        f"level {level}: iteration {last['time/total']:.1f} s, publish {last['time/publish']:.1f} s, mismatch "
        f"{last['mismatch/mean']:.4f}, peak {last['memory/peak_gb']:.1f} GiB"
    )
    assert [row["iteration"] for row in rows] == [1, 2, 3]


def eight(path: str, folder, *overrides: str) -> tuple[str, ...]:
    return (
        *(f"model.path={path}", f"data.path={write_data(folder)}", "data.chat_template=false"),
        *(f"run.dir={folder}", "run.name=run", "run.iterations=2", "data.max_prompt_tokens=32", "rollout.prompts=16"),
        *("rollout.max_tokens=128", "reward.workers=1", "checkpoint.export=false", QUICK, *overrides),
    )


@pytest.mark.gpu(8)
def test_eight_gpus_need_what_was_estimated(tmp_path, figure):
    """Four trainers and four servers, by NCCL. The student has 7B's width, so its largest tensors, and 8 layers."""
    shape = RandomModel(tmp_path / "model", qwen_7b(layers=8))
    split = ("trainer.devices=4", "rollout.server.devices=[[4],[5],[6],[7]]")
    config = checked(["grpo"], arguments := eight(shape.path, tmp_path, *split), gpus=8)
    assert weight_sync(config, gpus=8) == "nccl"
    expected = trainer_place(config).peak / GIB
    shape.saved()
    rows = train(tmp_path, "--config", "configs/grpo.yaml", *arguments, ranks=4)
    peak, publish = max(row["memory/peak_gb"] for row in rows), rows[-1]["time/publish"]
    figure(f"peak {peak:.1f} GiB a trainer, --estimate {expected:.1f}; publish to 4 servers {publish:.2f} s")
    assert 0.5 * expected < peak < 1.1 * expected


@pytest.mark.gpu(8)
def test_eight_gpus_do_not_train_what_the_estimate_refuses(tmp_path, figure):
    """32B: the states of eight trainers and a micro-batch of 16k tokens. The GPUs' real memory decides."""
    shape = RandomModel(
        tmp_path / "model",
        Qwen2Config(
            **qwen_7b(layers=64).to_dict()
            | {"hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8}
        ),
    )
    arguments = eight(shape.path, tmp_path, "trainer.devices=8", "rollout.server.devices=[[8]]")
    place = trainer_place(checked(["grpo"], arguments, gpus=9))
    size = torch.cuda.get_device_properties(0).total_memory
    need = f"{place.always / GIB:.0f} GiB always, {place.peak / GIB:.0f} at most"
    figure(f"32B on 8 GPUs needs {need}; each has {size / GIB:.0f}")
    assert place.peak > size
